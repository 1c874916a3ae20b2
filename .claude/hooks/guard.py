#!/usr/bin/env python3
"""PreToolUse: the three abilities of the research agent, and no fourth. Standard library only.

Reads one hook call on standard input and prints allow or deny. Everything not named here is denied, whatever the
user's settings or permission mode say. The hook's command line turns a crash, a time-out or silence into a denial.
A reason is written for the model: it says what to do instead.
"""
from __future__ import annotations

import json
import os
import re
import stat
import sys

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
EDITABLE = ("train.py", "scratchpad.md")
READABLE = re.compile(r"train\.py|scratchpad\.md|program\.md|CLAUDE\.md|runs/experiments\.tsv"
                      r"|runs/[0-9]{4,9}\.(log|diff)|data/[A-Za-z0-9][A-Za-z0-9_.-]{0,40}/preview\.png")
KEYS = {"Bash": {"command", "description"}, "Edit": {"file_path", "old_string", "new_string", "replace_all"},
        "Write": {"file_path", "content"}, "Read": {"file_path", "offset", "limit"}}
COMMAND = "./run.sh"
ABILITIES = "You can edit train.py, edit scratchpad.md, and run ./run.sh, nothing else."


class Denied(Exception):
    """The message is what the model reads."""


def path_of(call: dict, allowed) -> str:
    """The project-relative path a file tool names. Raises Denied unless it is spelled plainly and is an ordinary file.

    Only three spellings pass: train.py, ./train.py and the absolute path. So there is nothing to normalise and no
    difference between what is checked here and what the client opens.
    """
    asked = call["tool_input"].get("file_path")
    if not isinstance(asked, str):
        raise Denied("file_path must be a string. " + ABILITIES)
    for prefix in (ROOT + "/", os.environ.get("CLAUDE_PROJECT_DIR", ROOT).rstrip("/") + "/", "./"):
        if asked.startswith(prefix):
            asked = asked[len(prefix):]
            break
    if not allowed(asked):
        raise Denied(refusal(call["tool_name"]))
    full = os.path.join(ROOT, asked)
    if os.path.realpath(full) != full:
        raise Denied(f"{asked} is or lies behind a symbolic link; tell the person, and go on with something else.")
    try:
        status = os.lstat(full)
    except OSError:
        raise Denied(f"{asked} does not exist. {refusal('Read')}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise Denied(f"{asked} is not an ordinary file (or has a second name); tell the person.")
    return asked


def refusal(tool: str) -> str:
    """What to do instead."""
    return {
        "Bash": "Only the exact command ./run.sh, with no arguments, may be run. Past results: Read"
                " runs/experiments.tsv; a whole log: runs/NNNN.log. To change code: Edit train.py.",
        "Edit": "Only train.py and scratchpad.md can be edited, spelled so. Put ideas that need other files into"
                " scratchpad.md for the person.",
        "Read": "Only train.py, scratchpad.md, program.md, CLAUDE.md, runs/experiments.tsv, runs/NNNN.log,"
                " runs/NNNN.diff and data/*/preview.png can be read.",
        "WebFetch": "There is no web access. Work from what you know; note open questions in scratchpad.md.",
    }.get({"Write": "Edit", "WebSearch": "WebFetch"}.get(tool, tool), f"{tool} is not available. " + ABILITIES)


def check(call: dict) -> dict:
    """Returns the decision's extra fields for an allowed call. Raises Denied."""
    tool, given = call.get("tool_name"), call.get("tool_input")
    if tool not in KEYS:
        raise Denied(refusal(str(tool)[:60]))
    if not isinstance(given, dict) or set(given) - KEYS[tool]:
        extra = ", ".join(sorted(map(str, set(given) - KEYS[tool]))) if isinstance(given, dict) else "the input"
        why = ": ./run.sh runs in the foreground, and its own limit ends it" if tool == "Bash" else ""
        raise Denied(f"leave out {extra[:100]} and call {tool} again{why}. {ABILITIES}")
    if os.path.realpath(call.get("cwd") or "/") != ROOT:  # relative paths would mean other files
        raise Denied(f"the shell is not in {ROOT}; tell the person to start claude there.")
    if tool == "Bash":
        return run(call, given)
    if tool == "Read":
        path_of(call, READABLE.fullmatch)
    else:
        path_of(call, EDITABLE.__contains__)
    return {}


def run(call: dict, given: dict) -> dict:
    """Allow ./run.sh, with the one-time proof that run.sh asks of Claude Code. Raises Denied."""
    if given.get("command") != COMMAND:
        raise Denied(refusal("Bash"))
    session, ident = (re.sub(r"[^A-Za-z0-9_-]", "", str(call.get(k, "")))[:100] for k in ("session_id", "tool_use_id"))
    folder = os.path.join(ROOT, "runs", "session")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(os.path.join(folder, f"{session}.json"), encoding="utf-8") as f:
            known = dict(json.load(f))
    except (OSError, ValueError, TypeError):
        known = {}
    why = "the person said stop" if known.get("stopped") else why_ended(known) if known.get("on") else ""
    if why:
        raise Denied(f"The loop has ended: {why}. Do not run another experiment: sum up in a few lines in scratchpad.md"
                     " what was learned and what you would try next, then end your turn.")
    if not ident:
        raise Denied("this call has no id; run ./run.sh again.")
    with open(os.path.join(folder, f"proof.{ident}"), "w", encoding="utf-8"):
        pass
    return {"updatedInput": {**given, "command": f"AR_PROOF={ident} {COMMAND}"}}


def why_ended(session: dict) -> str:
    """program.md's `stop` or the end of its phases, for an agent whose turn never ends; '' while the loop goes on."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import loop
    try:
        return loop.reason_to_end({**session, "idle": 0}, loop.record.State())
    except Exception:
        return ""  # a mistake in program.md, most often: run.sh says which


def main() -> None:
    try:
        call = json.loads(sys.stdin.buffer.read())
        extra = check(call)
        decision = {"permissionDecision": "allow", "permissionDecisionReason": "one of the three abilities", **extra}
    except Denied as e:
        decision = {"permissionDecision": "deny", "permissionDecisionReason": str(e)}
    print(json.dumps({"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}))


if __name__ == "__main__":
    main()
