#!/usr/bin/env python3
"""PreToolUse: the three abilities of the research agent, and no fourth. Standard library only.

Reads one hook call on standard input and prints allow or deny. Everything not named here is denied, whatever the
user's settings or permission mode say. The hook's command line turns a crash, a time-out or silence into a denial.
A reason is written for the model: it says what to do instead.

It may also ask the planner, a subagent that only reads, and both may use the web where the current phase names domains.
The client follows redirects only within a host ("www." aside), scheme and port; others come back here as new calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time

ROOT = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
EDITABLE = r"train\.py|scratchpad\.md"
PREVIEW = r"data/[^/]+/preview\.png"  # of a data set: see bring_preview
READABLE = rf"{EDITABLE}|program\.md|CLAUDE\.md|runs/experiments\.tsv|runs/[0-9]{{4,9}}\.(log|diff)|{PREVIEW}"
KEYS = {  # of a call's input
    "Bash": {"command", "description"},
    "Edit": {"file_path", "old_string", "new_string", "replace_all"},
    "Write": {"file_path", "content"},
    "Read": {"file_path", "offset", "limit"},
    "WebFetch": {"url", "prompt", "offset"},
    "WebSearch": {"query", "allowed_domains", "blocked_domains"},
    "Agent": {"description", "prompt", "subagent_type"},
}
# Dropped, unless it is switched on: it changes nothing here. Whatever else there may be is refused
DROPPED = {"Bash": ("timeout", "dangerouslyDisableSandbox"), "Read": ("pages", "allow_large")}
PLANNER, SUBAGENT_TOOLS = "planner", ("Read", "WebFetch", "WebSearch")  # whatever the subagent's own file says
# A plain URL: no user, no port, a name for a host (its last label of letters, so no address), RFC 3986's characters
HOST = r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}"
URL = re.compile(rf"https://({HOST})(?:/[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]*)?")
MAX_URL, MAX_QUERY, MAX_PROMPT = 500, 300, 3000  # characters
ABILITIES = "You can edit train.py, edit scratchpad.md, and run ./run.sh in the foreground, nothing else."
RUN_ONLY = "Only ./run.sh may be run, with no arguments. For past results Read runs/experiments.tsv, runs/NNNN.log."
EDIT_ONLY = "Only train.py and scratchpad.md can be edited. Note in scratchpad.md for the person what else needs it."
READ_ONLY = (
    "Only train.py, scratchpad.md, program.md, CLAUDE.md, runs/experiments.tsv, runs/NNNN.log, runs/NNNN.diff and "
    "data/*/preview.png can be read."
)
sys.path.append(os.path.join(ROOT, "container", "harness"))  # for the calls that need the record


class Denied(Exception):
    """The message is what the model reads."""


def check(call: dict) -> dict:
    """Returns the decision's extra fields for an allowed call. Raises Denied."""
    tool, given = call.get("tool_name"), call.get("tool_input")
    if tool not in KEYS:
        raise Denied(f"{str(tool)[:60]} is not available. {ABILITIES}")
    if tool not in SUBAGENT_TOOLS and ("agent_id" in call or call.get("agent_type") == PLANNER):
        raise Denied("A subagent only reads. Return what you found; the agent that asked you edits train.py.")
    unknown = set(given) - KEYS[tool] if isinstance(given, dict) else {"what is not an object"}
    if refused := {key for key in unknown if key not in DROPPED.get(tool, ()) or given[key] is True}:
        raise Denied(f"leave out {', '.join(sorted(refused))[:100]} and call {tool} again. {ABILITIES}")
    given = {key: value for key, value in given.items() if key not in unknown}
    if os.path.realpath(call.get("cwd") or "/") != ROOT:  # relative paths would mean other files
        raise Denied(f"the shell is not in {ROOT}; tell the person to start claude there. {ABILITIES}")
    if tool == "Agent" and (given.get("subagent_type") != PLANNER or len(str(given.get("prompt"))) > MAX_PROMPT):
        raise Denied(f"Only the '{PLANNER}' can be asked, in at most {MAX_PROMPT} characters. {ABILITIES}")
    if tool == "Read":
        check_file(given.get("file_path"), READABLE, READ_ONLY)
    elif tool in ("Edit", "Write"):
        check_file(given.get("file_path"), EDITABLE, EDIT_ONLY)
    elif tool in ("WebFetch", "WebSearch"):
        return web(call, given)
    elif tool == "Bash":
        run(call, given)
    return {"updatedInput": given} if unknown else {}


def check_file(path, allowed: str, instead: str) -> None:
    """Raises Denied unless the path is spelled plainly and is an ordinary file.

    Only three spellings pass: train.py, ./train.py and the absolute path. So there is nothing to normalise and no
    difference between what is checked here and what the client opens.
    """
    project = os.environ.get("CLAUDE_PROJECT_DIR", ROOT).rstrip("/")
    prefix = next((p for p in (f"{ROOT}/", f"{project}/", "./") if str(path).startswith(p)), "")
    name = str(path)[len(prefix) :]
    if not isinstance(path, str) or not re.fullmatch(allowed, name):
        raise Denied(instead)
    full = os.path.join(ROOT, name)
    if name.startswith("data/"):
        bring_preview(name)
        full = os.path.join(os.path.realpath(os.path.join(ROOT, "data")), name[len("data/") :])  # on another disk
    if os.path.realpath(full) != full or not os.path.isfile(full) or os.stat(full).st_nlink != 1:
        raise Denied(f"{name} is missing, or no ordinary file (a link, a folder); tell the person. {instead}")


def bring_preview(name: str) -> None:
    """Data sets lie in the main worktree; another one gets a copy of what may be seen of them. Raises Denied."""
    from project import DATA_NAME, write_whole  # here, so that other calls stay fast

    if not re.fullmatch(DATA_NAME, name.split("/")[1]):
        raise Denied(READ_ONLY)
    with contextlib.suppress(Exception):  # then it is missing here, which is said next
        import git

        there, here = git.main_worktree() / name, git.ROOT / name
        if there != here == here.resolve() and there.is_file() and not there.is_symlink():
            write_whole(here, there.read_bytes())


def web(call: dict, given: dict) -> dict:
    """Only plain URLs of the phase's domains pass, and a search is restricted to these domains. Raises Denied."""
    domains = domains_of_phase()
    only = f"{', '.join(domains)} (program.md: web)"
    if call["tool_name"] == "WebFetch":
        url = given.get("url")
        m = URL.fullmatch(url) if isinstance(url, str) and len(url) <= MAX_URL else None
        if not m or not any(m[1] == d or m[1].endswith("." + d) and "xn--" not in m[1] for d in domains):
            raise Denied(f"Only plain https URLs of {only} pass, up to {MAX_URL} characters. Note it in scratchpad.md.")
        log(call, url)  # and not the prompt, which goes to the model's provider alone
        return {}
    query, asked = given.get("query"), given.get("allowed_domains") or domains
    if not isinstance(asked, list) or not all(d in domains for d in asked):
        raise Denied(f"leave out allowed_domains: the search is in {only}. {ABILITIES}")
    if not isinstance(query, str) or len(query) > MAX_QUERY or not query.isprintable():
        raise Denied(f"query must be one line of at most {MAX_QUERY} plain characters. {ABILITIES}")
    log(call, query)
    return {"updatedInput": {"query": query, "allowed_domains": [d for d in domains if d in asked]}}


def domains_of_phase() -> list:
    """What `web` of program.md's current phase names. Raises Denied."""
    try:
        from history import History  # here, so that other calls stay fast

        phase = History.load().phase
    except Exception as e:  # a mistake in program.md, most often
        raise Denied(f"No web access: {e}; tell the person.") from None
    if not phase or not phase.web:
        raise Denied(f"phase '{phase.name if phase else 'none'}' has no web access; note that in scratchpad.md.")
    return phase.web


def log(call: dict, text: str) -> None:
    """What leaves this machine, a file a request; run.sh puts it into the record. Raises Denied."""
    folder, name = os.path.join(ROOT, "runs", "web"), f"{time.time_ns():020d}.{name_of(call, 'tool_use_id')}"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "." + name), "x", encoding="utf-8") as f:  # hidden until it is whole
            f.write(f"{time.strftime('%FT%TZ', time.gmtime())}\t{call['tool_name']}\t{len(text)}\t{text}\n")
        os.rename(f.name, os.path.join(folder, name))
    except OSError as e:
        raise Denied(f"the request cannot be logged in runs/web ({e}), so it is not made; tell the person.") from None


def name_of(call: dict, key: str) -> str:
    """An id of the call as a part of a file's name. Raises Denied."""
    name = re.sub(r"[^A-Za-z0-9_-]", "", str(call.get(key, "")))[:100]
    if not name:
        raise Denied(f"this call has no {key}; make it again, or tell the person.")
    return name


def run(call: dict, given: dict) -> None:
    """Lets ./run.sh through while the loop goes on, and leaves the one-time proof that it asks for. Raises Denied.

    The proof bears the conversation's id, which the client tells every command that it runs. So it also holds where
    another hook rewrites the command.
    """
    if given.get("command") != "./run.sh":
        raise Denied(RUN_ONLY)
    conversation, why = name_of(call, "session_id"), ""
    with contextlib.suppress(Exception):  # a mistake in program.md, most often: run.sh says which
        from history import History
        from session import SUM_UP, Session, failed_edit

        now = Session.load(conversation)
        if why := now.reason_to_end(History.load() if now.on else None):
            why = f"The loop has ended: {why}. Do not run another experiment: {SUM_UP}."
        why = why or failed_edit(call["transcript_path"], call["tool_use_id"])
    if why:
        raise Denied(why)
    os.makedirs(os.path.join(ROOT, "runs", "session"), exist_ok=True)
    open(os.path.join(ROOT, "runs", "session", f"proof.{conversation}"), "w").close()


def main() -> None:
    try:
        call = json.loads(sys.stdin.buffer.read())
        decision = {"permissionDecision": "allow", "permissionDecisionReason": "within the lock", **check(call)}
    except Denied as e:
        decision = {"permissionDecision": "deny", "permissionDecisionReason": str(e)}
    print(json.dumps({"hookSpecificOutput": {"hookEventName": "PreToolUse", **decision}}))


if __name__ == "__main__":
    main()
