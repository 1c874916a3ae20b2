#!/usr/bin/env -S PATH=/usr/bin:/bin:${PATH} python3 -I
"""Keeps the research loop going: SessionStart, UserPromptSubmit, Stop, and the status line. Standard library only.

It also writes down what the planner said: PostToolUse of Agent.

usage: loop.py            a hook call on standard input, the answer on standard output
       loop.py statusline the client's status on standard input, one line for the terminal on standard output

The loop is on for the conversation in which a person typed "start", until program.md's `stop`, "stop", or three turns
in a row that brought no experiment. What is on is kept in runs/session/<conversation>.json; what was read of its
transcripts and what it cost beside it, in .tokens and .usd. In a night (night.py) `stop` counts all its conversations.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import record  # noqa: E402

os.environ.pop("AR_PLAN", None)  # run.sh's own; in a hook it could only be a planted one
SESSIONS = record.ROOT / "runs" / "session"
NIGHT, NIGHT_LOCK = record.ROOT / "runs" / "night.json", record.ROOT / "runs" / "night.lock"
IDLE_TURNS = 3
DIGITS = {"experiments": "d", "hours": ".1f", "tokens": ",d", "usd": ".2f"}  # of what `stop` limits
PAD = record.ROOT / "scratchpad.md"
PLANNED = re.compile(r"^##[ \t]+Planned[ \t]*\r?$.*?(?=^##\s|\Z)", re.M | re.S | re.I)  # ends as in result.py
MOST_PLANNED, MOST_PAD = 3000, 1 << 20  # bytes of the planner's answer that are kept, and of a scratchpad
GO_ON = (
    "Next experiment: {}read what the last result taught, write one line under '## Next experiment' in "
    "scratchpad.md, edit train.py, run ./run.sh. Do not ask the person; nobody is watching."
)


def session_file(call: dict) -> Path:
    return SESSIONS / (re.sub(r"[^A-Za-z0-9_-]", "", str(call.get("session_id", "")))[:100] + ".json")


def load(call: dict) -> dict:
    return get(session_file(call), {})


def save(call: dict, session: dict) -> None:
    put(session_file(call), session)


def put(file: Path, value) -> None:
    """Write JSON in one go; hooks of one conversation may run at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.new")
    part.write_text(json.dumps(value))
    part.replace(file)


def get(file: Path, default):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return default


def night() -> dict:
    """The night that is under way in this worktree, {} when none is: its keeper holds the lock while it lives."""
    with contextlib.suppress(OSError), NIGHT_LOCK.open() as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return get(NIGHT, {})
    return {}


def tokens(session: dict) -> int:
    """Input, output and what was written into the cache, of every message of a conversation and its subagents.

    Reads only what its transcripts have grown by. A message is written once for each of its blocks, and counts once.
    """
    if not session.get("transcript_path"):
        return 0
    meter, main = session_file(session).with_suffix(".tokens"), Path(session["transcript_path"])
    known = get(meter, {"at": {}, "used": {}})
    for file in (main, *main.with_suffix("").glob("subagents/*.jsonl")):
        with contextlib.suppress(OSError), file.open("rb") as f:
            f.seek(known["at"].get(str(file), 0))
            for line in iter(f.readline, b""):
                if not line.endswith(b"\n"):
                    break  # it is being written
                known["at"][str(file)] = f.tell()
                if b'"usage"' in line:
                    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                        message = json.loads(line)["message"]
                        n = sum(
                            message["usage"].get(k) or 0
                            for k in ("input_tokens", "output_tokens", "cache_creation_input_tokens")
                        )
                        known["used"][message["id"]] = max(n, known["used"].get(message["id"], 0))
    put(meter, known)
    return sum(known["used"].values())


def usd(session: dict) -> float:
    """What a conversation cost, as the status line was told: 0 without a terminal."""
    return get(session_file(session).with_suffix(".usd"), 0.0)


def context(event: str, text: str) -> dict:
    return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": text}}


def go_on(state: record.State, session: dict) -> str:
    ask = record.ASK if state.planner_is_due() else ""
    return f"Phase {state.phase_line()}.{progress(session, state)} {GO_ON.format(ask)}"


def session_start(call: dict) -> dict:
    """Tell a conversation that begins, resumes or was compacted where things stand."""
    session, tail = load(call), "The loop is off until the person types: start"
    if session.get("on"):
        record.news_of_the_plan()  # with CLAUDE.md comes the plan as it is now
        tail = f"The loop is on. {go_on(record.State(), session)}"
    return context("SessionStart", record.brief(record.State()) + "\n" + tail)


def prompt(call: dict) -> dict:
    """start and stop, as whole messages; anything else leaves the loop as it is."""
    word = str(call.get("prompt", "")).strip().strip(".!\"'").lower()
    session = load(call)
    if word == "start":
        state = record.State()
        record.news_of_the_plan()
        who = {k: call.get(k, "") for k in ("session_id", "transcript_path")}
        begin = {"from": state.newest, "since": time.time()}
        begin |= {k: v for k, v in night().items() if k in begin}
        session = {"on": True, "seen": state.newest, "idle": 0, **who, **begin, "tokens": tokens(who), "usd": usd(who)}
        save(call, session)
        return context("UserPromptSubmit", f"The loop is on. {go_on(state, session)}")
    if word in ("stop", "pause"):
        save(call, {**session, "on": False, "stopped": True})
        return context(
            "UserPromptSubmit",
            "The loop is off: do not run another experiment. Sum up in a few lines what "
            "was learned and what you would try next. 'start' goes on.",
        )
    if session.get("stopped"):
        save(call, {**session, "stopped": False})
    if session.get("on"):
        return context(
            "UserPromptSubmit",
            "The loop is still on: answer the person in a few lines, heed what they "
            "say, then go on with the next experiment in the same turn.",
        )
    return {}


def stop(call: dict) -> dict:
    """Go on, unless there is a reason to end: then say which."""
    session = load(call)
    if not session.get("on"):
        return {}
    state = record.State()
    # a train.py in HEAD that does not run is recorded, but only a person can mend it
    done = any(r.n > session.get("seen", 0) and r.verdict != "unmeasured" for r in state.own(state.all))
    session |= {"idle": 0 if done else session.get("idle", 0) + 1, "seen": state.newest}
    why = reason_to_end(session, state)
    save(call, {**session, "on": not why})
    if why:
        return {"systemMessage": f"The loop has ended: {why}. Type start to go on, ./run.sh log for what was tried."}
    return {"decision": "block", "reason": go_on(state, session)}


def agent_answered(call: dict) -> dict:
    """Put what the planner said under `## Planned` in scratchpad.md, whatever the agent makes of it."""
    try:
        answer = call["tool_response"]
        parts = answer["content"][answer.get("harnessNoteCount", 0) :]  # notes of the client's own, before and after
        write_plan("\n".join(p.get("text", "") for p in parts[: len(parts) - answer.get("harnessTailCount", 0)]))
    except Exception as e:
        return context("PostToolUse", f"The planner's answer was not put into scratchpad.md ({e}); tell the person.")
    return context(
        "PostToolUse",
        "The planner's answer now stands under '## Planned' in scratchpad.md: read that file "
        "again before you edit it. It is advice; the decision is yours.",
    )


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
        pad = pad[: old.start()] + body + ("\n" if old.end() < len(pad) else "") + pad[old.end() :]
    else:
        pad += ("" if pad.endswith("\n") or not pad else "\n") + "\n" + body
    part = SESSIONS / f"scratchpad.{os.getpid()}.new"
    SESSIONS.mkdir(parents=True, exist_ok=True)
    part.write_bytes(pad.encode("utf-8", "surrogateescape"))
    part.chmod(stat.S_IMODE(status.st_mode))
    shutil.move(part, PAD)  # runs/ may be on another disk


def nights_share(session: dict) -> dict:
    """The night's state, when this conversation is one of its own."""
    dark = night()
    return dark if dark.get("since") == session.get("since", 0) else {}


def spent(session: dict, state: record.State) -> dict:
    """What program.md's `stop` limits, counted since start: of a night over all its conversations."""
    dark = nights_share(session)
    meters = {
        "experiments": lambda: sum(r.n > session.get("from", 0) for r in state.tried),
        "hours": lambda: (time.time() - session.get("since", 0)) / 3600,
        "tokens": lambda: tokens(session) - session.get("tokens", 0) + dark.get("tokens", 0),
        "usd": lambda: usd(session) - session.get("usd", 0) + dark.get("usd", 0),
    }
    return {unit: meters[unit]() for unit in state.plan.stop if unit in meters}


def amount(unit: str, n: float, of: str = "") -> str:
    return f"{n:{DIGITS[unit]}}{of} {'USD' if unit == 'usd' else unit}"


def progress(session: dict, state: record.State) -> str:
    """'Since start 12 of 100 experiments, 3.2 of 9.5 hours.': how near `stop` is; '' where it has no such limit."""
    limit = state.plan.stop
    near = [amount(unit, n, f" of {limit[unit]:{DIGITS[unit]}}") for unit, n in spent(session, state).items()]
    return f" Since start {', '.join(near)}." if near else ""


def reason_to_end(session: dict, state: record.State) -> str:
    """Why the loop should end now, '' when it should not."""
    dark, limit, since = nights_share(session), state.plan.stop, session.get("since", 0)
    if dark.get("stop"):
        return dark["stop"]
    for clock, whose in ((dark.get("clock"), "the person said"), (limit.get("clock"), "program.md's `stop` says")):
        if clock and time.time() >= at_clock(clock, since):
            return f"it is {clock}, as {whose}"
    for unit, n in spent(session, state).items():
        if n >= limit[unit]:
            return f"{amount(unit, n)} since start, as program.md's `stop` says"
    if state.phase is None:
        return "all phases of program.md are done"
    if session.get("idle", 0) >= IDLE_TURNS:
        return f"{IDLE_TURNS} turns in a row brought no experiment"
    return ""


def at_clock(clock: str, since: float) -> float:
    """The first such local time after `since`."""
    day, (hour, minute) = time.localtime(since), map(int, clock.split(":"))
    today, tomorrow = (time.mktime((*day[:2], day.tm_mday + n, hour, minute, 0, 0, 0, -1)) for n in (0, 1))
    return today if today > since else tomorrow


def statusline(call: dict) -> str:
    cost = (call.get("cost") or {}).get("total_cost_usd")
    if isinstance(cost, (int, float)) and cost != usd(call):
        put(session_file(call).with_suffix(".usd"), cost)
    state = record.State()
    parts = [f"#{state.newest}", f"{state.plan.metric} {state.best_line()}", f"phase {state.phase_line()}"]
    return " | ".join(filter(None, [*parts, record.running_line()]))


EVENTS = {"SessionStart": session_start, "UserPromptSubmit": prompt, "Stop": stop, "PostToolUse": agent_answered}


def main() -> None:
    event = ""
    try:
        if sys.argv[1:] == ["statusline"]:
            print(statusline({} if sys.stdin.isatty() else json.loads(sys.stdin.buffer.read() or b"{}")))
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
