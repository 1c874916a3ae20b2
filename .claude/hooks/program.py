#!/usr/bin/env python3
"""Reads program.md, strictly. Host side, standard library only.

usage: program.py [FILE]      print the settings and phases as JSON; exit 2 with a line-numbered error

program.md is Markdown for people. The harness reads only `key: value` lines directly under `## Settings` and under
each `## Phase N — name`; an empty line after them, or a line of any other kind, ends such a block.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEADING = re.compile(r"##\s+(.*\S)\s*$")
PHASE = re.compile(r"Phase\s+(\d+)\s*[—–:-]\s*(\S.*)$")
PAIR = re.compile(r"(?:[-*]\s+)?([A-Za-z_]+)\s*:\s*(.*?)\s*$")


class ProgramError(ValueError):
    """program.md cannot be read; the message names the line and what is wanted."""


@dataclass
class Phase:
    """One phase of the plan. until: {"experiments": n, "discards": n}, either of which ends it; {} never ends.

    text: all that stands under its heading. patience: how many experiments in a row may lose, each built on the one
    before, until train.py is the incumbent again; below 2 none is built upon.
    """

    number: int
    name: str
    text: str = ""
    until: dict = field(default_factory=dict)
    web: list = field(default_factory=list)
    patience: int = 0
    changes: str = "one"


@dataclass
class Program:
    """The settings and phases. Sizes in engine notation, times in seconds, confirm_below in sigmas.

    stop: {"experiments": n, "hours": h, "clock": "07:30", "tokens": n, "usd": x}, any of which ends the loop.
    """

    phases: list
    data: str = "prints"
    metric: str = "mean_rank"
    budget: int = 120
    memory: str = "8g"
    confirm_below: float = 2.0
    stop: dict = field(default_factory=dict)
    cooldown: int = 0
    final_budget: int = 0  # of ./run.sh final; 0: four times the budget
    devices: int = 0  # how many experiments may train at once; 0: one for each GPU
    launch: list = field(default_factory=list)  # words before every container's command: srun and its options


def amounts(text: str) -> dict:
    """'12 experiments, 6 discards' -> {"experiments": 12, "discards": 6}; hours and USD may be fractions."""
    found = {}
    for part in (p.strip() for p in text.split(",")):
        n, _, unit = part.partition(" ")
        key = unit.strip().rstrip("s").lower() + "s" if unit else "clock"
        key = {"usds": "usd"}.get(key, key)
        if key in found:
            raise ValueError("the same unit twice")
        scale = {"k": 10**3, "M": 10**6}.get(n[-1], 1)
        found[key] = n if key == "clock" else float(n) if key in ("hours", "usd") else int(n.rstrip("kM")) * scale
    return found


def several(amount: str) -> str:
    return rf"{amount}(\s*,\s*{amount})*"


COUNT, DISCARDS, HOURS = r"\d+ experiments?", r"\d+ discards?", r"\d+(\.\d+)? hours?"
CLOCK, TOKENS, COST = r"([01]\d|2[0-3]):[0-5]\d", r"\d+[kM]? tokens?", r"\d+(\.\d+)? USD"
DOMAIN = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}"
SECONDS = (r"\d{1,5}( ?s| seconds)?", lambda t: int(re.match(r"\d+", t)[0]))
# key: what a value looks like, how it is read, what to say when it does not
SETTINGS = {
    "data": (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", str, "the name of a folder in data/"),
    "metric": (r"mean_rank|median_rank", str, "mean_rank or median_rank"),
    "budget": (r"[1-9]" + SECONDS[0].replace("1,5", "0,4"), SECONDS[1], "a whole number from 1 to 99999, in seconds"),
    "memory": (
        r"[1-9]\d* ?[Gg][Bb]?|([1-9]\d{3,}|[5-9]\d\d) ?[Mm][Bb]?",
        lambda t: t.replace(" ", "").lower().rstrip("b"),
        "a size of at least 500 MB, such as 8 GB",
    ),
    "confirm_below": (r"\d+(\.\d+)?", float, "a number of sigmas, such as 2"),
    "stop": (
        several(f"({COUNT}|{HOURS}|{CLOCK}|{TOKENS}|{COST})"),
        amounts,
        "some of '40 experiments, 9.5 hours, 07:30, 20M tokens, 15 USD'",
    ),
    "cooldown": (*SECONDS, "a whole number of seconds"),
    "final_budget": (*SECONDS, "a whole number of seconds"),
    "devices": (r"[1-9]\d?", int, "how many experiments may train at once, 1 to 99"),
    "launch": (r"[A-Za-z0-9_./=:,@+% -]{1,200}", str.split, "a command and its options, such as srun --gres=gpu:1"),
}
PHASE_KEYS = {
    "until": (several(f"({COUNT}|{DISCARDS})"), amounts, "'12 experiments', '6 discards', or both with a comma"),
    "web": (several(DOMAIN), lambda t: re.split(r"\s*,\s*", t), "domain names, such as arxiv.org, github.com"),
    "patience": (r"\d{1,2}", int, "a whole number below 100"),
    "changes": (r"one|many", str, "one or many"),
}


def parse(text: str) -> Program:
    """Read the text of program.md. Raises ProgramError."""
    settings, phases, target, keys, seen_settings = {}, [], None, {}, False
    fenced, section = False, []
    for n, line in enumerate(text.splitlines(), 1):
        heading = not fenced and HEADING.match(line)
        if heading:
            section = []
        else:
            section.append(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced, target = not fenced, None
        elif fenced:
            continue
        elif heading:
            target = None
            if heading[1].lower() == "settings":
                if seen_settings:
                    raise ProgramError(f"program.md line {n}: a second '## Settings'")
                seen_settings, target, keys = True, settings, SETTINGS
            elif heading[1].lower().startswith("phase"):
                target, keys = {}, PHASE_KEYS
                phases.append(target)
                target["heading"] = (*phase_heading(heading[1], n, [p["heading"][1] for p in phases[:-1]]), section)
        elif target is not None and line.strip():
            pair = PAIR.match(line)
            if pair:
                take(target, keys, pair[1], pair[2], n)
            target = target if pair else None  # prose: the block has ended
        elif target and set(target) != {"heading"}:
            target = None  # so does an empty line after the first pair
    if not seen_settings:
        raise ProgramError("program.md: no '## Settings' section; see README, 'program.md'")
    if not phases:
        raise ProgramError("program.md: no '## Phase 1 — name' section; see README, 'program.md'")
    built = [(*p.pop("heading"), p) for p in phases]
    return Program([Phase(n, name, "\n".join(lines).strip(), **p) for n, name, lines, p in built], **settings)


def phase_heading(text: str, n: int, names: list) -> tuple:
    m = PHASE.match(text)
    if not m:
        raise ProgramError(f"program.md line {n}: want '## Phase N — name', found '## {text[:60]}'")
    name = m[2].strip()
    if name in names:
        raise ProgramError(f"program.md line {n}: a second phase named '{name}'; the record tells phases apart by name")
    if len(name) > 60:
        raise ProgramError(f"program.md line {n}: the phase's name is longer than 60 characters")
    return int(m[1]), name


def take(target: dict, keys: dict, key: str, value: str, n: int) -> None:
    """Store one `key: value` line. Raises ProgramError for an unknown key, a second one, or a bad value."""
    if key not in keys:
        raise ProgramError(
            f"program.md line {n}: unknown key '{key}'; known here: {', '.join(keys)} (prose goes after an empty line)"
        )
    if key in target:
        raise ProgramError(f"program.md line {n}: a second '{key}'")
    pattern, convert, want = keys[key]
    try:
        target[key] = convert(re.fullmatch(pattern, value)[0])
    except (TypeError, ValueError):
        raise ProgramError(f"program.md line {n}: {key}: {value[:60] or '(empty)'}: want {want}") from None


def read(path: Path) -> Program:
    """Read a file. Raises ProgramError, also when it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ProgramError(f"{path.name}: cannot be read: {e}") from None


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(read(Path(sys.argv[1] if len(sys.argv) > 1 else "program.md"))), indent=1))
    except ProgramError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
