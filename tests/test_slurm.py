"""A launch command: experiments on a real Slurm of one node, whatever ends them; and the lifeline that needs no Slurm.

This machine is the node, so what run.sh removes at its end would hide a container that stayed behind: here it does not.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Project, block
from slurm import Slurm, wait_for
from sweep import CANDIDATES, QUICK, copy, quick

LIFELINE_S = 20  # in most of these tests; 60 in the one that takes it as it is
SWEEP = "    if left:\n        run([*client()"
SLEEP = QUICK + """
    import time
    for step in range(1, 1501):
        print(f"step {step}/1500", flush=True)
        time.sleep(0.2)
"""
NOT_YOURS = "not the edit's fault; the same idea may be tried again"


@pytest.fixture(scope="module")
def base(measured: Project, tmp_path_factory) -> Project:
    """A project whose incumbent's training takes no time; sandboxes that lost their lifeline wait less."""
    made = copy(measured, tmp_path_factory.mktemp("slurm") / "edited")
    made.edit(SWEEP, SWEEP.replace("left:", 'left and not os.environ.get("AR_LAUNCH"):'), "container/engine.py")
    made.edit("LIFELINE_S = 60", f"LIFELINE_S = {LIFELINE_S}", "container/stage.py")
    return quick(tmp_path_factory.mktemp("slurm") / "base", made)


@pytest.fixture(scope="module")
def slurm():
    """For jobs that leave the node as it is."""
    made = Slurm()
    yield made
    made.stop()


@pytest.fixture
def other_slurm():
    """For those that do not."""
    made = Slurm()
    yield made
    made.stop()


@pytest.fixture
def start(base: Project, tmp_path: Path):
    """start(launch, slurm): a training that sleeps, of a project of its own, by that command."""
    runs = []

    def make(launch: str = "", slurm: Slurm | None = None, stage: str = "captions") -> Running:
        runs.append(Running(copy(base, tmp_path / f"p{len(runs)}"), launch, slurm))
        runs[-1].wait_for(stage)
        return runs[-1]

    yield make
    for run in runs:
        run.kill_all()


class Running:
    """./run.sh in a session of its own."""

    def __init__(self, project: Project, launch: str, slurm: Slurm | None):
        self.project, self.slurm, self.out = project, slurm, project.path.parent / f"{project.path.name}.out"
        prepare(project, launch, SLEEP)
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                ["./run.sh"],
                cwd=project.path,
                env={**os.environ, **(slurm.env if slurm else {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, stage: str) -> None:
        """Until this stage's container is there."""
        wait_for(lambda: re.search(rf"-{stage}$", self.names(), re.M) or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.out.read_text()

    def names(self) -> str:
        return "\n".join(name(c) for c in self.project.containers().split())

    def jobs(self) -> list[str]:
        """The numbers of its jobs, the training's first; of one project alone on this Slurm."""
        return sorted(self.slurm.call("squeue", "-h", "-o", "%i").split(), key=int)

    def pids(self, words: str) -> list[int]:
        """Processes of its session with these words in their command line."""
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                session = int((p / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid and words in (p / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(p.name))
            except OSError:
                continue
        return sorted(found)

    def gone(self, limit_s: float) -> float:
        """Seconds until no container of the project is left."""
        return wait_for(lambda: self.project.containers() == "", limit_s)

    def ended(self, limit_s: float = 60) -> tuple[int, dict]:
        """Its exit status and result block."""
        return self.process.wait(limit_s), block(self.out.read_text())

    def kill_all(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def name(container: str) -> str:
    done = subprocess.run(
        ["podman", "ps", "-a", "--filter", f"id={container}", "--format", "{{.Names}}"], capture_output=True, text=True
    )
    return done.stdout.strip()


def prepare(project: Project, launch: str, code: str) -> None:
    if launch:
        project.edit("stop:", f"launch: {launch}\nstop:", "program.md")
    project.write("train.py", code)
    project.hypothesis("an idea")


def works(run: Running) -> None:
    """The next run, with another train.py, is as good as any."""
    run.project.write("train.py", CANDIDATES["kept"])
    done, shown = run.project.experiment("the next one", env=run.slurm.env if run.slurm else None)
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert run.project.containers() == ""


def failed_because(run: Running, reason: str) -> None:
    status, shown = run.ended()
    assert (status, shown.get("verdict")) == (1, "failed"), run.out.read_text()
    assert shown["reason"] == f"{reason}: {NOT_YOURS}"
    assert run.project.read("train.py") == QUICK


def test_an_experiment_through_srun(base: Project, slurm: Slurm, tmp_path: Path):
    project = copy(base, tmp_path / "repo")
    prepare(project, "srun -n1", CANDIDATES["kept"])
    done = project.run(env=slurm.env)
    shown = block(done.stdout)
    assert (done.returncode, shown["verdict"]) == (0, "kept") and done.stderr == "", done.stdout + done.stderr
    assert project.containers() == "" and slurm.call("squeue", "-h") == ""


@pytest.mark.parametrize("how", ["scancel", "scancel -s KILL", "kill srun"])
def test_a_training_that_is_ended_by_others(how: str, start, slurm: Slurm):
    run = start("srun -n1", slurm)
    if how == "kill srun":
        os.kill(run.pids("srun -n1")[0], signal.SIGKILL)
    else:
        slurm.call(*how.split(), run.jobs()[0])
    print(how, run.gone(15))
    print(run.out.read_text(), run.project.read("runs/0003.log")[-1500:])
    run.ended()
    works(run)
