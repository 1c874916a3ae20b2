"""report.html and progress.png: gathers the record from git, has both drawn in a container, puts them in place.

The report shows validation pairs, which the agent must not see: what is drawn from goes to the container on standard
input, what is drawn comes back on standard output, and nothing of it lies in runs/.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import subprocess
import time
from dataclasses import asdict

import dataset
import engine
import git
import locks
from history import History
from project import INSIDE, ROOT, RUNS, Refused, visible, write_whole
from record import REFS, Record

ERROR = RUNS / "report.err"  # why drawing in the background failed the last time
LIMIT_S = 180
MEMORY = "2g"
MAX_DIFFS = 200  # the newest experiments whose diff is in the page
MAX_DIFF = 12_000  # characters
MAX_DETAILED = 40  # the newest experiments whose log and retrieval are sent, besides the kept ones


class NothingToShow(Refused):
    """Nothing comparable was measured yet."""


def diff(r: Record) -> str:
    """The hunks of an experiment's change to train.py; '' without one, or where its commit is not in this clone."""
    options = ["--no-color", "--no-ext-diff", "--no-textconv"]
    text = git.read("diff", *options, f"{REFS}{r.number}^", f"{REFS}{r.number}", "--", "train.py", check=False)
    hunks = text[text.find("\n@@") + 1 :].rstrip("\n")
    return hunks if len(hunks) <= MAX_DIFF else hunks[:MAX_DIFF] + "\n[... cut ...]"


def gather() -> dict:
    """What the report is drawn from. Raises NothingToShow, ProgramError."""
    history = History.load()
    compared = [r for r in history.compared if r.verdict not in ("audit", "final")]
    kept = [r for r in compared if r.verdict in ("kept", "baseline")]
    if not any(history.values_by_train[r.train] for r in kept):
        raise NothingToShow("there is nothing to show: nothing comparable was measured yet; run ./run.sh first")
    path = (REFS + "{}:experiment/{}").format
    names = [path(r.number, "result.json") for r in history.records]
    for r in compared:
        if r in kept or r in compared[-MAX_DETAILED:]:
            names += [path(r.number, file) for file in ("train.log", "ranks.npy", "examples.npy")]
    return {
        "program": asdict(history.program),
        "sigma": history.sigma,
        "now": int(time.time()),
        "running": locks.running_line(),
        "branch": history.branch,
        "experiments": [{**asdict(r), "comparable": r in compared} for r in history.records],
        "diffs": {r.number: diff(r) for r in history.records[-MAX_DIFFS:]},
        "files": {name: base64.b64encode(content).decode() for name, content in git.contents(names).items()},
    }


def draw(found: dict) -> dict[str, str]:
    """{file: content in base64}, drawn in a container. Raises Refused."""
    data = dataset.folder(found["program"]["data"])
    mounts = {"/harness": INSIDE, "/data/val": data / "val", "/data/val.key.npy": data / "val.key.npy"}
    container = engine.Container(
        name=f"ar-{os.getpid()}-report",
        image=engine.find_image(),
        command=["timeout", "-k1", str(LIMIT_S), "nice", "-n19", "python", "-I", "/harness/draw_report.py"],
        memory=MEMORY,
        limit_s=LIMIT_S,
        mounts={inside: host for inside, host in mounts.items() if host.exists()},
        gpu=False,
        background=True,
    )
    argv = engine.arguments(container)
    try:
        done = subprocess.run(argv, input=json.dumps(found).encode(), capture_output=True, timeout=LIMIT_S + 10)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise Refused(f"the report was not drawn within {LIMIT_S} s; try again when the machine is less busy") from None
    except ValueError:
        error = visible(done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
        raise Refused(f"the report was not drawn: {error or 'the container said nothing'}") from None
    finally:
        engine.kill(container.name)


def make(wait: bool) -> None:
    """Draw report.html and progress.png. One drawing at a time in all worktrees.

    Raises Refused, ProgramError, and BlockingIOError when another is under way and is not to be waited for.
    """
    with (git.folder() / "autoresearch.report").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        engine.sweep(background=True)  # what a killed one left
        for name, content in draw(gather()).items():
            write_whole(ROOT / name, base64.b64decode(content))


def report() -> None:
    make(wait=True)
    print(ROOT / "report.html", ROOT / "progress.png", sep="\n")


def refresh() -> None:
    """Draw in the background of a training: lowest priority, and silent. A failure is left for `status` to show."""
    os.nice(19)
    try:
        make(wait=False)
        ERROR.unlink(missing_ok=True)
    except (NothingToShow, BlockingIOError):
        pass  # it is too early, or another is being drawn
    except Exception as error:
        with contextlib.suppress(OSError):
            write_whole(ERROR, visible(f"{type(error).__name__}: {error}".replace("\n", " ")) + "\n")
