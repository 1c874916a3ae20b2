"""report.html and progress.png: gathers the record from git, has both drawn in a container, puts them in place.

The report shows validation pairs, which the agent must not see: what is drawn from goes to the container on standard
input, what is drawn comes back on standard output, and nothing of it lies in runs/.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import time
from dataclasses import asdict

import display
import engine
import git
import locks
from history import History
from keep_rule import geometric_mean
from project import INSIDE, ROOT, RUNS, Refused, visible, write_whole
from record import FETCH, REFS, Record, results

SHARED_AS = "background"  # the label of its containers
ERROR = RUNS / "report.err"  # why drawing in the background failed the last time
LIMIT_S = 180
MEMORY = "2g"
MAX_DETAILED = 200  # the newest experiments whose diff and training loss are in the page
MAX_TEXT = 20_000  # characters of a diff, and of a log
KEPT = ("kept", "baseline")


class NothingToShow(Refused):
    """Nothing comparable was measured yet."""


def incumbents(history: History) -> tuple[dict[int, float], str]:
    """{experiment: mean of all runs until then of what this branch had kept after it}, and the train.py kept last.

    What others kept before the branch's first experiment came with the branch.
    """
    found, runs, train, begun = {}, {}, "", False
    for r in history.compared:
        runs.setdefault(r.train, []).extend(history.values(r))
        begun = begun or r.branch == history.branch
        ours = r.branch in ("", history.branch) or not begun
        if ours and r.verdict in KEPT and runs[r.train]:  # one kept by hand may be unmeasured
            train = r.train
        if train:
            found[r.number] = geometric_mean(runs[train])
    return found, train


def diff(r: Record) -> str:
    """The hunks of an experiment's change to train.py; '' without one, or where its commit is not in this clone."""
    text = git.diff(f"{REFS}{r.number}^:train.py", f"{REFS}{r.number}:train.py")
    hunks = text[text.find("\n@@") + 1 :].rstrip("\n").expandtabs(4)
    return hunks if len(hunks) <= MAX_TEXT else hunks[:MAX_TEXT] + "\n[... cut ...]"


def path(r: Record, name: str) -> str:
    """How git calls a file of an experiment's record."""
    return f"{REFS}{r.number}:experiment/{name}"


def experiments(history: History, incumbent: dict[int, float], sides: dict[str, Record]) -> list[dict]:
    """All attempts, with what the page shows of each."""
    detailed = [*history.records[-MAX_DETAILED:], *sides.values()]
    files = git.contents([path(r, "train.log") for r in detailed])
    return [
        {
            **asdict(r),
            "runs": history.values(r),
            "value": geometric_mean(history.values(r)) if history.values(r) else None,
            "incumbent": incumbent.get(r.number),
            "result": result,
            "log": files.get(path(r, "train.log"), b"").decode("utf-8", "replace")[:MAX_TEXT],
            "diff": diff(r) if r in detailed else None,
        }
        for r, result in zip(history.records, results(history.records))
    ]


def gather() -> dict:
    """What the report is drawn from. Raises NothingToShow, Refused, ProgramError."""
    history = History.load()
    if not any(history.values_by_train[r.train] for r in history.compared if r.verdict in KEPT):
        raise NothingToShow("there is nothing to show: nothing comparable was measured yet; run ./run.sh first")
    incumbent, best = incumbents(history)
    if not best:
        raise Refused(f"the report was not drawn: what this branch kept is missing; {FETCH}")
    measured = [r for r in history.compared if history.values(r) and r.number in incumbent]
    sides = {"baseline": measured[0], "best": [r for r in measured if r.train == best][-1]}
    arrays = {}
    for side, r in sides.items():
        found = git.contents([path(r, "ranks.npy"), path(r, "examples.npy")])
        arrays[side] = [base64.b64encode(content).decode() for content in found.values()]
    return {
        "program": asdict(history.program),
        "sigma": history.sigma,
        "now": int(time.time()),
        "running": locks.running_line(),
        "spent": [pair for pair in display.spent(history) if pair[1]],
        "comparable": history.comparable,
        "experiments": experiments(history, incumbent, sides),
        "sides": {side: r.number for side, r in sides.items()},
        "arrays": arrays,  # of each side: ranks.npy, examples.npy, where the record has them
    }


def draw(found: dict) -> dict[str, str]:
    """{file: content in base64}, drawn in a container. Raises Refused."""
    data = git.data_folder(found["program"]["data"])
    mounts = {"/harness": INSIDE, "/data/val": data / "val", "/data/val.key.npy": data / "val.key.npy"}
    mounts = {inside: host for inside, host in mounts.items() if host.exists()}
    name, command = f"ar-{os.getpid()}-report", ["nice", "-n19", "python", "-I", "/harness/draw_report.py"]
    how = {"background": True, "shared_as": SHARED_AS}
    container = engine.Container(name, engine.find_image(), command, MEMORY, mounts, **how)
    argv, given = engine.arguments(container), json.dumps(found).encode()
    try:
        done = subprocess.run(argv, input=given, capture_output=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Refused(f"the report was not drawn within {LIMIT_S} s; try again when the machine is less busy") from None
    finally:
        engine.kill(name)
    if done.returncode:
        error = visible(done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2])
        raise Refused(f"the report was not drawn: {error or 'the container said nothing'}")
    return json.loads(done.stdout)


def make(wait: bool) -> None:
    """Draw report.html and progress.png. One drawing at a time in all worktrees.

    Raises Refused, ProgramError, and BlockingIOError when another is under way and is not to be waited for.
    """
    with locks.held(git.folder() / "autoresearch.report", wait):
        engine.sweep(SHARED_AS)  # what a killed one left
        for name, content in draw(gather()).items():
            write_whole(ROOT / name, base64.b64decode(content))
        ERROR.unlink(missing_ok=True)


def report() -> None:
    make(wait=True)
    print(ROOT / "report.html", ROOT / "progress.png", sep="\n")


def refresh() -> None:
    """Draw in the background of a training: lowest priority, and silent. A failure is left for `status` to show."""
    os.nice(19)
    try:
        make(wait=False)
    except (NothingToShow, BlockingIOError):
        pass  # it is too early, or another is being drawn
    except Exception as error:
        with contextlib.suppress(OSError):
            write_whole(ERROR, visible(f"{type(error).__name__}: {error}".replace("\n", " ")) + "\n")
