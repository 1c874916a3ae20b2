"""What else Claude Code is told on this machine, by the person or a company, as far as it bends the loop.

The project's .claude/settings.json pins what it can. What it cannot is named here, by doctor and to a conversation
that begins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from project import ROOT, read_json, visible

PROJECT, LOCAL = ROOT / ".claude" / "settings.json", ROOT / ".claude" / "settings.local.json"
COMPANY = Path("/etc/claude-code")
EDITED = ("train.py", "scratchpad.md")
READ = (*EDITED, "program.md", "runs/experiments.tsv", "runs/0001.log", "runs/0001.diff", "data/prints/preview.png")
FILE_TOOLS = {"Read": READ, "Edit": EDITED, "Write": EDITED}
# What the agent needs; Task is an older name of Agent, which rules may still have
CALLS = {"Bash": ("./run.sh",), "Agent": ("planner",), "Task": ("planner",), **FILE_TOOLS}
MEMORIES = ("CLAUDE.md", ".claude/CLAUDE.md", "CLAUDE.local.md")  # of every folder above the project's
RULE = re.compile(r"([A-Za-z*]+)(?:\((.*)\))?")
ADDED_UP = {"$schema", "permissions", "hooks", "env"}  # by the client, over all files
# read before any settings of the project's
EARLY = ("env CLAUDE_CODE_SIMPLE", "env CLAUDE_CODE_SAFE_MODE", "env CLAUDE_CODE_COORDINATOR_MODE",
         "env CLAUDE_CODE_SUBPROCESS_ENV_SCRUB")  # fmt: skip
OFF = ("", "0", "false")  # what such a variable may well be set to


@dataclass
class Trouble:
    file: Path
    what: str
    certain: bool  # whether it is known to keep the loop from working

    def __str__(self) -> str:
        remedy = "take it out while the agent works" if self.certain else "should its calls fail or change, look there"
        return f"{self.file}: {visible(self.what)[:200]}; {remedy}"


def troubles() -> Iterator[Trouble]:
    """In all files that the client reads besides the project's own; a company's win over that."""
    person = Path(os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude").expanduser()
    company = [person / "remote-settings.json", COMPANY / "managed-settings.json"]
    company += sorted(COMPANY.glob("managed-settings.d/*.json"))
    for file in (person / "settings.json", LOCAL, *company):
        settings = read_json(file, {})
        yield from (Trouble(file, what, certain=True) for what in bent(settings, file in company))
        yield from (Trouble(file, what, certain=False) for what in helpers(settings) if file != LOCAL)
    above = [folder / name for folder in ROOT.parents for name in MEMORIES]
    elsewhere = [person / "CLAUDE.md", *sorted(person.glob("rules/**/*.md")), COMPANY / "CLAUDE.md"]
    for file in (*elsewhere, *above, ROOT / "CLAUDE.local.md"):
        if file.exists():
            yield Trouble(file, "the agent is told this too", certain=False)


def part(settings: dict, key: str, kind: type):
    """What stands there, if it is of this kind: people write these files by hand."""
    return settings[key] if isinstance(settings.get(key), kind) else kind()


def values(settings: dict) -> dict:
    """Those that the client takes from one file alone, a variable of `env` as "env NAME"."""
    alone = {key: settings[key] for key in sorted(settings.keys() - ADDED_UP)}
    return {**alone, **{f"env {name}": str(value) for name, value in part(settings, "env", dict).items()}}


def bent(settings: dict, wins: bool) -> Iterator[str]:
    """What keeps the loop from working; wins: over the project's settings too."""
    for kind in ("deny", "ask"):  # any file's rules count more than the guard; where nobody is asked, `ask` denies
        for rule in part(part(settings, "permissions", dict), kind, list):
            if hits(str(rule)):
                yield f"permissions.{kind} {rule} denies calls that the agent needs"
    for pattern in part(settings, "claudeMdExcludes", list):
        if fnmatchcase(str(ROOT / "CLAUDE.md"), str(pattern)):
            yield f"claudeMdExcludes {pattern} keeps CLAUDE.md from the agent"
    project = read_json(PROJECT, {})
    mode, ours = part(settings, "permissions", dict).get("defaultMode"), values(project)
    if wins and mode not in (None, part(project, "permissions", dict).get("defaultMode")):
        yield f"permissions.defaultMode {mode} overrides the project's"
    for key, value in values(settings).items():
        if key in EARLY and value.lower() not in OFF:
            yield f"{key} takes the guard, or what it needs, from the agent"
        if wins and value != ours.get(key, value):
            yield f"{key} overrides the project's"
    if wins and settings.get("allowManagedHooksOnly"):
        yield "allowManagedHooksOnly switches the guard and the loop off"


def hits(rule: str) -> bool:
    """Whether a permission rule is about one of the calls that the agent needs."""
    m = RULE.fullmatch(rule.strip())
    tool, pattern = m.groups() if m else ("", None)
    if not pattern:
        return tool in CALLS or tool == "*"
    if tool in FILE_TOOLS:  # //absolute, ~/at home, /relative or ./relative
        pattern = os.path.expanduser(pattern[1:] if pattern.startswith("//") else re.sub(r"^\.?/", "", pattern))
    spelled = [pattern.replace(":*", "*"), pattern.removesuffix(" *"), pattern.rstrip("/") + "/*"]
    return any(fnmatchcase(n, p) for call in CALLS.get(tool, ()) for n in (call, f"{ROOT}/{call}") for p in spelled)


def helpers(settings: dict) -> Iterator[str]:
    """Hooks can deny or rewrite calls; most only look on. And what phases with `web` may do without."""
    for event, hooks in part(settings, "hooks", dict).items():
        commands = re.findall(r'"(?:command|url|prompt)": "((?:[^"\\]|\\.)*)"', json.dumps(hooks))
        yield f"a hook at {event}: {', '.join(commands)}"
    denied = [rule for kind in ("deny", "ask") for rule in part(part(settings, "permissions", dict), kind, list)]
    if web := [str(rule) for rule in denied if str(rule).startswith(("WebFetch", "WebSearch"))]:
        yield f"permissions that deny the web, which phases with `web` want: {', '.join(web)}"
    if settings.get("allowManagedPermissionRulesOnly"):
        yield "allowManagedPermissionRulesOnly leaves the project's rules out"
    if plugins := [name for name, on in part(settings, "enabledPlugins", dict).items() if on]:
        yield f"plugins, perhaps with hooks: {', '.join(plugins)}"


def in_the_way() -> str:
    """All that keeps the loop from working, '' when nothing is known to."""
    return " ".join(f"{trouble}." for trouble in troubles() if trouble.certain)
