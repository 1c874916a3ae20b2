"""The record: every attempt is a commit under refs/experiments/<number>, its message carries what later decisions need.

A kept attempt is also an ordinary commit on the branch. The order is: the note `runs/pending.json`, the ref, the
branch, the user's index, train.py, the history file. Every step can be repeated, so whatever a killed run left undone
the next one completes from the note.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import git
import locks
from keep_rule import geometric_mean
from measure import Run
from project import ROOT, RUNS, Refused, number, read_json, say, write_json, write_whole

REFS = "refs/experiments/"
PENDING = RUNS / "pending.json"  # the attempt whose verdict is being carried out: {"number", "commit"}
OURS = ("train.py", "scratchpad.md")  # the files of a kept attempt's commit
JUDGED = ("kept", "discarded", "failed")  # verdicts on a candidate: what phases and `stop` count; not "lost"
METRICS = {"mean_rank": "Mean-Rank", "median_rank": "Median-Rank"}  # and how their trailers are called
TRAILER = re.compile(r"([A-Z][A-Za-z-]*): (.*)")
CHAIN = re.compile(r"(\d+) of (\d+) on ([0-9a-f]{9})(, goes on)?")
STALE_LOCK_S = 2  # age of a lock of git's from which on nobody writes with it any more: that takes milliseconds


@dataclass(frozen=True)
class Chain:
    """Losers in a row, each built on the one before: this is link 1, 2, ... of at most `limit`."""

    link: int
    limit: int
    base: str  # the incumbent's blob, its first nine digits
    continues: bool  # whether train.py was left as it is, for the next to build on

    @classmethod
    def parse(cls, text: str) -> Chain | None:
        m = CHAIN.fullmatch(text)
        return cls(int(m[1]), int(m[2]), m[3], bool(m[4])) if m else None

    def __str__(self) -> str:
        return f"{self.position} on {self.base}" + ", goes on" * self.continues

    @property
    def position(self) -> str:
        return f"{self.link} of {self.limit}"


@dataclass(frozen=True)
class Record:
    """One attempt as its commit's message tells it; what it does not tell is empty."""

    number: int
    when: int  # unix time
    verdict: str = ""
    hypothesis: str = ""
    reason: str = ""  # of a failure or loss
    phase: str = ""
    train: str = ""  # blob of train.py
    comparable: str = ""  # hash of data, judge, image, budget and device; '' for an audit or a final
    device: str = ""  # that it ran on: cpu, or the GPU's model
    branch: str = ""
    change: str = ""  # "-24.4 % (7.0 sigma better)"
    chain: Chain | None = None
    web: str = ""
    by_hand: bool = False
    test_evaluation: int = 0  # the how manieth time anybody looked at the test split
    runs: dict[str, list[float]] = field(default_factory=dict)  # metric -> its value in every run

    @property
    def percent(self) -> float:
        """The change of the metric; negative is better."""
        m = re.match(r"[+-]?\d+(\.\d+)?", self.change)
        return float(m[0]) if m else 0.0

    def values(self, metric: str) -> list[float]:
        return self.runs.get(metric, [])


@functools.lru_cache(maxsize=None)  # a run reads the record several times
def parse(n: str, when: str, text: str) -> Record:
    """A record from its commit's time and message."""
    body = text.partition("\n\n")[2]  # the subject is a hypothesis, which may look like a trailer
    found = {m[1]: m[2].strip() for m in map(TRAILER.fullmatch, body.splitlines()) if m}
    return Record(
        number=int(n),
        when=int(when),
        verdict=found.get("Verdict", ""),
        hypothesis=found.get("Hypothesis", ""),
        reason=found.get("Reason", ""),
        phase=found.get("Phase", ""),
        train=found.get("Train", ""),
        comparable=found.get("Comparable", ""),
        device=found.get("Device", ""),
        branch=found.get("Branch", ""),
        change=found.get("Change", ""),
        chain=Chain.parse(found.get("Chain", "")),
        web=found.get("Web", ""),
        by_hand="By-Hand" in found,
        test_evaluation=int(found.get("Test-Look", 0)),
        runs={name: [float(v) for v in found.get(f"{key}-Runs", "").split()] for name, key in METRICS.items()},
    )


@dataclass
class Attempt:
    """One train.py on its way into the record; when it is there, this is its experiment/result.json."""

    kind: str  # "candidate", "baseline" or "remeasured" (the incumbent, once more)
    train: str  # blob of train.py
    scratchpad: str  # blob of scratchpad.md
    hypothesis: str
    experiment: int = 0  # its number
    verdict: str = "again"  # until it has run often enough
    metric: str = "mean_rank"  # what decides: a key of METRICS
    runs: list[Run] = field(default_factory=list)
    reason: str = ""  # of a failure, one line
    phase: str = ""
    before: list[float] = field(default_factory=list)  # the incumbent's runs
    sigma: float = 0.0
    percent: float | None = None  # change of the metric; negative is better
    sigmas: float | None = None  # the gain; positive is better
    comparable: str = ""
    device: str = ""
    branch: str = ""
    chain: Chain | None = None
    web: str = ""
    by_hand: bool = False
    when: int = 0

    def values(self, metric: str = "") -> list[float]:
        return [run.metrics[metric or self.metric] for run in self.runs if run.outcome == "ok"]

    @property
    def gain(self) -> str:
        return f"{abs(self.sigmas)} sigma {'better' if self.sigmas > 0 else 'worse'}"

    def json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    def message(self) -> str:
        """The commit's message: a subject for people, trailers for later decisions."""
        subject = self.hypothesis
        if self.verdict == "kept" and self.values() and self.before:
            subject += f" ({number(geometric_mean(self.before))} → {number(geometric_mean(self.values()))})"
        elif self.verdict != "baseline" and not self.by_hand:
            subject = f"{self.verdict}: {subject}"
        trailers = {"Experiment": self.experiment, "Verdict": self.verdict, "Hypothesis": self.hypothesis}
        for metric, key in METRICS.items():
            values = self.values(metric)
            if values:
                trailers[key] = f"{geometric_mean(values):.2f}"
                trailers[f"{key}-Runs"] = " ".join(f"{v:.4f}" for v in values)
        if self.percent is not None:
            trailers["Change"] = f"{self.percent:+.1f} % ({self.gain})"
        trailers["Seed"] = " ".join(str(run.seed) for run in self.runs)
        trailers.update({"Phase": self.phase, "Reason": self.reason, "Train": self.train, "Branch": self.branch})
        trailers.update(
            {"Comparable": self.comparable, "Device": self.device, "Chain": self.chain or "", "Web": self.web}
        )
        trailers["By-Hand"] = "yes" if self.by_hand else ""
        return message(subject, trailers)


def message(subject: str, trailers: dict) -> str:
    return subject + "\n\n" + "".join(f"{key}: {value}\n" for key, value in trailers.items() if value != "")


def load_all() -> list[Record]:
    """All attempts by number. A clone without refs/experiments still finds the newest that its branch carries."""
    fmt = "%(refname:lstrip=2)%09%(committerdate:unix)%09%(contents)%00"
    entries = git.read("for-each-ref", f"--format={fmt}", REFS).split("\0")
    split = [entry.lstrip("\n").split("\t", 2) for entry in entries if entry.strip()]
    found = {int(n): parse(n, when, text) for n, when, text in split if n.isdigit()}
    kept = git.read("log", "-1", "--format=%ct%x09%B", "HEAD", "--", "train.py", check=False)
    m = re.search(r"^Experiment: (\d+)$", kept, re.M)
    if m and int(m[1]) not in found:
        found[int(m[1])] = parse(m[1], *kept.split("\t", 1))
    return [found[n] for n in sorted(found)]


def log_file(number: int) -> Path:
    return RUNS / f"{number:04d}.log"


def diff_file(number: int) -> Path:
    return RUNS / f"{number:04d}.diff"


def add(first: int, build: Callable[[int], str]) -> tuple[int, str]:
    """Record an attempt under the first free number from `first` on; build(n) makes its commit. Returns both.

    Raises Refused. The note is written before the ref, so that a kill in between leaves nothing half-done.
    """
    n = first
    while True:
        commit, ref = build(n), f"{REFS}{n}"
        with locks.record():
            remove_stale_locks(list((git.folder() / REFS).glob("*.lock")))
            write_json(PENDING, {"number": n, "commit": commit, "branch": git.branch()})
            done = git.call("update-ref", ref, commit, git.ABSENT, writes=True)
        if done.returncode == 0:
            return n, commit
        if not git.object_id(ref):
            raise Refused(f"cannot write {ref} (disk full or read-only?)")
        n += 1  # another worktree was faster


def remove_stale_locks(files: list[Path]) -> None:
    """Locks that a killed git left. One that is younger may be a person's git at work, and is waited for."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            while 0 <= time.time() - file.stat().st_mtime < STALE_LOCK_S:
                time.sleep(0.1)
            file.unlink()
            say(f"run.sh: removed {file}, left by a git that was killed")


def finish_interrupted() -> None:
    """Complete what a killed run had recorded but not carried out. Raises Refused while git is at work otherwise."""
    folder = git.folder("--git-dir")
    for state in ("rebase-merge", "rebase-apply", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD"):
        if (folder / state).exists():
            raise Refused(
                f"git is in the middle of a {re.split('[-_](?=[^-_]*$)', state)[0]}; finish or abort it first"
            )
    common, branch = git.folder(), git.read("symbolic-ref", "-q", "HEAD", check=False).strip()
    locked = [
        file for file in (folder / "index.lock", folder / "HEAD.lock", common / f"{branch}.lock") if file.exists()
    ]
    pending = read_json(PENDING, {})
    if pending:
        with locks.record():
            remove_stale_locks([*locked, *(common / REFS).glob("*.lock")])
        recorded = git.object_id(f"{REFS}{pending['number']}") == pending["commit"]
        if recorded and pending["branch"] == git.branch():
            carry_out(pending["commit"])
            say(f"run.sh: completed experiment {pending['number']}, which had been interrupted")
        elif not recorded:
            PENDING.unlink()
    elif any(time.time() - file.stat().st_mtime > STALE_LOCK_S for file in locked if file.exists()):
        raise Refused(f"{locked[0]} exists: a git is at work, or was killed; wait for it, or delete that file")


def carry_out(commit: str) -> None:
    """Carry a recorded verdict into the branch, the user's index and train.py. Every step can be repeated."""
    recorded = parse("0", "0", git.read("show", "-s", "--format=%B", commit))
    before = git.object_id(f"{commit}^:train.py")
    if recorded.verdict == "kept":
        if git.object_id("HEAD:train.py") == before:
            advance_branch(commit)
        update_user_index(commit)
        restore_train(expected=before)  # as it was: kept by hand, or put back meanwhile
    elif recorded.verdict != "lost" and not (recorded.chain and recorded.chain.continues):
        restore_train(expected=recorded.train)
    PENDING.unlink(missing_ok=True)


def advance_branch(commit: str) -> None:
    """The two files of a kept attempt as an ordinary commit on HEAD, with the message of its record."""
    head, text = git.object_id("HEAD"), git.read("show", "-s", "--format=%B", commit)
    files = {name: git.object_id(f"{commit}:{name}") for name in OURS}
    kept = git.commit(git.tree_with(head, files, RUNS / "index.new"), head, text)
    git.write("update-ref", "-m", f"experiment: {text.splitlines()[0]}", "HEAD", kept, head)


def update_user_index(commit: str) -> None:
    """Our two entries of the user's index, where nothing else was staged: else the next commit would undo the keep."""
    for name in OURS:
        staged = git.read("ls-files", "-s", "--", name).split()
        if (staged[1] if staged else "") == git.object_id(f"{commit}^:{name}"):
            git.write("update-index", "--add", "--cacheinfo", f"100644,{git.object_id(f'{commit}:{name}')},{name}")


def restore_train(expected: str) -> None:
    """Put HEAD's train.py back, only if the file still is what was judged, which is the blob `expected`."""
    file = ROOT / "train.py"
    if (
        file.is_file()
        and not file.is_symlink()
        and git.read("hash-object", "--no-filters", "--", file.name).strip() == expected
    ):
        write_whole(file, git.content("HEAD:train.py"))
