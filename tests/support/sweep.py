"""One kill after the other: a project whose run takes seconds, the calls it makes, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from repository import CANDIDATES, CRASH, QUICK, Project, block
from shims import Shims, writes

MOMENTS = 24  # random ones of the full sweep
STAGES = {"train": 4.0, "images": 4.0, "captions": 4.0, "judge": 1.2}  # about how many seconds each container lives
DEATHS_AT = (0.1, 0.5, 0.9)  # shares of that at which its client, or it alone, is killed
DISK_KIB = range(0, 241, 8)  # room left on a full disk
LIMIT_S = 120  # of any run in here: they take about 5 s
SEED = 4
WHERE = {  # what is killed, and when
    "before": "run.sh before a call",
    "after": "run.sh after a call",
    "inside": "git while it writes, and run.sh",
    "full": "a write of git that fails, alone",
    "moment": "run.sh at a random moment",
    "client": "the engine's client alone",
    "container": "a container alone",
}
ALONE = ("client", "container")


@dataclass
class Before:
    """What a project looked like before the run that is killed; the number is what that run should find."""

    head: str
    last: int
    incumbent: str  # text of train.py
    candidate: str  # likewise
    file: str  # what train.py was
    values: str = ""


def numbers(project: Project, n: int) -> str:
    """All that a run measured: a candidate finds the same numbers every time, so half of them would show."""
    files = project.git("rev-parse", *(f"refs/experiments/{n}:experiment/{f}.npy" for f in ("ranks", "examples")))
    return " ".join([project.trailers(f"refs/experiments/{n}")["Mean-Rank-Runs"], *files.split()])


def consistent(project: Project, before: Before, recovered: bool) -> list[str]:
    """Complaints about a project in which a run was killed; stricter once another run has recovered it."""
    wrong, n = [], before.last + 1
    fsck = subprocess.run(["git", "fsck", "--no-dangling"], cwd=project.path, capture_output=True, text=True)
    if fsck.returncode or re.search("error|missing|broken|invalid|bad", fsck.stdout + fsck.stderr):
        wrong.append(f"git fsck: {fsck.stdout}{fsck.stderr}")
    record = project.trailers(f"refs/experiments/{n}") if n in project.experiments() else {}
    kept, head = record.get("Verdict") == "kept", project.git("rev-parse", "HEAD")
    lost = record.get("Verdict") == "lost"
    stays = lost or "goes on" in record.get("Chain", "")  # the next idea builds on it, or it is tried again
    new = head != before.head
    if new:
        changed = project.git("diff", "--name-only", before.head, head).split()
        ours = set(changed) <= {"scratchpad.md", "train.py"} and "train.py" in changed
        if project.git("rev-parse", "HEAD^") != before.head or not ours or not kept:
            wrong.append(f"HEAD is neither the old one nor the experiment: {project.git('log', '-3', '--oneline')}")
        if project.git("show", "HEAD:train.py") + "\n" != before.candidate:
            wrong.append("HEAD has another train.py than what was judged")
    now = project.read("train.py")
    carried_out = before.candidate if kept or stays else before.incumbent
    if now != before.file and (now != carried_out or not record):
        wrong.append("train.py is neither untouched nor correctly reverted")
    if record:
        if (
            before.values
            and record["Verdict"] not in ("failed", "lost")
            and (found := numbers(project, n)) != before.values
        ):
            wrong.append(f"the record says {found}, not {before.values}")
        files = project.git("ls-tree", "--name-only", f"refs/experiments/{n}:experiment").split()
        if not {"result.json", "train.log"} <= set(files):
            wrong.append(f"the record holds {files}")
    if project.read("notes.txt") != "mine" or "LICENSE" not in project.git("diff", "--cached", "--name-only").split():
        wrong.append("the user's own files or index are not what they were")
    if not recovered:
        return wrong
    if new != kept or now != (carried_out if record else before.file):
        wrong.append(f"verdict {record.get('Verdict')} was not carried out: HEAD {'new' if new else 'old'}, train.py "
                     f"{'candidate' if now == before.candidate else 'incumbent'}")  # fmt: skip
    staged = project.git("diff", "--cached", "--name-only").split()
    if staged != ["LICENSE"]:
        wrong.append(f"staged: {staged}")
    if record and f"\n{n}\t" not in project.read("runs/experiments.tsv"):
        wrong.append("runs/experiments.tsv lacks it")
    left = [*(project.path / ".git").rglob("*.lock"), *(project.path / "runs").glob("work*")]
    left += [file for file in (project.path / "runs").glob("*") if re.search(r"\.new|pending|running|lock", file.name)]
    left = [str(f.relative_to(project.path)) for f in left if f.name != "autoresearch.lock"]
    left += [name for name in project.git("ls-files", "-o", "--exclude-standard").split() if name != "notes.txt"]
    if left or project.containers():
        wrong.append(f"left behind: {left} {project.containers()}")
    return wrong


def again(project: Project) -> subprocess.CompletedProcess:
    """./run.sh, once what was killed has let go of the lock."""
    deadline = time.monotonic() + 30
    while True:
        done = project.run()
        if "another experiment is running" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.3)


def next_run(project: Project, before: Before) -> list[str]:
    """What is wrong after a first run that only recovers, and after a second one that tries another idea."""
    pad = project.read("scratchpad.md")
    plan = project.read("program.md")
    project.edit("data: prints", "data: nowhere", "program.md")
    done = again(project)
    wrong = [] if done.returncode == 2 and "data/nowhere" in done.stderr else [f"the next run: {done.stderr}"]
    project.write("program.md", plan)
    wrong += consistent(project, before, recovered=True)
    if project.read("scratchpad.md") != pad:
        wrong.append("scratchpad.md was touched")
    there = project.experiments()
    project.write("train.py", CRASH)
    done, shown = project.experiment("crash")
    if done.returncode != 1 or shown.get("verdict") != "failed" or project.experiments() != [*there, there[-1] + 1]:
        return [*wrong, f"the run after that: {done.stdout}{done.stderr}"]
    stays = "goes on" in project.trailers(f"refs/experiments/{there[-1] + 1}").get("Chain", "")
    if project.read("train.py") != (CRASH if stays else project.git("show", "HEAD:train.py") + "\n"):
        wrong.append("the run after that left train.py")
    done = subprocess.run(["git", "commit", "-qm", "mine"], cwd=project.path, capture_output=True, text=True)
    if done.returncode or project.git("show", "--format=", "--name-only").split() != ["LICENSE"]:
        wrong.append(f"the user's commit: {done.stderr}{project.git('show', '--stat')}")
    return wrong


@contextlib.contextmanager
def mounted(kind: str, at: Path, *options: str):
    """A mount for the time of the test. Yields False where the caller may not mount."""
    done = subprocess.run(["mount", *options, kind, at], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", at], check=True)


def fill(file: Path, room: int) -> None:
    """Leave so many KiB on a disk."""
    free = os.statvfs(file.parent)
    file.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (room << 10))))


class Sweep:
    """A project for each verdict, the calls of its run, and one kill after the other in copies of it."""

    def __init__(self, base: Project, folder: Path):
        """base: one of quick()'s, as it is."""
        self.folder, self.shims = folder, Shims(folder / "shims")
        base = base.copy(folder / "base")
        base.given += self.shims.given
        self.bases, self.before, self.calls, self.seconds = {}, {}, {}, {}
        for verdict, candidate in CANDIDATES.items():
            at = self.bases[verdict] = base.copy(folder / verdict)
            at.write("train.py", candidate)
            at.hypothesis(f"to be {verdict}")
            head, last = at.git("rev-parse", "HEAD"), at.experiments()[-1]
            self.before[verdict] = Before(head, last, QUICK, candidate, candidate)
            dry = at.copy(folder / "dry")
            self.shims.arm()
            started = time.monotonic()
            done = dry.run()
            self.seconds[verdict], self.calls[verdict] = time.monotonic() - started, self.shims.calls()
            assert block(done.stdout)["verdict"] == verdict, done.stdout + done.stderr
            assert consistent(dry, self.before[verdict], recovered=True) == []
            self.before[verdict].values = numbers(dry, last + 1)
            shutil.rmtree(dry.path)

    def points(self) -> list[tuple]:
        """(verdict, call, side, whom): every call of a kept one; of a discarded one those from its record on."""
        first = self.call("discarded", "update-ref")
        calls = [("kept", n, call) for n, call in enumerate(self.calls["kept"], 1)]
        calls += [("discarded", n, call) for n, call in enumerate(self.calls["discarded"], 1) if n >= first]
        points = [(verdict, n, side) for verdict, n, call in calls for side in ("before", "after", "inside", "full")
                  if side in ("before", "after") or writes(call)]  # fmt: skip
        return [(*point, ("self", "group")[i % 2]) for i, point in enumerate(points)]

    def call(self, verdict: str, words: str) -> int:
        """The number of the first call with these words."""
        return next(i for i, call in enumerate(self.calls[verdict], 1) if words in call)

    def moments(self) -> list[tuple]:
        """The same, at random moments of a run, with the delay."""
        rng = random.Random(SEED)
        return [(rng.choice(list(CANDIDATES)), 0, "moment", rng.choice(("self", "group")),
                 round(rng.uniform(0, self.seconds["kept"]), 2)) for _ in range(MOMENTS)]  # fmt: skip

    def deaths(self) -> list[tuple]:
        """The same, where the engine's client or a container alone is killed at some time, of runs to be kept."""
        return [("kept", stage, side, "", round(share * seconds, 2)) for stage, seconds in STAGES.items()
                for side in ALONE for share in DEATHS_AT]  # fmt: skip

    def kill(self, verdict: str, call: int | str, side: str, whom: str, delay: float = 0) -> list[str]:
        """One point: what is wrong afterwards."""
        project, before = self.bases[verdict].copy(self.folder / "point"), self.before[verdict]
        self.shims.arm(call, side, whom, delay)
        run = project.start(start_new_session=True, stderr=subprocess.STDOUT)
        if side == "moment":
            time.sleep(delay)
            (os.killpg if whom == "group" else os.kill)(run.pid, signal.SIGKILL)
        try:
            output = run.communicate(timeout=LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return ["it hung"]
        wrong = [] if side == "moment" or self.shims.fired() else ["nothing happened"]
        self.shims.arm()
        alone = side in ALONE
        ended = (run.returncode, block(output).get("verdict"))
        if alone and ended not in ((0, verdict), (1, "failed"), (1, "lost"), (2, None)):
            wrong.append(f"ended as {ended}: {output}")
        if side in ("before", "after", "inside") and run.returncode != -signal.SIGKILL:
            wrong.append(f"was not killed: {output}")
        # where git found the object there already, it had nothing to write
        if side == "full" and ended not in ((2, None), (0, verdict)) or "Traceback" in output:
            wrong.append(f"ended with {run.returncode}: {output}")
        try:
            wrong += consistent(project, before, recovered=alone) + next_run(project, before)
        except AssertionError as e:  # the user's own git failed
            wrong.append(f"git: {e}")
        shutil.rmtree(project.path)
        return wrong
