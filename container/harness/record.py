"""The record: every attempt is a commit under refs/experiments/<number>, its message carries what later decisions need.

A kept attempt is also an ordinary commit on the branch. The order is: the note `runs/NNNN.pending`, the ref, the
branch, the user's index, train.py, the history file. Every step can be repeated, so whatever a killed run left undone
the next one on that branch completes from the note.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import git
import locks
from keep_rule import geometric_mean
from project import ROOT, RUNS, Broken, Refused, number, read_json, say, visible, write_json, write_whole

if TYPE_CHECKING:  # the guard reads the record before every run, and need not import what measures
    from measure import Run

REFS = "refs/experiments/"
FETCH = "git fetch --no-prune origin 'refs/experiments/*:refs/experiments/*'"  # how a clone gets the record
KNOWN = "autoresearch.experiments"  # in git's folder: {ref: commit} of the whole record, as it was last seen
OURS = ("train.py", "scratchpad.md")  # the files of a kept attempt's commit
JUDGED = ("kept", "discarded", "failed", "control")  # on a candidate: what phases and `stop` count; not "lost"
REVERTED = (*JUDGED, "dropped")  # after which train.py is the incumbent, unless its chain goes on
SIMPLIFY, CONTROL = "simplify:", "control:"  # how the hypothesis begins of a kind of experiment with a rule of its own
# fields of a Record, and how their trailers are called
TRAILERS = {
    "number": "Experiment", "verdict": "Verdict", "hypothesis": "Hypothesis", "change": "Change", "seed": "Seed",
    "phase": "Phase", "reason": "Reason", "train": "Train", "branch": "Branch", "comparable": "Comparable",
    "device": "Device", "chain": "Chain", "web": "Web", "by_hand": "By-Hand", "split": "Split", "saved": "Saved",
    "anchor": "Anchor", "test_evaluation": "Test-Look",
}  # fmt: skip
METRICS = {"mean_rank": "Mean-Rank", "median_rank": "Median-Rank"}  # likewise; with "-Runs" it is every run's value
TRAILER = re.compile(r"([A-Z][A-Za-z-]*): (.*)")
CHAIN = re.compile(r"(\d{1,9}) of (\d{1,9}) on ([0-9a-f]{9})(, goes on)?")
NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
IN_THE_MIDDLE = {"rebase-merge": "rebase", "rebase-apply": "rebase", "MERGE_HEAD": "merge",
                 "CHERRY_PICK_HEAD": "cherry-pick", "REVERT_HEAD": "revert", "BISECT_LOG": "bisect"}  # fmt: skip
MAX_REASON = 300  # characters
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


@dataclass
class Outcome:
    """What is told of an attempt both in its commit's message and in its result.json."""

    verdict: str = ""
    hypothesis: str = ""
    reason: str = ""  # of a failure or a loss, or that a training was cut short; one line
    phase: str = ""
    train: str = ""  # blob of train.py
    comparable: str = ""  # hash of data, judge, image, budget and device; '' for an audit or a final
    device: str = ""  # that it ran on: cpu, or the GPU's model
    branch: str = ""
    change: str = ""  # "-24.4 % (7.0 sigma better)"
    chain: Chain | None = None
    web: str = ""
    saved: str = ""  # by a simplification: "training time -23 %, lines of code -1 %"
    anchor: str = ""  # of one that was kept without a gain over it: the blob that none may be worse than
    by_hand: bool = False
    split: str = ""  # of an audit or a final: what it was evaluated on
    test_evaluation: int = 0  # the how manieth time anybody looked at the test split
    when: int = 0  # unix time

    def is_a(self, kind: str) -> bool:
        return self.hypothesis.lower().startswith(kind)


@dataclass
class Record(Outcome):
    """One attempt as its commit's message tells it; what it does not tell is empty."""

    number: int = 0
    seed: str = ""  # of every run
    runs: dict[str, list[float]] = field(default_factory=dict)  # metric -> its value in every run

    @property
    def percent(self) -> float:
        """The change of the metric; negative is better."""
        m = re.match(r"[+-]?\d+(\.\d+)?", self.change)
        return float(m[0]) if m else 0.0


@functools.lru_cache(maxsize=None)  # a run reads the record several times
def parse(n: str, when: str, text: str) -> Record:
    """A record from its commit's time and message. What a person garbled in there counts as not told."""
    body = text.partition("\n\n")[2]  # the subject is a hypothesis, which may look like a trailer
    found = {m[1]: m[2].strip() for m in map(TRAILER.fullmatch, body.splitlines()) if m}
    told = {name: found.get(key, "") for name, key in TRAILERS.items()}
    told.update(number=int(n), chain=Chain.parse(told["chain"]), by_hand=bool(told["by_hand"]))
    told["test_evaluation"] = int(sum(numbers(told["test_evaluation"])))
    runs = {metric: numbers(found.get(f"{key}-Runs", "")) for metric, key in METRICS.items()}
    return Record(**told, when=int(when), runs=runs)


def numbers(text: str) -> list[float]:
    """The positive numbers among these words."""
    return [float(word) for word in text.split() if NUMBER.fullmatch(word) and float(word) > 0]


@dataclass
class Attempt(Outcome):
    """One train.py on its way into the record; when it is there, this is its experiment/result.json."""

    verdict: str = "again"  # until it has run often enough
    kind: str = "candidate"  # or "baseline", or "remeasured": the incumbent, once more
    scratchpad: str = ""  # blob of scratchpad.md
    experiment: int = 0  # its number
    metric: str = "mean_rank"  # what decides: a key of METRICS
    runs: list[Run] = field(default_factory=list)
    waited: int = 0  # seconds before the first of them, for `cooldown` and a free device
    before: list[float] = field(default_factory=list)  # the incumbent's runs
    sigma: float = 0.0
    percent: float | None = None  # change of the metric; negative is better
    sigmas: float | None = None  # the gain; positive is better

    def values(self, metric: str = "") -> list[float]:
        return [run.metrics[metric or self.metric] for run in self.runs if run.outcome == "ok"]

    def failure(self) -> str:
        """Why a run failed, in one line; '' when none did."""
        return next((visible(run.reason)[:MAX_REASON] for run in self.runs if run.outcome != "ok"), "")

    def cut_short(self) -> str:
        """How far those came that ended well, but long before the last step that their own log announces."""
        steps = " and ".join(filter(None, (run.train.get("cut_short") for run in self.runs if run.outcome == "ok")))
        return steps and f"cut short at {steps}: not what a whole training gives, and may run again"

    @property
    def gain(self) -> str:
        return f"{abs(self.sigmas)} sigma {'better' if self.sigmas > 0 else 'worse'}"

    def json(self, **more) -> bytes:
        return json.dumps({**asdict(self), **more}, indent=1).encode() + b"\n"

    @property
    def subject(self) -> str:
        if self.verdict == "kept" and self.values() and self.before:
            before, after = geometric_mean(self.before), geometric_mean(self.values())
            return f"{self.hypothesis} ({number(before)} → {number(after)})"
        named = self.by_hand or self.verdict in ("baseline", "audit", "final", "control")
        return self.hypothesis if named else f"{self.verdict}: {self.hypothesis}"

    def message(self) -> str:
        """That of its commit: a subject for people, trailers for later decisions."""
        seeds = " ".join(str(run.seed) for run in self.runs)
        told = {**vars(self), "number": self.experiment, "seed": seeds, "by_hand": "yes" if self.by_hand else ""}
        trailers = {key: told[name] for name, key in TRAILERS.items()}
        for metric, key in METRICS.items():
            if values := self.values(metric):
                trailers[key] = f"{geometric_mean(values):.2f}"
                trailers[f"{key}-Runs"] = " ".join(f"{v:.4f}" for v in values)
        return f"{self.subject}\n\n" + "".join(f"{key}: {value}\n" for key, value in trailers.items() if value)


def load_all() -> list[Record]:
    """All attempts by number. A clone without refs/experiments still finds the newest that its branch carries."""
    fmt = "%(refname:lstrip=2)%09%(committerdate:unix)%09%(contents)%00"  # no date: not a commit, and not ours
    entries = git.read("for-each-ref", f"--format={fmt}", REFS).split("\0")
    split = [entry.lstrip("\n").split("\t", 2) for entry in entries if entry.strip()]
    found = {int(n): parse(n, when, text) for n, when, text in split if n.isdecimal() and when}
    kept = git.read("log", "-1", "--format=%ct%x09%B", "HEAD", "--", "train.py", check=False)
    m = re.search(r"^Experiment: (\d{1,9})$", kept, re.M)
    if m and int(m[1]) not in found:
        found[int(m[1])] = parse(m[1], *kept.split("\t", 1))
    return [found[n] for n in sorted(found)]


def results(records: list[Record]) -> list[dict]:
    """The result.json of each; {} where there is none."""
    names = [f"{REFS}{r.number}:experiment/result.json" for r in records]
    contents = git.contents(names)
    return [json.loads(contents.get(name, b"{}")) for name in names]


def run_file(number: int, kind: str) -> Path:
    """An experiment's log or diff, or its note: that the verdict is being carried out (number, commit, branch)."""
    return RUNS / f"{number:04d}.{kind}"


def add(attempt: Attempt, head: str, files: dict[str, str], **more) -> str:
    """Record an attempt under the first free number from its own on; returns its commit, on top of `head`.

    files: {path: blob}. more: what else its result.json holds. Raises Refused.
    """
    while True:
        result = {"experiment/result.json": git.store(attempt.json(**more))}
        commit = git.commit(head, {**files, **result}, attempt.message())
        if claim(attempt.experiment, commit, attempt.branch or git.branch()):
            return commit
        attempt.experiment += 1


def claim(n: int, commit: str, branch: str) -> bool:
    """Make this commit experiment n, after a note of it. Raises Refused where git cannot; then the note stays.

    False where another worktree was faster, or something else has that name: note, log and diff are then of n + 1.
    """
    ref = f"{REFS}{n}"
    with locks.record():
        remove_stale_locks(list((git.folder() / REFS).glob("*.lock")))
        write_json(run_file(n, "pending"), {"number": n, "commit": commit, "branch": branch})
        git.call("update-ref", ref, commit, git.ABSENT, writes=True)
    restore()
    if (found := git.object_id(ref)) == commit:
        return True
    if not found and not (git.folder() / ref).exists():
        raise Broken(f"cannot write {ref} (disk full or read-only?)")
    for kind in ("log", "diff", "pending"):
        if run_file(n, kind).exists():
            run_file(n, kind).rename(run_file(n + 1, kind))
    return False


def message(name: str) -> str:
    """Of a commit; '' where git does not have it."""
    return git.read("show", "-s", "--format=%B", name, check=False).strip()


def restore() -> None:
    """Put back what a fetch, perhaps an editor's own, took out of the record, by pruning or by writing over it.

    Whoever deletes an experiment on purpose deletes its entry in KNOWN too.
    """
    file = git.folder() / KNOWN
    with locks.record():
        listed = git.read("for-each-ref", "--format=%(refname) %(objectname)", REFS).splitlines()
        now = {ref: commit for ref, commit in map(str.split, listed) if ref[len(REFS) :].isdecimal()}
        for ref in (git.folder() / REFS).glob("*"):  # a power cut leaves some empty
            unread = ref.name.isdecimal() and f"{REFS}{ref.name}" not in now
            if unread and ref.is_file() and not git.object_id(f"{REFS}{ref.name}"):
                ref.unlink()
        known = read_json(file, {})
        for ref, commit in known.items():
            if commit in now.values() or not isinstance(commit, str):
                continue
            if ref in now:
                if message(ref) == message(commit):
                    continue  # the same experiment, in a history that was rewritten
                ref = f"{REFS}{max(int(other.rpartition('/')[2]) for other in now) + 1}"
            if git.call("update-ref", ref, commit, git.ABSENT, writes=True).returncode == 0:  # else gc has taken it
                now[ref] = commit
                say(f"run.sh: {ref} is back, which a fetch had taken away; README says how to fetch the record")
        if now != known:
            write_json(file, now)


def remove_stale_locks(files: list[Path]) -> None:
    """Locks that a killed git left. One that is younger may be another worktree's git at work, and is waited for."""
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            while 0 <= time.time() - file.stat().st_mtime < STALE_LOCK_S:
                time.sleep(0.1)
            file.unlink()
            say(f"run.sh: removed {file}, left by a git that was killed")


def refuse_while_git_is_at_work() -> None:
    """Raises Refused where HEAD is no commit, amid a rebase or the like, and while a git holds a lock of its own."""
    if not git.object_id("HEAD^{commit}"):
        raise Refused("git finds no commit at HEAD; commit everything, or see git fsck and git reflog if there was one")
    own, common, branch = git.folder("--git-dir"), git.folder(), git.branch()
    for state, name in IN_THE_MIDDLE.items():
        if (own / state).exists():
            raise Refused(f"git is in the middle of a {name}; finish or abort it first")
    locked = [own / "index.lock", own / "HEAD.lock", common / f"refs/heads/{branch}.lock"]
    locked += {folder / "reftable/tables.list.lock" for folder in (own, common)}  # where refs are no files
    if any(file.exists() for file in locked) and git.commit_under_way():
        raise Refused("a git commit is under way here, perhaps with its editor open; finish that first")
    if pending_notes():
        remove_stale_locks(locked)
    for file in locked:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > STALE_LOCK_S:
                raise Refused(f"{file} exists: a git is at work, or was killed; wait for it, or delete that file")


def pending_notes(here: bool = True) -> dict[Path, dict]:
    """Of verdicts that are not carried out: of this branch, or those that wait for another."""
    files = RUNS.glob("*pending*")  # pending.json: an earlier version's
    notes = {file: read_json(file, {}, number=int, commit=str, branch=str) for file in files}
    return {file: note for file, note in notes.items() if note and (note["branch"] == git.branch()) == here}


def look_after_the_waiting() -> None:
    """Raises Refused where HEAD is on no branch and a verdict waits for one: what is kept here would be left behind."""
    for file, note in pending_notes(here=False).items():
        n, branch = note["number"], note["branch"]
        if branch != git.DETACHED and not git.object_id(f"refs/heads/{branch}"):
            say(f"run.sh: {branch}, which experiment {n} waited for, is gone; ./run.sh keep {n} would take it over")
            file.unlink()
        elif git.branch() == git.DETACHED:
            raise Refused(f"HEAD has left {branch}, where experiment {n} waits for the next run: git checkout {branch}")


def finish_interrupted() -> None:
    """Complete what a killed run had measured but not recorded or carried out. Raises Refused."""
    refuse_while_git_is_at_work()
    restore()
    look_after_the_waiting()
    for file, note in pending_notes().items():
        edited, n, commit = "", note["number"], note["commit"]
        if message(commit):
            while not claim(n, commit, git.branch()):  # as it may be already
                n += 1
            edited = carry_out(n)
            say(f"run.sh: completed experiment {n}, which had been interrupted")
        else:
            say(f"run.sh: experiment {n} had been interrupted and is lost: git has no commit {commit}")
        file.unlink(missing_ok=True)
        if edited:
            raise Refused(f"{edited}; then run ./run.sh again")


def carry_out(n: int) -> str:
    """Carry a recorded verdict into the branch, the user's index and train.py. Every step can be repeated.

    Without our two entries of the index the user's next commit would undo the keep. Returns what to do where train.py
    is then not what the verdict says, for somebody edited it or went elsewhere meanwhile; '' where it is.
    """
    ref = f"{REFS}{n}"
    text, before = git.read("show", "-s", "--format=%B", ref), git.object_id(f"{ref}^:train.py")
    recorded = parse(str(n), "0", text)
    if recorded.branch and not (git.object_id("HEAD") and git.branch() == recorded.branch):
        return f"left as it is, for HEAD has left {recorded.branch}: the next run there carries the verdict out"
    continues = recorded.chain is not None and recorded.chain.continues
    if recorded.verdict == "kept":
        head = git.object_id("HEAD")
        if git.object_id("HEAD:train.py") == before:
            kept = git.commit(head, {name: git.object_id(f"{ref}:{name}") for name in OURS}, text)
            git.read("update-ref", "-m", f"experiment: {text.splitlines()[0]}", "HEAD", kept, head, writes=True)
        ours = [name for name in OURS if git.object_id(f":{name}") == git.object_id(f"{ref}^:{name}")]  # not staged
        if ours:
            entries = git.read("ls-tree", ref, "--", *ours)
            git.read("update-index", "--add", "--index-info", given=entries.encode(), writes=True)
    # a kept one is in place, unless by hand, or where the incumbent was put back meanwhile
    replaced = before if recorded.verdict == "kept" else recorded.train
    if recorded.verdict in REVERTED and not continues and git.blob_of("train.py") == replaced:
        write_whole(ROOT / "train.py", git.content("HEAD:train.py"))
    run_file(n, "pending").unlink(missing_ok=True)
    expected = recorded.train if continues or recorded.verdict == "kept" else git.object_id("HEAD:train.py")
    if recorded.verdict not in REVERTED or git.blob_of("train.py") == expected:
        return ""
    if recorded.verdict == "kept":
        if git.object_id("HEAD:train.py") != recorded.train:
            return f"HEAD's train.py is not what experiment {n} kept, since a commit: ./run.sh keep {n} takes it over"
        return "train.py was edited meanwhile and is not what was kept: read it first"
    diff = run_file(n, "diff").relative_to(ROOT)
    return f"train.py was edited meanwhile and may hold what lost: read it, and undo that change ({diff})"
