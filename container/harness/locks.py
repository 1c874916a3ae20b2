"""Who may work: one run in a worktree, one training on a device, one writer of the record. And what runs now."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import git
from project import ROOT, RUNS, Refused, read_json, write_json

RUNNING = Path("runs/running.json")  # in every worktree: what runs there now


@dataclass
class Running:
    """What runs in a worktree now, for the status line and so that no other worktree tries the same."""

    pid: int
    number: int  # of the experiment
    activity: str  # "candidate, run 1"
    started: float  # unix time
    budget: int  # seconds
    train: str = ""  # blob of train.py
    conversation: str = ""  # of the agent that started it; "" for a person


def announce(number: int, activity: str, budget: int, train: str = "") -> None:
    """Say what runs here from now on. Raises OSError."""
    agent = os.environ.get("CLAUDE_CODE_SESSION_ID", "")
    write_json(ROOT / RUNNING, asdict(Running(os.getpid(), number, activity, time.time(), budget, train, agent)))


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
    """The experiment that runs now and how long it may still train, '' when none does."""
    now = running()
    if not now:
        return ""
    left = min(now.budget, now.started + now.budget - time.time())  # the clock may have been set back
    limit = f", at most {left:.0f} s left" if left > 0 else ", finishing"
    return f"experiment {now.number} ({now.activity})" + (limit if "run" in now.activity else "")


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
