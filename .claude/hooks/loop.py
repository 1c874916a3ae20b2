#!/usr/bin/env -S PATH=/usr/bin:/bin:${PATH} python3 -I
"""Keeps the research loop going: SessionStart, UserPromptSubmit, Stop, and the status line. Standard library only.

It also writes down what the planner said: PostToolUse of Agent.

usage: loop.py            a hook call on standard input, the answer on standard output
       loop.py statusline one line for the terminal

The loop is on for the conversation in which a person typed "start", until program.md's `stop`, "stop", or three turns
in a row that brought no experiment. What is on is kept in runs/session/<conversation>.json, nothing else.
"""
from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import record  # noqa: E402

os.environ.pop("AR_PLAN", None)  # run.sh's own; in a hook it could only be a planted one
SESSIONS = record.ROOT / "runs" / "session"
IDLE_TURNS = 3
PAD = record.ROOT / "scratchpad.md"
PLANNED = re.compile(r"^##[ \t]+Planned[ \t]*\r?$.*?(?=^##\s|\Z)", re.M | re.S | re.I)  # ends as in result.py
MOST_PLANNED, MOST_PAD = 3000, 1 << 20  # bytes of the planner's answer that are kept, and of a scratchpad
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


def agent_answered(call: dict) -> dict:
    """Put what the planner said under `## Planned` in scratchpad.md, whatever the agent makes of it."""
    try:
        answer = call["tool_response"]
        parts = answer["content"][answer.get("harnessNoteCount", 0):]  # notes of the client's own, before and after
        write_plan("\n".join(p.get("text", "") for p in parts[:len(parts) - answer.get("harnessTailCount", 0)]))
    except Exception as e:
        return context("PostToolUse", f"The planner's answer was not put into scratchpad.md ({e}); tell the person.")
    return context("PostToolUse", "The planner's answer now stands under '## Planned' in scratchpad.md: read that file "
                                  "again before you edit it. It is advice; the decision is yours.")


def write_plan(said: str) -> None:
    """Replace the section's text, nothing else. A quotation, so that no line in it can be a heading. Raises OSError."""
    quoted = "\n".join(f"> {line}" for line in map(record.clean, said.splitlines()) if line)
    body = "## Planned\n" + quoted.encode()[:MOST_PLANNED].decode("utf-8", "ignore") + "\n"
    status = PAD.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > MOST_PAD:
        raise OSError("it is not one ordinary file below 1 MiB")
    pad = PAD.read_bytes().decode("utf-8", "surrogateescape")
    old = PLANNED.search(pad)
    if old:
        pad = pad[:old.start()] + body + ("\n" if old.end() < len(pad) else "") + pad[old.end():]
    else:
        pad += ("" if pad.endswith("\n") or not pad else "\n") + "\n" + body
    part = SESSIONS / f"scratchpad.{os.getpid()}.new"
    SESSIONS.mkdir(parents=True, exist_ok=True)
    part.write_bytes(pad.encode("utf-8", "surrogateescape"))
    part.chmod(stat.S_IMODE(status.st_mode))
    part.replace(PAD)


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


EVENTS = {"SessionStart": session_start, "UserPromptSubmit": prompt, "Stop": stop, "PostToolUse": agent_answered}


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
