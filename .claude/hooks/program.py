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
UNITS = {"experiment": "experiments", "discard": "discards", "hour": "hours"}
DOMAIN = re.compile(r"(?=.{4,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}")


class ProgramError(ValueError):
    """program.md cannot be read; the message names the line and what is wanted."""


@dataclass
class Phase:
    """One phase of the plan. until: {"experiments": n, "discards": n}, either of which ends it; {} never ends."""

    number: int
    name: str
    until: dict = field(default_factory=dict)
    web: list = field(default_factory=list)
    patience: int = 0
    changes: str = "one"


@dataclass
class Program:
    """The settings and phases. Sizes in engine notation, times in seconds, confirm_below in sigmas."""

    phases: list
    data: str = "prints"
    metric: str = "mean_rank"
    budget: int = 120
    memory: str = "8g"
    confirm_below: float = 2.0
    stop: dict = field(default_factory=dict)
    cooldown: int = 0


def whole(low: int, high: int):
    def parse(text: str) -> int:
        m = re.fullmatch(r"(\d+)\s*(s|seconds)?", text)
        if not m or not low <= int(m[1]) <= high:
            raise ValueError(f"want a whole number from {low} to {high}")
        return int(m[1])

    return parse


def number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError("want a number, such as 2")
    return float(text)


def one_of(*choices: str):
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("want " + " or ".join(choices))
        return text

    return parse


def matching(pattern: str, want: str):
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"want {want}")
        return text

    return parse


def memory(text: str) -> str:
    m = re.fullmatch(r"(\d+)\s*([GgMm])[Bb]?", text)
    if not m or int(m[1]) * (1024 if m[2] in "Gg" else 1) < 512:
        raise ValueError("want a size of at least 512 MB, such as 8 GB")
    return m[1] + m[2].lower()


def amounts(*units: str):
    """'12 experiments, 6 discards' -> {"experiments": 12, "discards": 6}."""

    def parse(text: str) -> dict:
        found = {}
        for part in text.split(","):
            m = re.fullmatch(r"(\d+(?:\.\d+)?)\s+([a-z]+)", part.strip())
            unit = UNITS.get(m[2].rstrip("s")) if m else None
            if unit not in units or unit in found or (unit != "hours" and "." in m[1]):
                raise ValueError("want " + " or ".join(f"'12 {u}'" for u in units) + ", separated by a comma")
            found[unit] = float(m[1]) if unit == "hours" else int(m[1])
        return found

    return parse


def domains(text: str) -> list:
    found = [d.strip() for d in text.split(",")]
    if not all(DOMAIN.fullmatch(d) for d in found):
        raise ValueError("want domain names separated by commas, such as arxiv.org, github.com")
    return found


SETTINGS = {
    "data": matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", "the name of a folder in data/"),
    "metric": one_of("mean_rank", "median_rank"),
    "budget": whole(1, 86400),
    "memory": memory,
    "confirm_below": number,
    "stop": amounts("experiments", "hours"),
    "cooldown": whole(0, 86400),
}
PHASE_KEYS = {
    "until": amounts("experiments", "discards"),
    "web": domains,
    "patience": whole(0, 100),
    "changes": one_of("one", "many"),
}


def parse(text: str) -> Program:
    """Read the text of program.md. Raises ProgramError."""
    settings, phases, target, keys, seen_settings = {}, [], None, {}, False
    fenced = False
    for n, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced, target = not fenced, None
        elif fenced:
            continue
        elif heading := HEADING.match(line):
            target = None
            if heading[1].lower() == "settings":
                if seen_settings:
                    raise ProgramError(f"program.md line {n}: a second '## Settings'")
                seen_settings, target, keys = True, settings, SETTINGS
            elif heading[1].lower().startswith("phase"):
                target, keys = {}, PHASE_KEYS
                phases.append(target)
                target["heading"] = phase_heading(heading[1], n, [p["heading"][1] for p in phases[:-1]])
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
    built = [Phase(*p.pop("heading"), **p) for p in phases]
    return Program(built, **settings)


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
        raise ProgramError(f"program.md line {n}: unknown key '{key}'; known here: {', '.join(keys)} "
                           "(prose goes after an empty line)")
    if key in target:
        raise ProgramError(f"program.md line {n}: a second '{key}'")
    try:
        target[key] = keys[key](value)
    except ValueError as e:
        raise ProgramError(f"program.md line {n}: {key}: {value[:60] or '(empty)'}: {e}") from None


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
