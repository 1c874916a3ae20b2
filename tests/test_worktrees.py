"""Several worktrees of one repository, one device each: they share the record and the data, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Project, block, engine
from sweep import CANDIDATES, QUICK

DEVICES = "memory: 3 GB"  # the line of the plan that `devices` stands under
LIMIT_S = 240
SAMPLE = (3, 2, 2)  # worktrees, runs of each, devices
FULL = (8, 25, 3)


@pytest.fixture
def pair(quick_base: Project, tmp_path: Path) -> tuple[Project, Project]:
    """A repository and a second worktree of it on a branch of its own, with two devices."""
    project = quick_base.copy(tmp_path / "one")
    project.edit(DEVICES, f"{DEVICES}\ndevices: 2", "program.md")
    project.git("commit", "-qm", "two devices", "program.md")
    project.git("worktree", "add", "-q", "-b", "second", str(tmp_path / "two"))
    return project, Project(tmp_path / "two")


def start(project: Project) -> subprocess.Popen:
    return subprocess.Popen(
        ["./run.sh"], cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


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
    first, second = start(one), start(two)
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


def test_one_device_is_waited_for_and_the_same_file_is_not_tried_twice(pair):
    one, two = pair
    for project in pair:
        project.edit("devices: 2", "devices: 1", "program.md")
    one.write("train.py", slow(CANDIDATES["discarded"]))
    one.hypothesis("worse")
    first = start(one)
    wait_for(one, "candidate, run 1")
    two.write("train.py", slow(CANDIDATES["discarded"]))
    two.hypothesis("worse, elsewhere")
    done = two.run()
    assert done.returncode == 2 and "is being judged in the worktree one; change something else" in done.stderr
    two.write("train.py", CANDIDATES["discarded"])
    second = start(two)
    wait_for(two, "waits for a device")
    assert not two.containers()
    assert block(first.communicate(timeout=LIMIT_S)[0])["experiment"] == "3"
    assert block(second.communicate(timeout=LIMIT_S)[0])["experiment"] == "4"
    two.write("train.py", slow(CANDIDATES["discarded"]))
    two.hypothesis("worse, later")
    done = two.run()
    assert done.returncode == 2 and "already judged: experiment 3" in done.stderr


def test_a_branch_with_another_budget_changes_nothing_here(pair):
    """Its records are newer, and compared with each other only; the phase here, and with it the web, stays."""
    one, two = pair
    before = one.run("status").stdout
    two.edit("budget: 120", "budget: 60", "program.md")
    assert block(two.run(timeout=LIMIT_S).stdout)["verdict"] == "baseline"
    assert one.run("status").stdout == before
    assert two.run("report").returncode == 0 and "not measured" not in two.run("status").stdout


def test_a_killed_run_gives_its_device_back(pair):
    one, two = pair
    for project in pair:
        project.edit("devices: 2", "devices: 1", "program.md")
    one.write("train.py", slow(CANDIDATES["discarded"], 60))
    one.hypothesis("slow")
    first = start(one)
    wait_for(one, "candidate, run 1")
    first.kill()
    two.write("train.py", CANDIDATES["discarded"])
    assert two.experiment("worse", timeout=LIMIT_S)[1]["verdict"] == "discarded"


@pytest.mark.parametrize(("device", "gpu"), [("", 0), ("1", 1), ("3", 1)])
def test_a_device_is_a_gpu_of_its_own(tmp_path: Path, device: str, gpu: int):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: GPU-a)'\necho 'GPU 1: NVIDIA (UUID: GPU-b)'\n")
    fake.chmod(0o755)
    asked = "import engine; print(engine.name(), engine.gpus(), *engine.gpu_flags())"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "AR_DEVICE": device}
    said = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT / "container", env=env, capture_output=True, text=True
    )
    wanted = {"podman": f"--device nvidia.com/gpu={gpu}", "docker": f"--gpus device={gpu}"}
    assert said.stdout.split(" ", 1) == [engine(), f"2 {wanted[engine()]}\n"], said.stderr


@pytest.mark.parametrize("way", ["keep", "git"])
def test_a_result_tells_that_another_branch_is_better_and_it_can_be_taken_over(pair, way: str):
    one, two = pair
    one.write("train.py", CANDIDATES["kept"])
    assert one.experiment("the sign")[1]["verdict"] == "kept"
    two.write("train.py", CANDIDATES["discarded"])
    _, shown = two.experiment("the other sign")
    value = one.trailers("refs/experiments/3")["Mean-Rank"]
    assert shown["elsewhere"].startswith(f"experiment 3 on branch main has {float(value):.1f}; a person takes it over")
    assert f"elsewhere: {shown['elsewhere']}" in two.run("status").stdout
    if way == "keep":
        assert two.run("keep", "3").returncode == 0
    else:  # as README says
        two.git("checkout", "main", "--", "train.py")
        two.git("commit", "-qm", "from main", "--", "train.py")
    assert two.read("train.py") == CANDIDATES["kept"] and "elsewhere" not in two.run("status").stdout
    two.write("train.py", CANDIDATES["discarded"] + "# once more")
    _, shown = two.experiment("the other sign again")
    assert shown["verdict"] == "discarded" and shown["before"].startswith(f"{float(value):.1f}"), (
        shown
    )  # no new baseline


def test_no_experiment_is_lost_or_doubled(quick_base: Project, tmp_path: Path, request, figure):
    count, runs, devices = FULL if request.config.getoption("full") else SAMPLE
    one = quick_base.copy(tmp_path / "w0")
    one.edit(DEVICES, f"{DEVICES}\ndevices: {devices}", "program.md")
    one.git("commit", "-qm", "devices", "program.md")
    for i in range(1, count):
        one.git("worktree", "add", "-q", "-b", f"b{i}", str(tmp_path / f"w{i}"))
    worktrees = [Project(tmp_path / f"w{i}") for i in range(count)]

    def night(which: int) -> list[tuple]:
        """(number, verdict, branch, blob) of every run in one worktree; one of them is kept."""
        project, found = worktrees[which], []
        for i in range(runs):
            verdict = "kept" if i == runs // 2 else "discarded"
            project.write("train.py", f"{CANDIDATES[verdict]}# {which} {i}\n")
            blob = project.git("hash-object", "train.py")
            done, shown = project.experiment(f"idea {i} of worktree {which}", timeout=3600)
            assert shown.get("verdict") == verdict, done.stdout + done.stderr
            found.append((int(shown["experiment"]), verdict, project.git("branch", "--show-current"), blob))
        return found

    with ThreadPoolExecutor(count) as pool:
        ran = sorted(row for rows in pool.map(night, range(count)) for row in rows)
    recorded = []
    for n in one.experiments()[2:]:
        said = one.trailers(f"refs/experiments/{n}")
        assert int(said["Experiment"]) == n and len(said["Mean-Rank-Runs"].split()) == 1
        if said["Verdict"] != "remeasured":  # the incumbent, after ten discards
            recorded.append(
                (n, said["Verdict"], said["Branch"], one.git("rev-parse", f"refs/experiments/{n}:train.py"))
            )
    wrong = len(set(ran) ^ set(recorded)) + abs(len(ran) - len(recorded))
    wrong += sum(not p.read("train.py").startswith(CANDIDATES["kept"]) for p in worktrees)
    figure(f"experiments in {count} worktrees on {devices} devices: lost or doubled", len(ran), wrong)
    assert wrong == 0 and len(ran) == count * runs
    assert subprocess.run(["git", "fsck", "--no-dangling"], cwd=one.path, capture_output=True).returncode == 0
    assert not any(p.containers() for p in worktrees) and not list((one.path / ".git/refs").rglob("*.lock"))
