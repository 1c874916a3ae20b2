"""audit and final: recorded, counted, and out of the loop's sight."""

from __future__ import annotations

import fcntl
import json
import tarfile

import pytest

from repository import CANDIDATES, Project


@pytest.fixture
def improved(fast: Project) -> Project:
    """One change is kept: experiment 3. Nothing is known of the train.py that ships."""
    fast.git("update-ref", "-d", "refs/experiments/1")
    (fast.path / ".git/autoresearch.experiments").unlink()  # or it comes back
    fast.edit("stop: 100 experiments", "stop: 100 experiments\nfinal_budget: 120", "program.md")
    done = fast.run("audit")
    assert (done.returncode, done.stdout) == (2, "") and "still the baseline" in done.stderr
    fast.write("train.py", CANDIDATES["kept"])
    done, shown = fast.experiment("words fitted to pixels")
    assert shown["verdict"] == "kept", done.stdout + done.stderr
    return fast


def result(project: Project, n: int) -> dict:
    return json.loads(project.git("show", f"refs/experiments/{n}:experiment/result.json"))


def test_audit_and_final(improved: Project):
    head, status, history = (improved.git("rev-parse", "HEAD"), improved.run("status").stdout, "runs/experiments.tsv")
    before = improved.read(history)

    done = improved.run("audit", "2", "--ablate")
    assert done.returncode == 0, done.stderr
    assert "200 fresh pairs (random 100.5)" in done.stdout and "2 seeds each" in done.stdout
    audit = result(improved, 4)["audit"]
    sides, runs = audit["sides"], result(improved, 4)["runs"]
    assert len({r["seed"] for r in runs}) == len(runs) == 6
    assert sides["best"]["mean"] < sides["baseline"]["mean"] and audit["difference"]["percent"] < 0
    (row,) = audit["ablation"]  # without its one change the best is the baseline again
    assert row["experiment"] == 3 and row["percent"] > 0 and abs(row["values"][0] / sides["baseline"]["mean"] - 1) < 0.4
    assert "Test-Look" not in improved.trailers("refs/experiments/4")

    for evaluation in (1, 2):
        done = improved.run("final")
        assert done.returncode == 0, done.stderr
        assert f"evaluation:  {evaluation} of this test split" in done.stdout
        assert "gallery 100, random 50.5" in done.stdout
        assert improved.trailers(f"refs/experiments/{4 + evaluation}")["Test-Look"] == str(evaluation)
    final = result(improved, 5)
    assert final["final"]["split"] == "test" and len(final["final"]["metrics"]["t2i"]) == 3
    with tarfile.open(improved.path / "final/0005/run-1/out.tar") as left:
        assert "./model.pt" in left.getnames()

    # what the loop goes by has not moved, and nothing of it can be read where the agent reads
    assert improved.git("rev-parse", "HEAD") == head and improved.run("status").stdout == status
    assert not any("Comparable" in improved.trailers(f"refs/experiments/{n}") for n in (4, 5, 6))
    improved.write("train.py", CANDIDATES["discarded"])
    done, shown = improved.experiment("the wrong sign")
    assert shown["experiment"] == "7" and shown["verdict"] == "discarded" and "(1 run)" in shown["before"]
    assert improved.read(history).startswith(before.rstrip("\n")) and "audit" not in improved.read(history)
    assert "final" not in improved.read(history)
    assert improved.git("diff", "--name-only").split() == ["program.md", "scratchpad.md"]
    assert "audit: baseline against best" in improved.run("log").stdout
    assert improved.containers() == ""


def test_refusals(fast: Project):
    for words in (["audit", "1"], ["audit", "many"], ["audit", "2", "3"], ["final", "now"]):
        done = fast.run(*words)
        assert done.returncode == 2 and "usage: ./run.sh" in done.stderr
    for verb in ("audit", "final", "report"):
        done = fast.run(verb, env={"CLAUDECODE": "1"})
        assert done.returncode == 2 and "for a person" in done.stderr
    with open(fast.path / ".git/autoresearch.audit", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = fast.run("audit")
        assert done.returncode == 2 and "runs in another worktree" in done.stderr
    assert fast.experiments() == [1, 2]
