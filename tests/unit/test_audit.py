"""The numbers to publish, without their trainings (with them: tests/engine/test_publish.py)."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from in_process import DISCARDED, KEPT, Point, Small
from repository import CRASH

UNFINISHED = Path("final/work")  # of an audit under way


NOISY = """
import random
dataset.prepare, quiet = lambda *words: 0, measure.run
def noisy(job):
    run = quiet(job)
    run.metrics["mean_rank"] *= random.uniform(0.99, 1.01)
    return run
measure.run = noisy
"""


def test_audits_and_finals_are_recorded_counted_and_change_nothing(small: Small):
    """Their numbers, with real trainings: tests/engine/test_publish.py."""
    small.write("train.py", KEPT)
    small.experiment("better")
    small.write("train.py", CRASH)  # of the user, who goes on
    before = small.git("rev-parse", "HEAD"), small.run("status").stdout, small.read("runs/experiments.tsv")
    for n, words in enumerate((["final"], ["audit", "2", "--ablate"], ["final"]), 3):
        done = small.run(*words, given=NOISY)
        assert done.returncode == 0 and f"in final/{n:04d}\n" in done.stdout, done.stdout + done.stderr
        result = json.loads(small.git("show", f"refs/experiments/{n}:experiment/result.json"))
        assert result == json.loads(small.read(f"final/{n:04d}/result.json")) and result["experiment"] == n
        assert result["values"] == [
            run["metrics"]["mean_rank"] for run in result["runs"] if run["side"] in ("best", "final training")
        ]
    looks = [small.trailers(f"refs/experiments/{n}").get("Test-Look") for n in (3, 4, 5)]
    assert looks == ["1", None, "2"] and "evaluation:  2 of this test split" in done.stdout
    row = json.loads(small.git("show", "refs/experiments/4:experiment/result.json"))["audit"]["ablation"][0]
    assert row["experiment"] == 2 and len(row["values"]) == 2 and row["percent"] > 50  # it was all that had been kept
    after = small.git("rev-parse", "HEAD"), small.run("status").stdout, small.read("runs/experiments.tsv")
    assert after == before and small.read("train.py") == CRASH and not list((small.path / "runs").glob("*pending*"))


def test_a_training_that_was_cut_short_is_no_silent_part_of_an_audit(small: Small):
    small.write("train.py", KEPT + "# prints step 35/60 loss 3.7\n# prints step 42/60 loss 3.6\n")
    assert small.experiment("better")[1]["verdict"] == "kept"
    warning = "run.sh: warning: best: cut short at 42 of 60 steps and 42 of 60 steps"
    done = small.run("audit", "2", given=NOISY)
    assert done.returncode == 0 and warning in done.stderr and "baseline: cut" not in done.stderr


def test_git_does_not_remove_a_worktree_with_a_final_checkpoint(small: Small, tmp_path: Path):
    """Which git ignores, as it does logs: those of an audit the record has too."""
    tree = small.worktree(tmp_path / "tree", "tree")
    tree.write("train.py", KEPT)
    tree.experiment("better")
    remove = ["git", "worktree", "remove", "--force", tree.path]
    for words, reason in ((["audit", "2"], ""), (["final"], "the checkpoint in final/0004 would be lost")):
        done = tree.run(*words, given=NOISY)
        assert done.returncode == 0, done.stderr
        locked = small.git("worktree", "list", "--porcelain").partition("\nlocked")[2].strip()
        assert locked == reason
    refused = subprocess.run(remove, cwd=small.path, capture_output=True, text=True)
    assert refused.returncode and reason in refused.stderr and (tree.path / "final/0004").is_dir()


def test_an_audit_that_is_killed_goes_on_where_it_was(small: Small):
    small.write("train.py", KEPT)
    small.experiment("better")
    for _ in range(2):
        assert small.run("audit", "2", "--ablate", given=NOISY, point=Point("measure run-4", "before")).returncode == -9
    assert sorted(file.parent.name for file in (small.path / "final/work").glob("*/finished.json")) == [
        "run-1",
        "run-2",
        "run-3",
    ]
    seeds = [json.loads(small.read(UNFINISHED / f"run-{n}/finished.json"))["run"]["seed"] for n in (1, 2, 3)]
    done = small.run("audit", "2", "--ablate", given=NOISY)
    assert done.returncode == 0 and "in final/0003\n" in done.stdout, done.stdout + done.stderr
    calls = json.loads(small.calls_file.read_text())
    assert [call for call in calls if "measure" in call] == [f"measure run-{n}" for n in (4, 5, 6)]
    runs = json.loads(small.git("show", "refs/experiments/3:experiment/result.json"))["runs"]
    assert [run["seed"] for run in runs][:3] == seeds and len({run["seed"] for run in runs}) == 6
    small.write("train.py", DISCARDED)
    assert not (small.path / UNFINISHED).exists()
    assert small.run("audit", "2", given=NOISY).returncode == 0  # another one, with pairs and trainings of its own
    calls = json.loads(small.calls_file.read_text())
    assert [call for call in calls if "measure" in call] == [f"measure run-{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "left",
    [
        "sed -i 's/budget: 120/budget: 119/' program.md",  # which is not comparable
        f"rm -r {UNFINISHED / 'run-2'}",
        f"echo nonsense >{UNFINISHED / 'run-2/finished.json'}",
        f"cd {UNFINISHED}; cp -r run-3 run-9; rm -r run-1",
    ],
)
def test_what_another_audit_left_is_not_taken_for_this_ones(small: Small, left: str):
    small.write("train.py", KEPT)
    small.experiment("better")
    assert small.run("audit", "2", given=NOISY, point=Point("measure run-4", "before")).returncode == -9
    subprocess.run(["bash", "-ec", left], cwd=small.path, check=True)
    if "budget" in left:
        assert small.run("audit", "2").returncode == 2  # nothing is measured with that budget
        assert (small.path / UNFINISHED / "run-3/finished.json").exists()
        small.git("checkout", "program.md")
    done = small.run("audit", "2", given=NOISY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in (small.path / "final/0003").glob("run-*")) == [f"run-{n}" for n in (1, 2, 3, 4)]


def test_a_training_that_the_machine_lost_is_no_result_and_the_audit_goes_on_after_it(small: Small):
    small.write("train.py", KEPT)
    small.experiment("better")
    lost = """
done = []
def lose(job):
    done.append(job)
    return noisy(job) if len(done) < 6 else measure.Run("lost", 1, "Slurm: preempted: not the edit's fault")
measure.run = lose
"""
    done = small.run("audit", "2", "--ablate", given=NOISY + lost)
    assert (done.returncode, done.stdout) == (2, "") and "best without 2: Slurm: preempted; the same" in done.stderr
    assert small.experiments() == [1, 2]
    assert small.run("audit", "2", "--ablate", given=NOISY).returncode == 0
    calls = json.loads(small.calls_file.read_text())
    assert [call for call in calls if "measure" in call] == ["measure run-6"]


@pytest.mark.parametrize("odd", [b"# caf\xe9\n", b"\xff\xfe\0\0\n", b"x = 1\r\n", "# \ud7ff \u202e\n".encode()])
def test_a_train_py_of_any_bytes_is_kept_audited_and_shown(small: Small, odd: bytes):
    text = KEPT.encode() + odd + b"# the end"
    (small.path / "train.py").write_bytes(text)
    assert small.experiment("odd bytes")[1]["verdict"] == "kept" and small.blob("HEAD:train.py") == text
    assert "+VALUE = 50" in small.read("runs/0002.diff") and "Binary" not in small.read("runs/0002.diff")
    more = text.replace(b"VALUE = 50", b"VALUE = 25")
    (small.path / "train.py").write_bytes(more)
    assert small.experiment("more of them")[1]["verdict"] == "kept"
    done = small.run("audit", "2", "--ablate", given=NOISY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    logs = [(small.path / f"final/0004/run-{n}/train.log").read_text() for n in (3, 4)]
    assert all(f"sha256 {hashlib.sha256(more).hexdigest()}" in log for log in logs)
    assert "VALUE = 25" in small.python("print([report.diff(r) for r in record.load_all()])")
