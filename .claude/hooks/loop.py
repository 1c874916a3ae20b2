#!/usr/bin/env -S PATH=/usr/local/bin:/usr/bin:/bin:${PATH} python3 -I -X utf8
"""Keeps the research loop going: the events in EVENTS, and the status line. Standard library only.

usage: loop.py [statusline]     what the client says on standard input, the answer or the line on standard output
.claude/README.md says when the loop is on. In a night (./run.sh night) `stop` counts over all its conversations.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "container" / "harness"))
import display
import locks
import notify
import session
import settings
from history import History
from project import visible
from session import Session, end_chain

IDLE_TURNS = 3
STATUS_WIDTH = 96  # columns: the client takes four of a terminal for its margins
STILL_ON = "The loop is still on: answer the person in a few lines, then go on with the next experiment in this turn."
OFF = f"The loop is off: do not run another experiment; {session.SUM_UP}. 'start' goes on."


def context(call: dict, text: str) -> dict:
    """What tells the agent something; nothing where there is no text."""
    told = {"hookEventName": call.get("hook_event_name", ""), "additionalContext": text}
    return {"hookSpecificOutput": told} if text else {}


def go_on(history: History, now: Session) -> str:
    step = display.ASK * history.planner_due() + display.STEP
    return f"Phase {history.phase_line()}.{now.progress(history)} Next: {step}. Do not ask the person: nobody watches."


def session_start(call: dict, now: Session) -> dict:
    """Tell a conversation that begins, resumes or was compacted where things stand."""
    if now.on:
        session.plan_has_changed()  # with CLAUDE.md comes the plan as it is now
    history = History.load()
    loop = f"is on. {go_on(history, now)}" if now.on else "begins when the person types: start"
    told = context(call, f"{display.brief(history)}\nThe loop {loop}")
    if problem := settings.in_the_way():
        told["hookSpecificOutput"]["additionalContext"] += f"\nTell the person what is in the way: {problem}"
        told["systemMessage"] = f"The loop cannot work like this. {problem}"
    return told


def prompt(call: dict, now: Session) -> dict:
    """start and stop, as whole messages; anything else leaves the loop as it is."""
    now.fault = ""
    word = str(call.get("prompt", "")).strip().strip(".!\"'").lower()
    if word == "start":
        history = History.load()
        session.plan_has_changed()
        now.start(session.current_night(), history.newest)
        session.OPEN_CHAIN.unlink(missing_ok=True)  # an open chain is this loop's from now on
        text = f"The loop is on. {go_on(history, now)}"
    elif word in ("stop", "pause"):
        now.on, now.stopped, text = False, True, OFF
    else:
        now.stopped, text = False, STILL_ON if now.on else ""
    now.save()
    return context(call, text)


def stop(call: dict, now: Session) -> dict:
    """Go on, unless there is a reason to end: then say which."""
    if not now.on:
        return {}
    history = History.load()
    now.idle = 0 if session.progressed(history, now.seen) else now.idle + 1
    now.seen, now.fault = history.newest, ""
    idle = f"{IDLE_TURNS} turns in a row brought no experiment" if now.idle >= IDLE_TURNS else ""
    why = now.reason_to_end(history) or idle
    now.on = not why
    now.save()
    if why:
        if not session.current_night():  # which tells its own end
            notify.tell(f"the loop has ended: {why}; {history.program.metric} {history.best_line()}")
        return {"systemMessage": f"The loop has ended: {why}. Type start to go on, ./run.sh log for what was tried."}
    return {"decision": "block", "reason": go_on(history, now)}


def stop_failure(call: dict, now: Session) -> dict:
    """The turn has ended with an error of the provider's: the client asks no Stop hook then, and nothing goes on."""
    now.fault = visible(str(call.get("last_assistant_message") or call.get("error")))[:100]
    now.save()
    if now.on and not session.current_night():  # which goes on by itself
        notify.tell(f"the loop stands still, type anything to go on: {now.fault}")
    return {}


def status_line(call: dict, now: Session) -> str:
    """What matters now comes first: a line that is too wide is cut off at its end."""
    if (cost := (call.get("cost") or {}).get("total_cost_usd")) is not None:
        now.note_cost(cost)
    history = History.load()
    halted = f"THE LOOP STANDS STILL, type anything to go on: {now.fault}" if now.on and now.fault else ""
    first = [halted or f"#{history.newest}"]
    if (runs := locks.running()) and not halted:
        first = [f"#{runs.number} {runs.activity.replace('candidate, ', '')}", *locks.progress(runs)[:2]]
    line = ", ".join(first)[:STATUS_WIDTH]
    best = re.sub(r" since[^)]*", "", f"{history.program.metric} {history.best_line()}")
    phase = re.sub(r" \(.*\)| experiments| at most", "", f"phase {history.phase_line()}").replace(" of ", "/")
    for part in (best, phase):
        line += f" | {part}" if len(f"{line} | {part}") <= STATUS_WIDTH else ""
    return line


EVENTS = {"SessionStart": session_start, "UserPromptSubmit": prompt, "Stop": stop, "StopFailure": stop_failure}


def main() -> None:
    said, call, event = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(), {}, ""
    try:
        call = dict(json.loads(said or b"{}"))
        now, event = Session.load(call.get("session_id", "")), call.get("hook_event_name", "")
        now.transcript = call.get("transcript_path") or now.transcript
        was_on = now.on
        if not was_on and session.OPEN_CHAIN.exists() and not sys.argv[1:]:
            end_chain()  # that of a loop which is over
        answer = status_line(call, now) if sys.argv[1:] else json.dumps(EVENTS[event](call, now))
        if was_on and not now.on and not session.current_night():  # which goes on in its next conversation
            end_chain()
    except Exception as e:  # program.md cannot be read, most often: the loop ends; person and agent both see why
        told = {} if event == "Stop" else context(call, f"{e}. Tell the person; nothing can run before it is fixed.")
        answer = str(e)[:150] if sys.argv[1:] else json.dumps({"systemMessage": f"The loop cannot go on: {e}", **told})
    print(answer)


if __name__ == "__main__":
    main()
