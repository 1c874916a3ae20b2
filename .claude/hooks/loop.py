#!/usr/bin/env -S PATH=/usr/bin:/bin:${PATH} python3 -I
"""Keeps the research loop going: SessionStart, UserPromptSubmit, Stop, and the status line. Standard library only.

usage: loop.py            a hook call on standard input, the answer on standard output
       loop.py statusline one line for the terminal

The loop is on for the conversation in which a person typed "start", until program.md's `stop`, "stop", or three turns
in a row that brought no experiment. What is on is kept in runs/session/<conversation>.json, nothing else.
"""
from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import record  # noqa: E402

os.environ.pop("AR_PLAN", None)  # run.sh's own; in a hook it could only be a planted one
SESSIONS = record.ROOT / "runs" / "session"
IDLE_TURNS = 3
GO_ON = ("Next experiment: read what the last result taught, write one line under '## Next experiment' in "
         "scratchpad.md, edit train.py, run ./run.sh. Do not ask; nobody is watching.")


def session_file(call: dict) -> Path:
    return SESSIONS / (re.sub(r"[^A-Za-z0-9_-]", "", str(call.get("session_id", "")))[:100] + ".json")


def load(call: dict) -> dict:
    try:
        return json.loads(session_file(call).read_text())
    except (OSError, ValueError):
        return {}


def save(call: dict, session: dict) -> None:
    SESSIONS.mkdir(parents=True, exist_ok=True)
    part = session_file(call).with_suffix(".new")
    part.write_text(json.dumps(session))
    part.replace(session_file(call))


def context(event: str, text: str) -> dict:
    return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": text}}


def session_start(call: dict) -> dict:
    """Tell a conversation that begins, resumes or was compacted where things stand."""
    on = load(call).get("on")
    record.news_of_the_plan()  # CLAUDE.md shows the agent the plan as it is now
    tail = "The loop is on. " + GO_ON if on else "The loop is off until the person types: start"
    return context("SessionStart", record.brief(record.State()) + "\n" + tail)


def prompt(call: dict) -> dict:
    """start and stop, as whole messages; anything else leaves the loop as it is."""
    word = str(call.get("prompt", "")).strip().strip(".!\"'").lower()
    session = load(call)
    if word == "start":
        state = record.State()
        save(call, {"on": True, "from": state.newest, "seen": state.newest, "since": time.time(), "idle": 0})
        return context("UserPromptSubmit", f"The loop is on. Phase {state.phase_line()}. {GO_ON}")
    if word in ("stop", "pause"):
        save(call, {**session, "on": False, "stopped": True})
        return context("UserPromptSubmit", "The loop is off: do not run another experiment. Sum up in a few lines what "
                                           "was learned and what you would try next. 'start' goes on.")
    if session.get("stopped"):
        save(call, {**session, "stopped": False})
    if session.get("on"):
        return context("UserPromptSubmit", "The loop is still on: answer the person in a few lines, heed what they "
                                           "say, then go on with the next experiment in the same turn.")
    return {}


def stop(call: dict) -> dict:
    """Go on, unless there is a reason to end: then say which."""
    session = load(call)
    if not session.get("on"):
        return {}
    state = record.State()
    # a train.py in HEAD that does not run is recorded, but only a person can mend it
    done = any(r.n > session.get("seen", 0) and r.verdict != "unmeasured" for r in state.all)
    session |= {"idle": 0 if done else session.get("idle", 0) + 1, "seen": state.newest}
    why = reason_to_end(session, state)
    save(call, {**session, "on": not why})
    if why:
        return {"systemMessage": f"The loop has ended: {why}. Type start to go on, ./run.sh log for what was tried."}
    return {"decision": "block", "reason": f"Phase {state.phase_line()}. {GO_ON}"}


def reason_to_end(session: dict, state: record.State) -> str:
    """Why the loop should end now, '' when it should not."""
    ran = sum(r.n > session.get("from", 0) for r in state.counted)
    hours = (time.time() - session.get("since", 0)) / 3600
    limit = state.plan.stop
    if ran >= limit.get("experiments", float("inf")):
        return f"{ran} experiments since start, as program.md's `stop` says"
    if hours >= limit.get("hours", float("inf")):
        return f"{hours:.1f} hours since start, as program.md's `stop` says"
    if state.phase is None:
        return "all phases of program.md are done"
    if session["idle"] >= IDLE_TURNS:
        return f"{IDLE_TURNS} turns in a row brought no experiment"
    return ""


def statusline() -> str:
    state = record.State()
    parts = [f"#{state.newest}", f"{state.plan.metric} {state.best_line()}", f"phase {state.phase_line()}"]
    return " | ".join(filter(None, [*parts, record.running_line()]))


EVENTS = {"SessionStart": session_start, "UserPromptSubmit": prompt, "Stop": stop}


def main() -> None:
    event = ""
    try:
        if sys.argv[1:] == ["statusline"]:
            print(statusline())
            return
        call = json.loads(sys.stdin.buffer.read())
        event = call["hook_event_name"]
        answer = EVENTS[event](call)
    except Exception as e:
        # What cannot be read (a mistake in program.md, most often) ends the loop; person and agent both see why.
        if not event:
            print(str(e)[:150])
            return
        answer = {"systemMessage": f"The loop cannot go on: {e}"}
        if event != "Stop":
            answer |= context(event, f"{e}. Tell the person; nothing can run before it is mended.")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
