"""Several worktrees of one repository, one device each: they share the record and the data, and nothing else.

What needs no containers, such as many worktrees and many runs, is in tests/unit/test_experiment.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engine
import stand_ins
from repository import CANDIDATES, QUICK, ROOT, Project, block

DEVICES = "memory: 3 GB"  # the line of the plan that `devices` stands under
LIMIT_S = 240


@pytest.fixture
def pair(quick_base: Project, tmp_path: Path) -> tuple[Project, Project]:
    """A repository and a second worktree of it on a branch of its own, with two devices."""
    project = quick_base.copy(tmp_path / "one")
    project.edit(DEVICES, f"{DEVICES}\ndevices: 2", "program.md")
    project.git("commit", "-qm", "two devices", "program.md")
    project.git("worktree", "add", "-q", "-b", "second", str(tmp_path / "two"))
    other = Project(tmp_path / "two")
    other.given = project.given
    return project, other


def wait_for(project: Project, what: str) -> None:
    """Until the run there has come so far."""
    deadline = time.monotonic() + LIMIT_S
    while f"({what}" not in project.run("status").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def slow(text: str, seconds: int = 6) -> str:
    return text.replace(
        'if __name__ == "__main__":', f'if __name__ == "__main__":\n    import time; time.sleep({seconds})'
    )


def test_two_at_once_share_the_record_and_nothing_else(pair):
    one, two = pair
    one.write("train.py", slow(CANDIDATES["kept"]))
    one.hypothesis("the sign")
    two.write("train.py", slow(CANDIDATES["discarded"]))
    two.hypothesis("the other sign")
    first, second = one.start(), two.start()
    wait_for(one, "candidate, run 1")
    wait_for(two, "candidate, run 1")  # at the same time: neither sweeps the other's containers
    assert one.containers() and two.containers() and one.containers() != two.containers()
    again = one.run()
    assert again.returncode == 2 and "another experiment is running: experiment" in again.stderr
    shown = [block(run.communicate(timeout=LIMIT_S)[0]) for run in (first, second)]
    assert [s["verdict"] for s in shown] == ["kept", "discarded"]
    assert {s["experiment"] for s in shown} == {"3", "4"}
    assert one.experiments() == two.experiments() == [1, 2, 3, 4]
    branches = {one.trailers(f"refs/experiments/{n}")["Branch"] for n in (3, 4)}
    assert branches == {"main", "second"}
    assert one.read("train.py") == slow(CANDIDATES["kept"]) and two.read("train.py") == QUICK
    assert two.git("rev-parse", "HEAD:train.py") == two.git("hash-object", "train.py")
    assert not one.containers() and not two.containers()
    # a person takes over what is better on the other branch
    number = shown[0]["experiment"]
    value = float(one.trailers(f"refs/experiments/{number}")["Mean-Rank"])
    text = f"elsewhere: experiment {number} on branch main has {value:.1f}; a person takes it over"
    assert text in two.run("status").stdout and two.run("keep", number).returncode == 0
    assert two.read("train.py") == one.read("train.py") and "elsewhere" not in two.run("status").stdout
    assert two.run("report").returncode == 0 and (two.path / "report.html").exists()


def test_one_device_is_waited_for_and_the_same_file_is_not_tried_twice(pair, tmp_path):
    one, two = pair
    for project in pair:
        project.edit("devices: 2", "devices: 1", "program.md")
    one.write("train.py", slow(CANDIDATES["discarded"]))
    one.hypothesis("worse")
    first = one.start()
    wait_for(one, "candidate, run 1")
    two.write("train.py", slow(CANDIDATES["discarded"]))
    two.hypothesis("worse, elsewhere")
    done = two.run()
    assert done.returncode == 2 and "is being judged in the worktree one; change something else" in done.stderr
    two.write("train.py", CANDIDATES["discarded"])
    second = two.start()
    wait_for(two, "waits for a device")
    assert not two.containers()
    assert block(first.communicate(timeout=LIMIT_S)[0])["experiment"] == "3"
    assert block(second.communicate(timeout=LIMIT_S)[0])["experiment"] == "4"
    two.write("train.py", slow(CANDIDATES["discarded"]))
    two.hypothesis("worse, later")
    done = two.run()
    assert done.returncode == 2 and "already judged: experiment 3" in done.stderr
    # a run that is killed gives its device back, when its containers have noticed
    one.given += stand_ins.stage(tmp_path, "stage.LIFELINE_S = 12")
    one.write("train.py", slow(CANDIDATES["discarded"], 60))
    one.hypothesis("slow")
    third = one.start()
    wait_for(one, "candidate, run 1")
    third.kill()
    third.communicate()
    two.write("train.py", CANDIDATES["kept"])
    assert two.experiment("better", timeout=LIMIT_S)[1]["verdict"] == "kept"


@pytest.mark.parametrize(("device", "gpu"), [(0, 0), (1, 1), (3, 1)])
def test_a_device_is_a_gpu_of_its_own(tmp_path: Path, device: int, gpu: int):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: GPU-a)'\necho 'GPU 1: NVIDIA (UUID: GPU-b)'\n")
    fake.chmod(0o755)
    code = f"import engine; print(engine.name(), len(engine.gpus()), *engine.gpu_options({device}))"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "container/harness", env=env, capture_output=True, text=True
    )
    wanted = {"podman": f"--device nvidia.com/gpu={gpu}", "docker": f"--gpus device={gpu}"}[engine.name()]
    assert done.stdout == f"{engine.name()} 2 {wanted}\n", done.stderr
