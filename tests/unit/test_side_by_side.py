"""Several worktrees at once, and a record of a thousand experiments."""

from __future__ import annotations

import collections
import multiprocessing
import resource
import subprocess

from in_process import DISCARDED, KEPT, VALUES, Small, train_py, variant
from repository import block

SAMPLE, FULL = (3, 3, 2), (8, 25, 3)  # worktrees, runs of each, devices
RECORDED, TIMES, SLOWER_S = 1000, 2, 0.3  # experiments; runs of which the fastest counts; what they may cost of a CPU


def test_a_branch_that_is_better_is_told_of_and_a_branch_with_another_budget_changes_nothing(small: Small, tmp_path):
    other, third = small.worktree(tmp_path / "two", "second"), small.worktree(tmp_path / "three", "third")
    small.write("train.py", KEPT)
    assert small.experiment("better")[1]["verdict"] == "kept"
    other.write("train.py", DISCARDED)
    _, shown = other.experiment("worse")
    assert shown["elsewhere"].startswith("experiment 2 on branch main has 50.0; a person takes it over with")
    assert f"elsewhere: {shown['elsewhere']}" in other.run("status").stdout
    assert other.run("keep", "2").returncode == 0
    third.git("checkout", "main", "--", "train.py")  # the other way, as README says
    third.git("commit", "-qm", "from main", "--", "train.py")
    for n, tree in enumerate((other, third)):
        assert tree.read("train.py") == KEPT and "elsewhere" not in tree.run("status").stdout
        tree.write("train.py", variant(DISCARDED, n))
        _, shown = tree.experiment(f"worse again, {n}")
        assert shown["verdict"] == "discarded" and shown["before"].startswith("50.0"), shown  # no new baseline
    before = small.run("status").stdout
    other.edit("budget: 120", "budget: 60", "program.md")
    assert block(other.run().stdout)["verdict"] == "baseline" and small.run("status").stdout == before
    assert "not measured" not in other.run("status").stdout


def test_no_experiment_is_lost_or_doubled_in_worktrees_side_by_side(small: Small, tmp_path, request, figure):
    count, runs, devices = FULL if request.config.getoption("full") else SAMPLE
    small.edit("memory: 3 GB", f"memory: 3 GB\ndevices: {devices}", "program.md")
    small.edit("until: 40", "until: 4000", "program.md")
    small.git("commit", "-qm", "devices", "program.md")
    worktrees = [small, *(small.worktree(tmp_path / f"w{i}", f"b{i}") for i in range(1, count))]
    with multiprocessing.get_context("fork").Pool(count) as pool:
        ran = sorted(
            row for rows in pool.starmap(night, [(w, i, runs) for i, w in enumerate(worktrees)]) for row in rows
        )
    recorded = []
    for n in small.experiments()[1:]:
        trailers = small.trailers(f"refs/experiments/{n}")
        assert int(trailers["Experiment"]) == n and len(trailers["Mean-Rank-Runs"].split()) == 1
        if trailers["Verdict"] != "remeasured":  # the incumbent, after ten discards
            train = small.git("rev-parse", f"refs/experiments/{n}:train.py")
            recorded.append((n, trailers["Verdict"], trailers["Branch"], train))
    wrong = len(set(ran) ^ set(recorded)) + abs(len(ran) - len(recorded))
    wrong += sum(not tree.read("train.py").startswith(KEPT) for tree in worktrees)
    figure(f"experiments in {count} worktrees on {devices} devices: lost or doubled", len(ran), wrong)
    assert wrong == 0 and len(ran) == count * runs
    assert subprocess.run(["git", "fsck", "--no-dangling"], cwd=small.path, capture_output=True).returncode == 0
    assert not list((small.path / ".git/refs").rglob("*.lock"))


def night(project: Small, which: int, runs: int) -> list[tuple]:
    """(number, verdict, branch, blob) of every run in one worktree; one of them is kept."""
    found = []
    for i in range(runs):
        verdict = "kept" if i == runs // 2 else "discarded"
        project.write("train.py", train_py(VALUES[verdict], f"# {which} {i}\n"))
        blob = project.git("hash-object", "train.py")
        done, shown = project.experiment(f"idea {i} of worktree {which}")
        assert shown.get("verdict") == verdict, done.stdout + done.stderr
        found.append((int(shown["experiment"]), verdict, project.git("branch", "--show-current"), blob))
    return found


def test_a_thousand_experiments_cost_no_time(small: Small, tmp_path, figure):
    """All that the harness itself does for an experiment, against two records."""
    many, seconds = small.copy(tmp_path / "many"), collections.defaultdict(list)
    many.edit("until: 40", f"until: {2 * RECORDED}", "program.md")
    many.add_made_up(RECORDED)
    assert len(many.experiments()) == RECORDED + 1
    many.write("train.py", DISCARDED)
    many.experiment("where the incumbent is due to be measured once more, that is tried now")
    for i in range(TIMES):
        for repo in (small, many):
            repo.write("train.py", f"{DISCARDED}# {i}\n")
            before = cpu_seconds()
            done, shown = repo.experiment(f"idea {i}")
            seconds[repo.path].append(cpu_seconds() - before)
            assert shown["verdict"] == "discarded", done.stdout + done.stderr
    few, took = (min(took) for took in seconds.values())  # the least disturbed by whatever else runs
    figure("1,000 experiments", 2 * TIMES, int(took > few + SLOWER_S), seconds=round(took, 2), few=round(few, 2))
    assert took <= few + SLOWER_S, seconds


def cpu_seconds() -> float:
    """Of what has ended: other work on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
