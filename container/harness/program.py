"""Reads program.md, strictly.

program.md is Markdown for people. The harness reads only `key: value` lines directly under `## Settings` and under
each `## Phase N — name`; an empty line after them, or a line of any other kind, ends such a block. A line of such a
section that looks like a setting and is not read is a mistake: nobody would notice that it is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from project import DATA_NAME, DATA_NAME_HINT, ROOT, Refused

INVISIBLE = re.compile("[\u200b\u2060\ufeff]")  # what editors and web pages leave: zero-width spaces, a byte order mark
FENCED_OR_COMMENT = re.compile(r"^[ \t]*(```|~~~)[^`\n]*\n.*?^[ \t]*\1|<!--(?:(?!<!--).)*?-->", re.M | re.S)
# Of the second level; some that are read may be of another
HEADING = re.compile(
    r" {0,3}(?:##|#(?=\W*(?:settings\W*$|phase\W*\d))|#{1,6}(?=\W*next experiment\W*$))(?!#)\s*(\S.*)", re.I
)
PHASE = re.compile(r"Phase\s+(\d+)\s*[—–:-]\s*(\S.*)$", re.I)
PAIR = re.compile(r"(?:[-*]\s+)?([A-Za-z_-]+)\s*:\s*(.*?)\s*$")
# The same in other hands: indented, **bold**, `code`, numbered, `final-budget`, `final budget`, an equals sign, ：
LIKE_PAIR = re.compile(r"(?:[^\w#]|_|\d+[.)])*([a-z]+(?:[\s_-][a-z]+)*)[^a-z0-9:=：]*[:=：]\s*(.*?)[\s*_`]*$", re.I)
COMMA = re.compile(r"\s*,\s*")
MAX_PHASE_NAME = 60  # characters

# How values are written; the first group is what is read
SECONDS, POSITIVE_SECONDS = r"(\d{1,5})(?: ?s| seconds)?", r"([1-9]\d{0,4})(?: ?s| seconds)?"
MEMORY = r"([1-9]\d* ?[Gg][Bb]?|(?:[1-9]\d{3,}|[5-9]\d\d) ?[Mm][Bb]?)"
DOMAIN = r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}"
DOMAINS = rf"({DOMAIN}(?:\s*,\s*{DOMAIN})*)"
COMMAND = r"([A-Za-z0-9_./=:,@+% -]{1,200})"

# What limits are written of; the groups are fields of Limits
EXPERIMENTS = r"(?P<experiments>\d{1,9}) experiments?"
UNTIL = re.compile(rf"{EXPERIMENTS}|(?P<discards>\d{{1,9}}) discards?(?: in a row)?")
STOP = re.compile(
    rf"{EXPERIMENTS}|(?P<hours>\d+(?:\.\d+)?) hours?|(?P<clock>(?:[01]\d|2[0-3]):[0-5]\d)"
    r"|(?P<tokens>\d{1,12}[kM]?) tokens?|(?P<usd>\d+(?:\.\d+)?) USD"
)


class ProgramError(Refused):
    """program.md cannot be read; the message names the line and what is wanted."""

    def __init__(self, line: int, what: str):
        super().__init__(f"program.md line {line}: {what}" if line else what)


def setting(default, pattern: str, parse: Callable, hint: str):
    """A field of a dataclass that program.md can set; default: a value, or the class of a new one.

    What the pattern's first group matches is parsed; the hint says what to write instead of anything else.
    """
    how = {"default_factory" if isinstance(default, type) else "default": default}
    return field(metadata={"pattern": pattern, "parse": parse, "hint": hint}, **how)


def size(text: str) -> str:
    return text.replace(" ", "").lower().rstrip("b")


def count(text: str) -> int:
    """'20M' is 20 million."""
    return int(text.replace("k", "000").replace("M", "000000"))


@dataclass
class Limits:
    """What ends a phase (`until`) or the loop (`stop`), whichever comes first; None where there is no such limit."""

    experiments: int | None = None
    discards: int | None = None  # in a row
    hours: float | None = None
    clock: str | None = None  # local time, 07:30
    tokens: int | None = None
    usd: float | None = None


AMOUNTS = {"experiments": int, "discards": int, "hours": float, "clock": str, "tokens": count, "usd": float}


def limits(text: str, unit: re.Pattern = STOP) -> Limits | None:
    """Read '12 experiments, 07:30'; None where it is written in another way, or has a unit twice."""
    found: dict = {}
    for part in COMMA.split(text):
        m = unit.fullmatch(part)
        if not m or m.lastgroup in found:
            return None
        found[m.lastgroup] = AMOUNTS[m.lastgroup](m[m.lastgroup])
    return Limits(**found)


@dataclass
class Phase:
    """One phase of the plan."""

    number: int
    name: str
    until: Limits = setting(
        Limits, "(.*)", partial(limits, unit=UNTIL), "'12 experiments', '6 discards', or both with a comma"
    )
    web: list[str] = setting(list, DOMAINS, COMMA.split, "domain names, such as arxiv.org, github.com")
    # losers in a row that may be built upon, until train.py is the incumbent again; below 2: none
    patience: int = setting(0, r"(\d{1,2})", int, "a whole number below 100")
    changes: str = setting("one", "(one|many)", str, "one or many")


@dataclass
class Program:
    """The settings and phases, and the text they were read from."""

    phases: list[Phase]
    text: str = ""
    data: str = setting("prints", f"({DATA_NAME})", str, f"the name of a folder in data/: {DATA_NAME_HINT}")
    metric: str = setting("mean_rank", "(mean_rank|median_rank)", str, "mean_rank or median_rank")
    budget: int = setting(120, POSITIVE_SECONDS, int, "a whole number from 1 to 99999, in seconds")
    memory: str = setting("8g", MEMORY, size, "a size of at least 500 MB, such as 8 GB")  # as engines write it
    confirm_below: float = setting(2.0, r"(\d+(?:\.\d+)?)", float, "a number of sigmas, such as 2")
    # counted since `start`
    stop: Limits = setting(Limits, "(.*)", limits, "some of '40 experiments, 9.5 hours, 07:30, 20M tokens, 15 USD'")
    cooldown: int = setting(0, SECONDS, int, "a whole number of seconds")
    final_budget: int = setting(0, SECONDS, int, "a whole number of seconds")  # of ./run.sh final; 0: four budgets
    # 0: one for each GPU
    devices: int = setting(0, r"([1-9]\d?)", int, "how many experiments may train at once, 1 to 99")
    # a command that is told of what happens, and of keeps that improve the metric by more than so many percent
    notify: list[str] = setting(list, COMMAND, str.split, "a command and its options, such as /home/me/bin/tell")
    notify_gain: float = setting(5.0, r"(\d{1,2}(?:\.\d+)?)(?: ?%)?", float, "percent, such as 5 %")
    # words before every container's command
    launch: list[str] = setting(list, COMMAND, str.split, "a command and its options, such as srun --gres=gpu:1")


class Section(NamedTuple):
    """What stands under one `## heading`, which is on line `number`."""

    number: int
    heading: str
    lines: list[str]

    @property
    def title(self) -> str:
        """The words of the heading, without marks such as the colon of `## Settings:`."""
        return " ".join(re.findall(r"\w+", self.heading)).lower()


def sections(text: str) -> list[Section]:
    """The text by its headings; fenced code and comments are empty lines."""
    read = FENCED_OR_COMMENT.sub(lambda m: "\n" * m[0].count("\n"), INVISIBLE.sub("", text))
    found = [Section(0, "", [])]
    for number, line in enumerate(read.splitlines(), 1):
        if heading := HEADING.match(line):
            found.append(Section(number, heading[1].rstrip(), []))
        else:
            found[-1].lines.append(line)
    return found


def parsed(text: str, metadata: Mapping):
    """The value of a field with this metadata; None where it is written in another way."""
    m = re.fullmatch(metadata["pattern"], text)
    return metadata["parse"](m[1]) if m else None


def refuse_look_alike(number: int, line: str, known: dict) -> None:
    """Raises ProgramError where a line that is not read seems to be a setting.

    That is one with a key in lower case, as settings are written, or with a value that fits. 'Changes: be brave' is
    prose.
    """
    pair = LIKE_PAIR.match(line)
    name = re.sub(r"[\s-]", "_", pair[1].lower()) if pair else ""
    if name in known and (pair[1].islower() or parsed(pair[2], known[name]) is not None):
        how = f"move it up, directly under the heading, and write it as `{name}: ...`"
        raise ProgramError(number, f"'{name}' is not read: {how}; if it is prose, begin the line in another way")


def pairs(section: Section, kind: type) -> dict:
    """The `key: value` lines directly under a heading, as fields of a dataclass. Raises ProgramError."""
    found: dict = {}
    known = {f.name: f.metadata for f in fields(kind) if f.metadata}
    ended = False
    for number, line in enumerate(section.lines, section.number + 1):
        pair = None if ended else PAIR.match(line)
        if not pair:
            ended = ended or bool(line.strip() or found)  # by prose, or by an empty line after the first pair
            refuse_look_alike(number, line, known)
            continue
        name, value = pair.groups()
        if name not in known:
            here = f"known here: {', '.join(known)} (prose goes after an empty line)"
            raise ProgramError(number, f"unknown key '{name}'; {here}")
        if name in found:
            raise ProgramError(number, f"a second '{name}'")
        found[name] = parsed(value, known[name])
        if found[name] is None:
            raise ProgramError(number, f"{name}: {value[:60] or '(empty)'}: want {known[name]['hint']}")
    return found


def phase(section: Section, others: list[Phase]) -> Phase:
    """Raises ProgramError."""
    m = PHASE.match(section.heading)
    if not m:
        raise ProgramError(section.number, f"want '## Phase N — name', found '## {section.heading[:60]}'")
    if m[2] in [other.name for other in others]:
        raise ProgramError(section.number, f"a second phase named '{m[2]}'; the record tells phases apart by name")
    if len(m[2]) > MAX_PHASE_NAME:
        raise ProgramError(section.number, f"the phase's name is longer than {MAX_PHASE_NAME} characters")
    return Phase(int(m[1]), m[2], **pairs(section, Phase))


def parse(text: str) -> Program:
    """Read the text of program.md. Raises ProgramError."""
    settings: dict | None = None
    phases: list[Phase] = []
    for section in sections(text):
        if section.title == "settings":
            if settings is not None:
                raise ProgramError(section.number, "a second '## Settings'")
            settings = pairs(section, Program)
        elif section.title.startswith("phase"):
            phases.append(phase(section, phases))
    if settings is None or not phases:
        missing = "Settings" if settings is None else "Phase 1 — name"
        raise ProgramError(0, f"program.md: no '## {missing}' section; see .claude/README.md, 'program.md'")
    return Program(phases, text, **settings)


def read(path: Path = ROOT / "program.md") -> Program:
    """Read the file. Raises ProgramError, also when it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProgramError(0, f"{path.name} cannot be read: {error}; put it back: git checkout {path.name}") from None
