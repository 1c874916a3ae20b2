#!/usr/bin/env python3
"""PreToolUse: the three abilities of the research agent, and no fourth. Standard library only.

Reads one hook call on standard input and prints allow or deny. Everything not named here is denied, whatever the
user's settings or permission mode say. The hook's command line turns a crash, a time-out or silence into a denial.
A reason is written for the model: it says what to do instead.

It may also ask the planner, a subagent that only reads, and both may use the web where the current phase names domains.
The client follows redirects only within a host ("www." aside), scheme and port; others come back here as new calls.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
EDITABLE = ("train.py", "scratchpad.md")
READABLE = re.compile(
    r"train\.py|scratchpad\.md|program\.md|CLAUDE\.md|runs/experiments\.tsv"
    r"|runs/[0-9]{4,9}\.(log|diff)|data/[A-Za-z0-9][A-Za-z0-9_.-]{0,40}/preview\.png"
)
KEYS = {
    "Bash": {"command", "description"},
    "Edit": {"file_path", "old_string", "new_string", "replace_all"},
    "Write": {"file_path", "content"},
    "Read": {"file_path", "offset", "limit"},
    "WebFetch": {"url", "prompt", "offset"},
    "WebSearch": {"query", "allowed_domains", "blocked_domains"},
    "Agent": {"description", "prompt", "subagent_type"},
}
PLANNER, READERS = "planner", ("Read", "WebFetch", "WebSearch")  # all that a subagent can have, whatever its file says
# A plain URL: no user, no port, a name for a host (its last label of letters, so no address), RFC 3986's characters
URL = re.compile(
    r"https://((?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63})(?:/[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]*)?"
)
MOST_URL, MOST_QUERY, MOST_PROMPT = 500, 300, 3000  # characters
COMMAND = "./run.sh"
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
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
            asked = asked[len(prefix) :]
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
    }.get({"Write": "Edit"}.get(tool, tool), f"{tool} is not available. " + ABILITIES)


def check(call: dict) -> dict:
    """Returns the decision's extra fields for an allowed call. Raises Denied."""
    tool, given = call.get("tool_name"), call.get("tool_input")
    if tool not in KEYS:
        raise Denied(refusal(str(tool)[:60]))
    if tool not in READERS and ("agent_id" in call or call.get("agent_type") == PLANNER):
        raise Denied("A subagent only reads. Return what you found; the agent that asked you edits train.py.")
    if not isinstance(given, dict) or set(given) - KEYS[tool]:
        extra = ", ".join(sorted(map(str, set(given) - KEYS[tool]))) if isinstance(given, dict) else "the input"
        why = ": ./run.sh runs in the foreground, and its own limit ends it" if tool == "Bash" else ""
        raise Denied(f"leave out {extra[:100]} and call {tool} again{why}. {ABILITIES}")
    if os.path.realpath(call.get("cwd") or "/") != ROOT:  # relative paths would mean other files
        raise Denied(f"the shell is not in {ROOT}; tell the person to start claude there.")
    if tool in ("Read", "Edit", "Write"):
        path_of(call, READABLE.fullmatch if tool == "Read" else EDITABLE.__contains__)
        return {}
    if tool == "Agent":  # what it answers, loop.py puts into the scratchpad
        if given.get("subagent_type") != PLANNER or len(str(given.get("prompt"))) > MOST_PROMPT:
            raise Denied(f"Only the '{PLANNER}' can be asked, in at most {MOST_PROMPT} characters. {ABILITIES}")
        return {}
    return {"Bash": run, "WebFetch": fetch, "WebSearch": search}[tool](call, given)


def fetch(call: dict, given: dict) -> dict:
    """Allow a plain URL of the phase's domains; its `prompt` goes to the model's provider alone. Raises Denied."""
    domains, url = domains_of_phase(), given.get("url")
    m = URL.fullmatch(url) if isinstance(url, str) and len(url) <= MOST_URL else None
    if not m or not any(m[1] == d or m[1].endswith("." + d) and "xn--" not in m[1] for d in domains):
        raise Denied(
            f"Only plain https URLs of {', '.join(domains)} can be fetched (program.md: web), without port, at"
            f" most {MOST_URL} characters. Go on without; note open questions in scratchpad.md."
        )
    log(call, url)
    return {}


def search(call: dict, given: dict) -> dict:
    """Allow a search of the phase's domains, or of those among them that were asked for. Raises Denied."""
    domains, query = domains_of_phase(), given.get("query")
    asked = given.get("allowed_domains") or domains
    if not isinstance(asked, list) or not all(d in domains for d in asked):
        raise Denied(f"leave out allowed_domains: {', '.join(domains)} are searched (program.md: web). {ABILITIES}")
    if not isinstance(query, str) or len(query) > MOST_QUERY or not query.isprintable():
        raise Denied(f"query must be one line of at most {MOST_QUERY} plain characters. {ABILITIES}")
    log(call, query)
    return {"updatedInput": {"query": query, "allowed_domains": [d for d in domains if d in asked]}}


def domains_of_phase() -> list:
    """What `web` of program.md's current phase names. Raises Denied."""
    try:
        import loop  # here, so that other calls stay fast

        phase = loop.record.State().phase
    except Exception as e:  # a mistake in program.md, most often
        raise Denied(f"No web access: {e}; tell the person.") from None
    if not phase or not phase.web:
        raise Denied(
            f"the current phase '{phase.name if phase else 'none'}' has no web access (program.md: web): work"
            " from what you know, and note open questions in scratchpad.md."
        )
    return phase.web


def log(call: dict, text: str) -> None:
    """For the record, which run.sh makes of it: what leaves this machine, a file a request. Raises Denied."""
    folder, name = os.path.join(ROOT, "runs", "web"), f"{time.time_ns():020d}.{ident_of(call, 'tool_use_id')}"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "." + name), "x", encoding="utf-8") as f:  # hidden until it is whole
            f.write(f"{time.strftime('%FT%TZ', time.gmtime())}\t{call['tool_name']}\t{len(text)}\t{text}\n")
        os.rename(f.name, os.path.join(folder, name))
    except OSError as e:
        raise Denied(f"the request cannot be logged in runs/web ({e}), so it is not made; tell the person.") from None


def ident_of(call: dict, key: str) -> str:
    """As a part of a file's name. Raises Denied."""
    ident = re.sub(r"[^A-Za-z0-9_-]", "", str(call.get(key, "")))[:100]
    if not ident:
        raise Denied(f"this call has no {key}; make it again, or tell the person.")
    return ident


def run(call: dict, given: dict) -> dict:
    """Allow ./run.sh, with the one-time proof that run.sh asks of Claude Code. Raises Denied."""
    if given.get("command") != COMMAND:
        raise Denied(refusal("Bash"))
    ident, session = ident_of(call, "tool_use_id"), ident_of(call, "session_id")
    folder = os.path.join(ROOT, "runs", "session")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(os.path.join(folder, f"{session}.json"), encoding="utf-8") as f:
            known = dict(json.load(f))
    except (OSError, ValueError, TypeError):
        known = {}
    why = "the person said stop" if known.get("stopped") else why_ended(known) if known.get("on") else ""
    if why:
        raise Denied(
            f"The loop has ended: {why}. Do not run another experiment: sum up in a few lines in scratchpad.md"
            " what was learned and what you would try next, then end your turn."
        )
    open(os.path.join(folder, f"proof.{ident}"), "w").close()
    return {"updatedInput": {**given, "command": f"AR_PROOF={ident} {COMMAND}"}}


def why_ended(session: dict) -> str:
    """program.md's `stop` or the end of its phases, for an agent whose turn never ends; '' while the loop goes on."""
    try:
        import loop  # here, so that other calls stay fast

        return loop.reason_to_end({**session, "idle": 0}, loop.record.State())
    except Exception:
        return ""  # a mistake in program.md, most often: run.sh says which


def main() -> None:
    try:
        call = json.loads(sys.stdin.buffer.read())
        decision = {"permissionDecision": "allow", "permissionDecisionReason": "within the lock", **check(call)}
    except Denied as e:
        decision = {"permissionDecision": "deny", "permissionDecisionReason": str(e)}
    print(json.dumps({"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}))


if __name__ == "__main__":
    main()
