"""A conversation with the agent: whether the loop is on in it, what it has used, what ends it. And a night of them.

For the hooks and night.py. runs/session/ID.json holds a Session, beside it ID.usd and ID.tokens what it has used;
runs/night.json holds the Night, and the process that keeps it going holds runs/night.lock. Times are unix seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from subprocess import DEVNULL

from history import History
from project import ROOT, RUNS, Refused, read_json, write_json, write_whole
from record import OURS

SESSIONS, OPEN_CHAIN = RUNS / "session", RUNS / "open-chain"
PLAN, KNOWN_PLAN = ROOT / "program.md", SESSIONS / "program.md"
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after every start of the machine
NIGHT, NIGHT_LOCK = RUNS / "night.json", RUNS / "night.lock"
FORMATS = {"experiments": "d", "hours": ".1f", "tokens": ",d", "usd": ".2f"}  # of what program.md's `stop` limits
SUM_UP = "sum up in scratchpad.md in a few lines what was learned and what to try next, then end your turn"
END_CHAIN_S = 15
TRANSCRIPT_TAIL, LOOKS = 1 << 19, 25  # bytes that are looked at, and how often: the client writes it 70 ms late
TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens")  # what the cache gave is not counted


def load(kind: type, file: Path, **default):
    """A dataclass as write_json left it; its defaults where the file is missing or damaged."""
    known = read_json(file, {})
    return kind(**{**default, **{f.name: known[f.name] for f in fields(kind) if f.name in known}})


def seconds_up() -> float:
    """A clock that nobody sets: seconds since the machine started, its sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass
class Counter:
    """How far a number of the client's has risen in all. It starts anew after a resume or a compaction."""

    last: float = 0
    risen: float = 0

    @classmethod
    def update(cls, file: Path, now: float) -> float:
        """Keep what the number is now; returns what it has risen in all."""
        before = load(cls, file)
        after = cls(now, before.risen + max(0, now - before.last))
        if after != before:
            write_json(file, asdict(after))
        return after.risen


@dataclass
class Span:
    """From when on a loop counts, and the hour at which it ends."""

    since: float = 0.0
    up: float = 0.0  # seconds_up() at that time
    boot: str = ""  # which start of the machine `up` counts from
    after: int = 0  # experiments with a higher number count
    clock: str = ""  # HH:MM at which the person wants the night to end

    @classmethod
    def now(cls, **more):
        return cls(since=time.time(), up=seconds_up(), boot=BOOT.read_text(), **more)

    @property
    def began(self) -> float:
        """`since`, by the clock as it is now: it may have been set."""
        if self.boot == BOOT.read_text():
            return time.time() - max(0, seconds_up() - self.up)
        return min(self.since, time.time())


@dataclass
class Night(Span):
    stop: str = ""  # why no further experiment may begin
    tokens: int = 0  # of the conversations that have ended
    usd: float = 0.0  # likewise
    cost_unknown: int = 0  # conversations that did not say what they cost
    conversations: int = 0
    pid: int = 0  # of its keeper
    log: int = 0  # byte of night.log at which it begins
    status: int | None = None  # exit status, once it is over


def current_night() -> Night | None:
    """The night under way in this worktree."""
    with contextlib.suppress(OSError), NIGHT_LOCK.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return load(Night, NIGHT)
    return None


@dataclass
class Session(Span):
    id: str = ""
    transcript: str = ""  # the client's file
    on: bool = False
    stopped: bool = False  # by a person, who has not typed anything since
    fault: str = ""  # of the model's provider, which ended the turn: the loop stands still
    seen: int = 0  # newest experiment at the end of the last turn
    idle: int = 0  # turns in a row without an experiment
    tokens_before: int = 0  # used before `start`, less what the night had used by then
    usd_before: float = 0.0  # likewise

    @classmethod
    def load(cls, conversation="") -> Session:
        """By the id that the client gives with every hook call, and to every command that it runs."""
        ident = re.sub(r"[^A-Za-z0-9_-]", "", str(conversation or os.environ.get("CLAUDE_CODE_SESSION_ID", "")))[:100]
        return load(cls, SESSIONS / f"{ident}.json", id=ident)

    def save(self) -> None:
        write_json(SESSIONS / f"{self.id}.json", asdict(self))

    def start(self, night: Night | None, newest: int) -> None:
        """The loop is on, and everything counts from here; in a night, from where that began."""
        night = night or Night.now(after=newest)
        self.on, self.stopped, self.idle, self.seen = True, False, 0, newest
        for field in fields(Span):
            setattr(self, field.name, getattr(night, field.name))
        self.tokens_before, self.usd_before = self.tokens() - night.tokens, self.usd() - night.usd

    def usd(self) -> float:
        """What the conversation cost so far; 0 without a terminal, whose status line is told."""
        return load(Counter, SESSIONS / f"{self.id}.usd").risen

    def note_cost(self, usd: float) -> None:
        """What the status line is told that the conversation cost."""
        Counter.update(SESSIONS / f"{self.id}.usd", usd)

    def transcripts(self) -> list[Path]:
        """Of the conversation and its subagents, as the client writes them."""
        if not self.transcript:
            return []
        main = Path(self.transcript)
        return [file for file in (main, *main.with_suffix("").glob("subagents/*.jsonl")) if file.is_file()]

    def tokens(self) -> int:
        """Of all messages, those of a transcript that was replaced too; one is written once for each of its blocks."""
        used: dict[str, int] = {}
        lines = (line for file in self.transcripts() for line in file.read_bytes().splitlines() if b'"usage"' in line)
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # half-written, or no message
                message = json.loads(line)["message"]
                n = sum(message["usage"].get(kind) or 0 for kind in TOKENS)
                used[message["id"]] = max(n, used.get(message["id"], 0))
        counter = SESSIONS / f"{self.id}.tokens"
        return Counter.update(counter, sum(used.values())) if used else load(Counter, counter).risen

    def used(self, history: History) -> dict:
        """{unit: (used since start, limit)} of everything that program.md's `stop` limits."""
        stop = history.program.stop
        used = {
            "experiments": sum(r.number > self.after for r in history.tried_here),
            "hours": (time.time() - self.began) / 3600,
            "tokens": self.tokens() - self.tokens_before,
            "usd": self.usd() - self.usd_before,
        }
        return {unit: (n, getattr(stop, unit)) for unit, n in used.items() if getattr(stop, unit) is not None}

    def progress(self, history: History) -> str:
        """' Since start 12 of 100 experiments, 3.2 of 9.5 hours.', '' without such a limit."""
        near = [amount(unit, n, f" of {limit:{FORMATS[unit]}}") for unit, (n, limit) in self.used(history).items()]
        return f" Since start {', '.join(near)}." if near else ""

    def reason_to_end(self, history: History | None) -> str:
        """Why no further experiment may begin; '' while one may, and where the loop was never on.

        history: needed only while the loop is on.
        """
        if self.stopped or not self.on:
            return "the person said stop" if self.stopped else ""
        night, stop = current_night(), history.program.stop
        if night and night.up == self.up and night.stop:
            return night.stop
        for clock, source in ((self.clock, "the person said"), (stop.clock, "program.md's `stop` says")):
            if clock and time.time() >= next_time(clock, self.began):
                return f"it is {clock}, as {source}"
        for unit, (n, limit) in self.used(history).items():
            if n >= limit:
                return f"{amount(unit, n)} since start, as program.md's `stop` says"
        return "" if history.phase else "all phases of program.md are done"


def amount(unit: str, n: float, of: str = "") -> str:
    return f"{n:{FORMATS[unit]}}{of} {'USD' if unit == 'usd' else unit}"


def next_time(clock: str, since: float) -> float:
    """The first HH:MM, local time, after `since`."""
    day, (hour, minute) = time.localtime(since), map(int, clock.split(":"))
    today, tomorrow = (time.mktime((*day[:2], day.tm_mday + n, hour, minute, 0, 0, 0, -1)) for n in (0, 1))
    return today if today > since else tomorrow


def end_chain() -> None:
    """An open chain ends with the loop, at once or, as OPEN_CHAIN asks, at a later hook. Holds up nobody for long."""
    with contextlib.suppress(subprocess.SubprocessError, OSError, Refused):
        OPEN_CHAIN.touch()
        if History.load().link:
            subprocess.check_output([ROOT / "run.sh", "end-chain"], stdin=DEVNULL, stderr=DEVNULL, timeout=END_CHAIN_S)
        OPEN_CHAIN.unlink()


def used_in_all() -> str:
    """By all conversations here, as far as the client told, which the hooks noted."""
    used = {unit: sum(load(Counter, f).risen for f in SESSIONS.glob(f"*.{unit}")) for unit in ("tokens", "usd")}
    return ", ".join(amount(unit, n) for unit, n in used.items() if n)


def failed_edit(transcript: str, run: str) -> str:
    """What to tell of edits that failed since the ./run.sh before the call `run`, '' without one."""
    failed: dict[str, tuple] = {}
    for answer, name, result in edits(transcript, run):
        if result.get("is_error"):
            failed[name] = answer, re.sub(r"</?tool_use_error>|\s+", " ", str(result.get("content")))[:150].strip()
        elif name in failed and failed[name][0] != answer:  # else it was made before the failure was seen
            del failed[name]
    which = ", ".join(f"{name} ({why})" for name, (_, why) in failed.items())
    return which and f"Nothing ran: since the last run an edit failed, of {which}. Make it again, then run ./run.sh."


def edits(transcript: str, run: str) -> list[tuple]:
    """(answer, file, result) of each, also where the client asked no hook, since the string was not in the file."""
    for _ in range(LOOKS):
        with open(transcript, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TRANSCRIPT_TAIL))
            lines = [line for line in file if b'"tool_' in line]
        blocks, found = [], []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half-written, or no message
                message = json.loads(line)["message"]
                blocks += [(message.get("id"), block) for block in message["content"] if type(block) is dict]
        results = {block.get("tool_use_id"): block for _, block in blocks}
        for answer, block in blocks:
            if block.get("id") == run and all(result for *_, result in found):
                return found
            given = block.get("input") if type(block.get("input")) is dict else {}
            found = [] if given.get("command") == "./run.sh" else found
            name = os.path.basename(str(given.get("file_path", OURS[0])).strip())
            if block.get("name") in ("Edit", "Write") and name in OURS:
                found.append((answer, name, results.get(block["id"], {})))
        time.sleep(0.02)
    return []


def progressed(history: History, after: int) -> bool:
    """Whether anything was judged since that experiment. A machine, or HEAD's own train.py, is for a person to fix."""
    return any(r.number > after and r.verdict not in ("unmeasured", "lost") for r in history.own(history.records))


def plan_has_changed() -> bool:
    """Whether program.md is not what the agent last knew. From now on it knows this one."""
    now, known = (file.read_bytes() if file.exists() else b"" for file in (PLAN, KNOWN_PLAN))
    if now != known:
        write_whole(KNOWN_PLAN, now)
    return bool(known) and now != known
