"""The record: what was tried, what the incumbent is, and the rule that keeps or discards. Standard library only.

Every attempt is a commit under refs/experiments/<n>; its message carries, as trailers, all that later decisions
need, so one git call reads the whole history. Nothing else is stored: phase, incumbent and noise follow from it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import program  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PRIOR_SIGMA, PRIOR_RUNS = 0.04, 2  # noise of log(metric) before anything was run twice: 4 %, worth two runs
WILD = 4  # sigmas so far: what lies further apart counts as this much
MARGIN = 0.25  # sigmas by which a candidate must win, seen once or twice
REMEASURE_AFTER = 10  # discards in a row
MAX_INCUMBENT_RUNS = 4
PLAN_AFTER = 5  # discards in a row; and at the start of a phase
ASK = "ask the planner (Agent, subagent_type planner), then "
RENAMED = 0.6  # likeness of the texts of two phases from which on one is the other under a new name
COUNTED = ("kept", "discarded", "failed")  # what a phase and `stop` count
DATA_FORMAT = 2  # of info.json, as prepare_data.py writes it
SEEN = ROOT / "runs" / "data.json"  # the data files whose content was found to be right
PLAN, TOLD = ROOT / "program.md", ROOT / "runs" / "session" / "program.md"  # the plan, and as the agent last saw it
MADE_OF = ("container/judge.py", "container/stage.py", "container/seccomp.json")  # the judge, for comparability
CHAIN = re.compile(r"(\d+) of (\d+) on ([0-9a-f]{9})(, goes on)?")
TRAILER = re.compile(r"([A-Z][A-Za-z-]*): (.*)")
SERIES = {"mean_rank": "Mean-Rank-Runs", "median_rank": "Median-Rank-Runs"}
# as in run.sh: nothing that planted settings or variables could make git run
GIT = (
    "git",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "log.showSignature=false",
    "-c",
    "protocol.allow=never",
    "--no-pager",
)
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}


class Refused(Exception):
    """Nothing ran; the message says why and what to do next."""


@dataclass
class Record:
    """One attempt: its number, its time, and the trailers of its commit's message."""

    n: int
    when: int
    trailers: dict

    def __getattr__(self, name: str) -> str:
        """record.verdict, .hypothesis, .phase, .train (blob), .change, .branch, .chain, ...; '' when absent."""
        return self.trailers.get(name.capitalize(), "")

    def values(self, metric: str) -> list:
        """The metric of every run, in the order they ran; [] for a failure."""
        return [float(x) for x in self.trailers.get(SERIES[metric], "").split()]

    @property
    def percent(self) -> float:
        """The change of the metric in percent; negative is better."""
        m = re.match(r"[+-]?\d+(\.\d+)?", self.change)
        return float(m[0]) if m else 0.0


def git(*args: str, check: bool = True) -> str:
    """git without hooks and monitors; returns stdout. Raises Refused when it fails."""
    done = subprocess.run(
        [*GIT, *args],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode and check:
        raise Refused(f"git {args[0]} failed: {done.stderr.strip()[:200]}")
    return done.stdout


def parse(n: str, when: str, message: str) -> Record:
    body = message.partition("\n\n")[2]  # the subject is a hypothesis, which may look like a trailer
    return Record(int(n), int(when), {m[1]: m[2].strip() for m in map(TRAILER.fullmatch, body.splitlines()) if m})


def records() -> list:
    """All attempts by number. A clone without refs/experiments still finds the newest that its branch carries."""
    fmt = "%(refname:lstrip=2)%09%(committerdate:unix)%09%(contents)%00"
    entries = git("for-each-ref", f"--format={fmt}", "refs/experiments/").split("\0")
    split = (entry.lstrip("\n").split("\t", 2) for entry in entries if entry.strip())
    found = {int(n): parse(n, when, message) for n, when, message in split if n.isdigit()}
    kept = git("log", "-1", "--format=%ct%x09%B", "HEAD", "--", "train.py", check=False)
    m = re.search(r"^Experiment: (\d+)$", kept, re.M)
    if m and int(m[1]) not in found:
        found[int(m[1])] = parse(m[1], *kept.split("\t", 1))
    return [found[n] for n in sorted(found)]


def sigma(groups: list) -> float:
    """Standard deviation of log(metric) of one run, pooled over everything run more than once, with a prior.

    One candidate that diverged in its second run would otherwise make it ten times as large, and nothing be kept.
    """
    total, weight = PRIOR_RUNS * PRIOR_SIGMA**2, PRIOR_RUNS
    for values in filter(None, groups):
        logs = [math.log(v) for v in values]
        mean = sum(logs) / len(logs)
        more = len(logs) - 1
        total += min(sum((x - mean) ** 2 for x in logs), WILD**2 * more * total / weight)
        weight += more
    return math.sqrt(total / weight)


def geometric(values: list) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def gain(candidate: list, incumbent: list) -> float:
    """How much lower the candidate's mean of log(metric) is: 0.1 is about 10 %."""
    return math.log(geometric(incumbent) / geometric(candidate))


def rule(candidate: list, incumbent: list, s: float, confirm_below: float) -> str:
    """The keep rule: 'kept', 'discarded', or 'again' for a small gain seen once.

    Discard below 0.25 sigma, keep at once at confirm_below sigmas, otherwise ask for a second run and keep when the
    mean of the two still wins by 0.25 sigma. tests/test_rule.py simulates it: half the bias of 'any lower number'.
    """
    sigmas = gain(candidate, incumbent) / s
    if sigmas < MARGIN:
        return "discarded"
    return "kept" if sigmas >= confirm_below or len(candidate) > 1 else "again"


class State:
    """Everything that follows from program.md, git, the data and the image."""

    def __init__(self, image: str = ""):
        """image: what would run; without it (hooks) what the newest record was compared with is today's."""
        self.image, self.plan = image, program.read(Path(os.environ.get("AR_PLAN", PLAN)))
        self.all = records()
        self.newest = self.all[-1].n if self.all else 0
        self.data = data_folder(self.plan.data)
        self.branch = git("symbolic-ref", "--short", "-q", "HEAD", check=False).strip() or "detached"
        newest = [*reversed(self.own(self.all)), *reversed(self.all)]  # this branch's own settings, if it ever ran
        self.comparable = (
            comparable(self.plan, self.data, image)
            if image
            else next((r.comparable for r in newest if r.comparable), "")
        )
        self.mine = [r for r in self.all if r.comparable == self.comparable]
        self.counted = [r for r in self.mine if r.verdict in COUNTED and "By-Hand" not in r.trailers]
        self.head_blob = git("rev-parse", "HEAD:train.py", check=False).strip()
        self.here = self.own(self.counted)
        self.tried = [r for r in self.own(self.all) if r.verdict in COUNTED and "By-Hand" not in r.trailers]
        self.groups: dict = {}  # every run of a train.py, by its blob
        for r in self.mine:
            self.groups.setdefault(r.train, []).extend(self.values(r))
        self.incumbent = self.groups.get(self.head_blob, [])
        self.sigma = sigma(list(self.groups.values()))

    def own(self, rows: list) -> list:
        """Those of this branch: worktrees share the record."""
        return [r for r in rows if r.branch in ("", self.branch)]

    def values(self, r: Record) -> list:
        return r.values(self.plan.metric)

    def in_phase(self, name: str) -> list:
        return [r for r in self.counted if self.renamed.get(r.phase, r.phase) == name]

    @functools.cached_property
    def renamed(self) -> dict:
        """Old name -> new name of a phase: the record's plan of then has the text that stands under the new name."""
        names, found = [p.name for p in self.plan.phases], {}
        for r in {r.phase: r for r in self.counted if r.phase and r.phase not in names}.values():
            try:
                old = program.parse(git("cat-file", "blob", f"refs/experiments/{r.n}:experiment/program.md"))
            except (Refused, program.ProgramError):
                continue
            text = next((prose(p) for p in old.phases if p.name == r.phase), "")
            new = [p for p in self.plan.phases if p.name not in [o.name for o in old.phases]]
            likeness = {p.name: difflib.SequenceMatcher(None, text, prose(p)).ratio() for p in new if prose(p)}
            found |= {r.phase: max(likeness, key=likeness.get)} if max(likeness.values(), default=0) > RENAMED else {}
        return found

    def discards_in_a_row(self, rows: list) -> int:
        """Counted from the newest; a failure counts, a keep ends it."""
        return next((i for i, r in enumerate(reversed(rows)) if r.verdict == "kept"), len(rows))

    @property
    def phase(self) -> program.Phase | None:
        """The first phase, in file order, whose `until` is not met; None when all are."""
        for p in self.plan.phases:
            rows = self.in_phase(p.name)
            if len(rows) < p.until.get("experiments", math.inf) and self.discards_in_a_row(rows) < p.until.get(
                "discards", math.inf
            ):
                return p
        return None

    def phase_line(self) -> str:
        p = self.phase
        if not p:
            return "all phases of program.md are done"
        of = p.until.get("experiments")
        chain = f", chain {self.link} of at most {p.patience}" if self.link else ""
        return (
            f"{self.plan.phases.index(p) + 1} of {len(self.plan.phases)} ({p.name}), "
            f"{len(self.in_phase(p.name))}{f' of {of}' if of else ''} experiments{chain}"
        )

    def best_line(self) -> str:
        if not self.incumbent:
            return "not measured yet"
        now = geometric(self.incumbent)
        first = next((geometric(self.values(r)) for r in self.mine if r.verdict == "baseline"), now)
        return (
            f"{show(now)} ({(now / first - 1) * 100:+.1f} % since the baseline {show(first)}; "
            f"noise {self.sigma * 100:.1f} % a run)"
        )

    @property
    def link(self) -> int:
        """How many losers in a row train.py is built on: a phase with `patience` does not go back at once."""
        m = CHAIN.fullmatch(self.here[-1].chain) if self.here else None
        return int(m[1]) if m and m[4] and m[3] == self.head_blob[:9] else 0

    def planner_is_due(self) -> bool:
        p = self.phase
        rows = self.own(self.in_phase(p.name)) if p else []
        return bool(p) and self.discards_in_a_row(rows) % PLAN_AFTER == 0 and (not rows or rows[-1].verdict != "kept")

    def better_elsewhere(self) -> str:
        """A line on the best of another branch, if it beats the incumbent; '' if none does."""
        others = [
            r for r in self.mine if r.verdict == "kept" and r.branch not in ("", self.branch) and self.groups[r.train]
        ]  # kept by hand: perhaps never measured here
        best = min(others, key=lambda r: geometric(self.groups[r.train]), default=None)
        if not best or not self.incumbent or geometric(self.groups[best.train]) >= geometric(self.incumbent):
            return ""
        return (
            f"experiment {best.n} on branch {best.branch} has {show(geometric(self.groups[best.train]))}; a person "
            f"takes it over with ./run.sh keep {best.n}"
        )

    def incumbent_is_due(self) -> bool:
        """After every ten discards in a row the incumbent runs again, up to four runs: it may have been lucky."""
        rows = self.own([r for r in self.mine if r.verdict in ("kept", "discarded", "remeasured", "unmeasured")])
        row = self.discards_in_a_row([r for r in rows if r.verdict in ("kept", "discarded")])
        # once, whether it succeeded or not: one that fails now must not keep every later candidate from running
        return (
            row > 0
            and row % REMEASURE_AFTER == 0
            and rows[-1].verdict in ("kept", "discarded")
            and len(self.incumbent) < MAX_INCUMBENT_RUNS
        )


def prose(p: program.Phase) -> str:
    """A phase's text without its keys: two short phases are alike by those alone."""
    pairs = ((line, program.PAIR.match(line)) for line in p.text.splitlines())
    return "\n".join(line for line, pair in pairs if not pair or pair[1] not in program.PHASE_KEYS).strip()


def data_folder(name: str) -> Path:
    """data/<name> beside the main worktree's .git, so that all worktrees share it."""
    return Path(git("rev-parse", "--path-format=absolute", "--git-common-dir").strip()).parent / "data" / name


def intact(name: str, data: Path) -> str:
    """The hash of a data set, every file of which is what info.json says. Raises Refused.

    Sizes are looked at every time, content only where a file is not the very one that was read before: 0.3 ms for the
    8,000 prints, and 0.3 s the first time.
    """
    remedy = f"move it away and run ./run.sh data {name} in a terminal"
    try:
        info = json.loads((data / "info.json").read_text())
        if info["format"] != DATA_FORMAT:
            raise Refused(f"data/{name} was made by another version of prepare_data.py: {remedy}")
        content, files = info["hash"], [(f, int(size), digest) for f, (size, digest) in info["files"].items()]
    except FileNotFoundError:
        raise Refused(f"data/{name}/info.json is missing: run ./run.sh data {name} in a terminal") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"data/{name}/info.json is damaged: {remedy}") from None
    try:
        seen = json.loads(SEEN.read_text())
    except (OSError, ValueError):
        seen = {}
    now = {}
    for f, size, digest in files:
        try:
            s = (data / f).stat()
            now[f] = [digest, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
            if s.st_size != size:
                raise Refused(f"data/{name}/{f} has {s.st_size} bytes instead of {size}: {remedy}")
            if seen.get(f) != now[f] and sha256(data / f) != digest:
                raise Refused(f"data/{name}/{f} is not what prepare_data.py wrote: {remedy}")
        except OSError as e:
            raise Refused(f"data/{name}/{f} cannot be read ({e.strerror}): {remedy}") from None
    if now != seen:
        with contextlib.suppress(OSError):  # a full disk: then they are read again the next time
            SEEN.with_suffix(".new").write_text(json.dumps(now))
            SEEN.with_suffix(".new").replace(SEEN)
    return content


def sha256(file: Path) -> str:
    h = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def comparable(plan: program.Program, data: Path, image: str) -> str:
    """A short hash of what makes two results comparable: data, judge, image, budget. Raises Refused without data."""
    h = hashlib.sha256(f"{intact(plan.data, data)} {image} {plan.budget}".encode())
    for f in MADE_OF:
        h.update((ROOT / f).read_bytes())
    return h.hexdigest()[:12]


def clean(text: str) -> str:
    """Without control and other invisible characters, so that nothing can steer a terminal or fake a line."""
    return "".join(c for c in text if c.isprintable()).strip()


def show(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def running(root: Path = ROOT) -> dict:
    """What running.json says of the experiment that runs in a worktree now, {} when none does."""
    try:
        now = json.loads((root / "runs" / "running.json").read_text())
        process = Path(f"/proc/{int(now['pid'])}")  # a reboot or a kill leaves the file, and the number to another
        ours = b"run.sh" in (process / "cmdline").read_bytes() and (process / "cwd").resolve() == root.resolve()
        return now if ours and now["budget"] and now["started"] and now["what"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def running_line() -> str:
    """The experiment that runs now and how long it may still train, '' when none does."""
    now = running()
    if not now:
        return ""
    left = min(now["budget"], now["started"] + now["budget"] - time.time())  # the clock may have been set back
    limit = f", at most {left:.0f} s left" if left > 0 else ", finishing"
    return f"experiment {now['n']} ({now['what']})" + (limit if "run" in now["what"] else "")


def other_worktrees() -> list:
    listed = git("worktree", "list", "--porcelain").splitlines()
    return [Path(line[9:]) for line in listed if line.startswith("worktree ") and Path(line[9:]) != ROOT]


def news_of_the_plan() -> list:
    """What changed in program.md since the agent was last told, as lines of a diff; remembers that it now has been."""
    now = PLAN.read_text(encoding="utf-8", errors="replace") if PLAN.exists() else ""
    before = TOLD.read_text(encoding="utf-8") if TOLD.exists() else ""
    if now == before:
        return []
    TOLD.parent.mkdir(parents=True, exist_ok=True)
    TOLD.with_suffix(".new").write_text(now, encoding="utf-8")
    TOLD.with_suffix(".new").replace(TOLD)
    diff = list(difflib.unified_diff(before.splitlines(), now.splitlines(), n=0, lineterm=""))[2:] if before else []
    return [clean(line) for line in diff if not line.startswith("@@")]


def brief(state: State) -> str:
    """Where things stand, for a conversation that begins: under 1.3 KB."""
    rows = state.counted
    out = [
        f"Phase {state.phase_line()}.",
        f"Best {state.plan.metric}: {state.best_line()}. {len(rows)} experiments so "
        f"far, {sum(r.verdict == 'kept' for r in rows)} kept.",
    ]
    if rows:
        out.append("Last ten (runs/experiments.tsv has all):")
        out += [
            f"{r.n} {r.verdict} {r.change.split(' (')[0] or r.reason.split(':')[0]}: {r.hypothesis[:60]}"
            for r in rows[-10:]
        ]
        dead = sorted((r for r in rows[:-10] if r.verdict == "discarded"), key=lambda r: -r.percent)[:5]
        if dead:
            out.append("Dead ends before: " + "; ".join(f"{r.hypothesis[:40]} ({r.percent:+.1f} %)" for r in dead))
    return "\n".join(out).encode()[:1300].decode("utf-8", "ignore")
