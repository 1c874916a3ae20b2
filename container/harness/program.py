"""Reads program.md, strictly.

program.md is Markdown for people. The harness reads only `key: value` lines directly under `## Settings` and under
each `## Phase N — name`; an empty line after them, or a line of any other kind, ends such a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from project import ROOT, Refused

HEADING = re.compile(r"##\s+(.*\S)\s*$")
PHASE = re.compile(r"Phase\s+(\d+)\s*[—–:-]\s*(\S.*)$", re.I)
PAIR = re.compile(r"(?:[-*]\s+)?([A-Za-z_]+)\s*:\s*(.*?)\s*$")
REFERENCE = "see .claude/README.md, 'program.md'"
MAX_PHASE_NAME = 60  # characters


class ProgramError(Refused):
    """program.md cannot be read; the message names the line and what is wanted."""


@dataclass
class Limits:
    """What ends a phase (`until`) or the loop (`stop`), whichever comes first; None where there is no such limit."""

    experiments: int | None = None
    discards: int | None = None  # in a row
    hours: float | None = None
    clock: str | None = None  # local time, 07:30
    tokens: int | None = None
    usd: float | None = None


@dataclass
class Phase:
    """One phase of the plan; text is all that stands under its heading."""

    number: int
    name: str
    text: str = ""
    until: Limits = field(default_factory=Limits)
    web: list[str] = field(default_factory=list)  # domains
    patience: int = 0  # losers in a row that may be built upon, until train.py is the incumbent again; below 2: none
    changes: str = "one"


@dataclass
class Program:
    """The settings and phases, and the text they were read from."""

    phases: list[Phase]
    text: str = ""
    data: str = "prints"
    metric: str = "mean_rank"
    budget: int = 120  # seconds
    memory: str = "8g"  # as engines write it
    confirm_below: float = 2.0  # sigmas
    stop: Limits = field(default_factory=Limits)  # counted since `start`
    cooldown: int = 0  # seconds
    final_budget: int = 0  # seconds of ./run.sh final; 0: four budgets
    devices: int = 0  # how many experiments may train at once; 0: one for each GPU
    launch: list[str] = field(default_factory=list)  # words before every container's command: srun and its options


@dataclass(frozen=True)
class Key:
    """What a value looks like, how it is read, and what to write instead of one that does not look like that."""

    pattern: str
    parse: Callable
    hint: str


def seconds(text: str) -> int:
    return int(re.match(r"\d+", text)[0])


def size(text: str) -> str:
    return text.replace(" ", "").lower().rstrip("b")


def count(text: str) -> int:
    """'20M' is 20 million."""
    return int(text.rstrip("kM")) * {"k": 10**3, "M": 10**6}.get(text[-1], 1)


AMOUNTS = {"experiments": int, "discards": int, "hours": float, "tokens": count, "usd": float}


def limits(text: str) -> Limits:
    """Read '12 experiments, 07:30'. Raises ValueError."""
    found = Limits()
    for part in text.split(","):
        amount, _, unit = part.strip().partition(" ")
        name = next((name for name in AMOUNTS if unit and name.startswith(unit.lower().rstrip("s"))), "clock")
        if getattr(found, name) is not None:
            raise ValueError("the same unit twice")
        setattr(found, name, AMOUNTS.get(name, str)(amount))
    return found


def several(pattern: str) -> str:
    return rf"{pattern}(\s*,\s*{pattern})*"


SECONDS, POSITIVE_SECONDS = r"\d{1,5}( ?s| seconds)?", r"[1-9]\d{0,4}( ?s| seconds)?"
MEMORY = r"[1-9]\d* ?[Gg][Bb]?|([1-9]\d{3,}|[5-9]\d\d) ?[Mm][Bb]?"
DOMAIN = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}"
EXPERIMENTS, DISCARDS = r"\d+ experiments?", r"\d+ discards?"
CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
UNTIL = rf"({EXPERIMENTS}|{DISCARDS})"
STOP = rf"({EXPERIMENTS}|\d+(\.\d+)? hours?|{CLOCK}|\d+[kM]? tokens?|\d+(\.\d+)? USD)"
SETTINGS = {
    "data": Key(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}", str, "the name of a folder in data/"),
    "metric": Key("mean_rank|median_rank", str, "mean_rank or median_rank"),
    "budget": Key(POSITIVE_SECONDS, seconds, "a whole number from 1 to 99999, in seconds"),
    "memory": Key(MEMORY, size, "a size of at least 500 MB, such as 8 GB"),
    "confirm_below": Key(r"\d+(\.\d+)?", float, "a number of sigmas, such as 2"),
    "stop": Key(several(STOP), limits, "some of '40 experiments, 9.5 hours, 07:30, 20M tokens, 15 USD'"),
    "cooldown": Key(SECONDS, seconds, "a whole number of seconds"),
    "final_budget": Key(SECONDS, seconds, "a whole number of seconds"),
    "devices": Key(r"[1-9]\d?", int, "how many experiments may train at once, 1 to 99"),
    "launch": Key(r"[A-Za-z0-9_./=:,@+% -]{1,200}", str.split, "a command and its options, such as srun --gres=gpu:1"),
}
PHASE_KEYS = {
    "until": Key(several(UNTIL), limits, "'12 experiments', '6 discards', or both with a comma"),
    "web": Key(several(DOMAIN), lambda text: re.split(r"\s*,\s*", text), "domain names, such as arxiv.org, github.com"),
    "patience": Key(r"\d{1,2}", int, "a whole number below 100"),
    "changes": Key("one|many", str, "one or many"),
}


@dataclass
class Section:
    """What stands under one `## heading`, which is on line `number`."""

    number: int
    heading: str
    lines: list[str] = field(default_factory=list)


def sections(text: str) -> list[Section]:
    """The text by its headings of the second level; those in fenced code are text."""
    found, fenced = [Section(0, "")], False
    for number, line in enumerate(text.splitlines(), 1):
        heading = None if fenced else HEADING.match(line)
        if heading:
            found.append(Section(number, heading[1]))
        else:
            found[-1].lines.append(line)
        fenced ^= line.lstrip().startswith(("```", "~~~"))
    return found


def pairs(section: Section, keys: dict[str, Key]) -> dict:
    """The `key: value` lines directly under a heading. Raises ProgramError for an unknown key or a bad value."""
    found: dict = {}
    for number, line in enumerate(section.lines, section.number + 1):
        pair = PAIR.match(line)
        if pair:
            name, value, where = pair[1], pair[2], f"program.md line {number}"
            if name not in keys:
                known = ", ".join(keys)
                raise ProgramError(
                    f"{where}: unknown key '{name}'; known here: {known} (prose goes after an empty line)"
                )
            if name in found:
                raise ProgramError(f"{where}: a second '{name}'")
            try:
                found[name] = keys[name].parse(re.fullmatch(keys[name].pattern, value)[0])
            except (TypeError, ValueError):
                shown = value[:60] or "(empty)"
                raise ProgramError(f"{where}: {name}: {shown}: want {keys[name].hint}") from None
        elif line.strip() or found:  # prose, or an empty line after the first pair, ends the block
            break
    return found


def phase(section: Section, others: list[Phase]) -> Phase:
    """Raises ProgramError."""
    where, m = f"program.md line {section.number}", PHASE.match(section.heading)
    if not m:
        raise ProgramError(f"{where}: want '## Phase N — name', found '## {section.heading[:60]}'")
    if m[2] in [other.name for other in others]:
        raise ProgramError(f"{where}: a second phase named '{m[2]}'; the record tells phases apart by name")
    if len(m[2]) > MAX_PHASE_NAME:
        raise ProgramError(f"{where}: the phase's name is longer than {MAX_PHASE_NAME} characters")
    return Phase(int(m[1]), m[2], "\n".join(section.lines).strip(), **pairs(section, PHASE_KEYS))


def parse(text: str) -> Program:
    """Read the text of program.md. Raises ProgramError."""
    settings: dict | None = None
    phases: list[Phase] = []
    for section in sections(text):
        if section.heading.lower() == "settings":
            if settings is not None:
                raise ProgramError(f"program.md line {section.number}: a second '## Settings'")
            settings = pairs(section, SETTINGS)
        elif section.heading.lower().startswith("phase"):
            phases.append(phase(section, phases))
    if settings is None:
        raise ProgramError(f"program.md: no '## Settings' section; {REFERENCE}")
    if not phases:
        raise ProgramError(f"program.md: no '## Phase 1 — name' section; {REFERENCE}")
    return Program(phases, text, **settings)


def read(path: Path = ROOT / "program.md") -> Program:
    """Read the file. Raises ProgramError, also when it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProgramError(f"{path.name} cannot be read: {error}; put it back: git checkout {path.name}") from None
