"""Who may work: one run in a worktree, one training on a device, one writer of the record. And what runs now."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import git
from project import ROOT, RUNS, Refused, read_json, write_json

RUNNING = Path("runs/running.json")  # in every worktree: what runs there now
TRAINS, EMBEDS = "trains", "embedding and judging"  # stages of a run
# train.py's own claim: step, of steps, and the loss or ''
LOSS = rb"-?(?:\d{1,9}(?:\.\d{1,9})?(?:e[+-]?\d{1,2})?|nan|inf)"
STEP = re.compile(rb"^step ([1-9]\d{0,8})/([1-9]\d{0,8})\b(?: loss (" + LOSS + rb")(?![\w.]))?.*\n", re.M)
LOG_END = 4096  # bytes of the log in which it is looked for


@dataclass
class Running:
    """What runs in a worktree now, for the status line and so that no other worktree tries the same."""

    pid: int
    number: int  # of the experiment
    activity: str  # "candidate, run 1"
    started: float  # unix time, of the stage where there is one
    budget: int  # seconds
    train: str = ""  # blob of train.py
    conversation: str = ""  # of the agent that started it; "" for a person
    log: str = ""  # of the training
    skip: int = 0  # bytes of it that earlier runs wrote
    stage: str = ""


def announce(number: int, activity: str, budget: int, train: str = "") -> None:
    """Say what runs here from now on. Raises OSError."""
    agent = os.environ.get("CLAUDE_CODE_SESSION_ID", "")
    write_json(ROOT / RUNNING, asdict(Running(os.getpid(), number, activity, time.time(), budget, train, agent)))


def enter(stage: str, log: Path) -> None:
    """Say how far the run has come that was announced; for whoever watches alone, so a full disk is no trouble."""
    with contextlib.suppress(OSError):
        if now := running():
            now.stage, now.started, now.log, now.skip = stage, time.time(), str(log), log.stat().st_size
            write_json(ROOT / RUNNING, asdict(now))


def running(root: Path = ROOT) -> Running | None:
    """What runs in a worktree now. A reboot or a kill leaves the file, and the process number to somebody else."""
    try:
        now = Running(**read_json(root / RUNNING, {}))
        process = Path(f"/proc/{int(now.pid)}")
        ours = b"container/harness" in (process / "cmdline").read_bytes()
        return now if ours and (process / "cwd").resolve() == root.resolve() else None
    except (OSError, TypeError, ValueError):
        return None


def running_line() -> str:
    """The experiment that runs now and how far it is, '' when none does."""
    now = running()
    return ", ".join([f"experiment {now.number} ({now.activity})", *progress(now)]) if now else ""


def progress(now: Running) -> list[str]:
    """Step, seconds left and loss of a training, or the name of another stage."""
    if now.stage != TRAINS:
        return [now.stage] if now.stage else []
    passed, found, written = max(0, time.time() - now.started), [], 0.0  # the clock may have been set back
    limit = max(0, now.budget - passed)
    with contextlib.suppress(OSError), Path(now.log).open("rb") as log:
        log.seek(max(now.skip, log.seek(0, os.SEEK_END) - LOG_END))
        found, written = STEP.findall(log.read(LOG_END)), os.fstat(log.fileno()).st_mtime
    if not found:
        return [f"at most {limit:.0f} s left"]
    step, steps, loss = (number.decode() for number in found[-1])
    share = min(1, int(step) / int(steps))
    left = max(0, min(limit, (written - now.started) / share - passed))
    return [f"step {step}/{steps} ({share * 100:.0f} %)", f"{left:.0f} s left", *[f"loss {loss}"] * bool(loss)]


def draw_live_line(done: threading.Event) -> None:
    """On a terminal: what runs now, in one line that is drawn anew every second and gone at the end."""
    with contextlib.suppress(OSError):  # the terminal is gone
        while sys.stderr.isatty() and not done.wait(1):
            width = shutil.get_terminal_size().columns - 1
            print(f"{running_line()[:width]:{width}}", end="\r", file=sys.stderr, flush=True)
        print("\x1b[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)


def worktree_that_judges(train: str) -> str:
    """The name of another worktree in which this very train.py is being judged, '' when none is."""
    listed = git.read("worktree", "list", "--porcelain").splitlines()
    trees = [Path(line[9:]) for line in listed if line.startswith("worktree ")]
    others = ((tree, running(tree)) for tree in trees if tree != ROOT)
    return next((tree.name for tree, now in others if now and now.train == train), "")


@contextlib.contextmanager
def held(file: Path, wait: bool = False) -> Iterator[int]:
    """Hold a lock file. A git that writes keeps it open too, so it lasts until that has ended. Raises OSError."""
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        git.held_locks.append(lock.fileno())
        try:
            yield lock.fileno()
        finally:
            git.held_locks.remove(lock.fileno())


def worktree() -> contextlib.ExitStack:
    """One run at a time here, as long as what is returned is open. Raises Refused."""
    file, stack = git.folder("--git-dir") / "autoresearch.lock", contextlib.ExitStack()
    try:
        RUNS.mkdir(exist_ok=True)
        stack.enter_context(held(file))
        return stack
    except BlockingIOError:
        raise Refused(f"another experiment is running: {running_line() or 'it has just begun'}; wait for it") from None
    except OSError as error:
        where = RUNS if error.filename == str(RUNS) else file
        raise Refused(f"cannot write {where}; is {where.parent.name} read-only?") from None


def record() -> contextlib.AbstractContextManager:
    """One writer of the record, in all worktrees."""
    return held(git.folder() / "autoresearch.record", wait=True)


@contextlib.contextmanager
def device(numbers: list[int], waiting: Callable[[], None]) -> Iterator[int]:
    """One of these devices until the end of the run, and of the sandboxes that it started: they inherit the lock.

    waiting() is called while other worktrees use them all.
    """
    folder = git.folder()
    with contextlib.ExitStack() as stack:
        for number in itertools.cycle(numbers):
            with contextlib.suppress(BlockingIOError):
                os.set_inheritable(stack.enter_context(held(folder / f"autoresearch.device-{number}")), True)
                break
            if number == numbers[-1]:
                waiting()
                time.sleep(1)
        yield number
