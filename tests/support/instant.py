"""The whole repository with a client in mind: data and a baseline are made up, an experiment takes half a second.

`create` leaves run.sh as it is. `make_instant` puts another in its place, which starts the harness with a stand-in for
the engine and for measuring (given.py, in_process.py), so that all else is real: proofs, record, phases, result block.
"""

from __future__ import annotations

import sys
from pathlib import Path

from in_process import Small, train_py
from repository import Project, block, copy_of_the_repository

SUPPORT = Path(__file__).resolve().parent
RUN_SH = """#!/bin/bash
cd "$(dirname "$0")" || exit
exec {python} -I -X utf8 -B {given} "$PWD/container/harness" "$(cat .git/given.py)" "$@"
"""
# `slow`: a file with the seconds that a training takes
MADE_UP = f"""
import sys, time
sys.path.append({str(SUPPORT)!r})
import in_process

def run(job):
    slow = project.ROOT / "slow"
    time.sleep(float(slow.read_text()) if slow.exists() else 0)
    return in_process.measured(measure, job)

measure.run = run
engine.find_image, engine.gpus, engine.sweep = lambda: "sha256:made-up", lambda: [], lambda background=False: None
experiment.refresh_report = report.report = lambda: None
"""
# ./run.sh alone: every time another train.py and hypothesis, as if the agent had written them; it loses
IDEA = """
if not sys.argv[3:]:
    number = 1 + sum(1 for _ in (project.ROOT / "runs").glob("*.diff"))
    (project.ROOT / "train.py").write_text(in_process.train_py(150, f"# {number}"))
    (project.ROOT / "scratchpad.md").write_text(f"## Next experiment\\nidea {number}\\n")
"""


def create(path: Path) -> Project:
    """Not measured for real: `run.sh` would measure another baseline."""
    project = copy_of_the_repository(path)
    Small(path).make_data("prints")
    project.write("train.py", train_py(100))
    project.git("commit", "-qam", "a train.py that is not run")
    done = project.run(given=MADE_UP)
    assert block(done.stdout)["verdict"] == "baseline", done.stdout + done.stderr
    return project


def make_instant(project: Project, idea: bool = True) -> None:
    """idea: ./run.sh writes the next train.py by itself."""
    project.write("run.sh", RUN_SH.format(python=sys.executable, given=SUPPORT / "given.py"))
    project.write(".git/given.py", MADE_UP + IDEA * idea)
    project.git("commit", "-qam", "run.sh of a test")


def give(project: Project, script: str) -> None:
    """To every run of an instant project from now on."""
    project.write(".git/given.py", project.read(".git/given.py") + script)


def clocks(**seconds: float) -> str:
    """To be given to a night: constants of night.py."""
    return "".join(f"night.{name} = {value}\n" for name, value in seconds.items())
