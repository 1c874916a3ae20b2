"""What people and programs do while an experiment runs is never lost and never overwritten, whatever it decides."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

import repository
import sweep
from in_process import DISCARDED, INCUMBENT_TEXT, KEPT, VALUES, Point, Small, train_py
from repository import CRASH, block

MINE = "git commit -q --only LICENSE -m mine"
EDIT = "echo '# is edited' >>train.py"


@pytest.mark.parametrize(
    ("verdict", "at", "script", "ends", "head", "file"),
    [
        # a commit of another file, or HEAD amended; the experiment goes on top
        ("kept", "measure", MINE, "kept", "candidate", "candidate"),
        ("kept", "measure", "git commit -q --amend --only -m amended", "kept", "candidate", "candidate"),
        ("kept", "measure", "git switch -qc other", "kept", "candidate", "candidate"),
        # train.py edited, put back or staged: what was judged is in HEAD, what the user wrote stays in the file
        ("kept", "measure", EDIT, "kept", "candidate", "edited"),
        ("discarded", "measure", EDIT, "discarded", "incumbent", "edited"),
        ("kept", "measure", "git checkout -q train.py", "kept", "candidate", "candidate"),
        ("discarded", "measure", "git add train.py", "discarded", "incumbent", "incumbent"),
        # HEAD's train.py changed: nothing to compare with any more
        ("kept", "measure", f"{EDIT}; git commit -qm mine train.py", "discarded", "edited", "edited"),
        ("kept", "measure", "git reset -q --soft HEAD^", "discarded", "other", "other"),
        # at the worst moment, when the record is written and the branch is not
        ("kept", "update-ref -m", MINE, "kept", "candidate", "candidate"),
        # what the settings are by then is for the next run
        ("kept", "measure", "sed -i 's/budget: 120/budget: 119/' program.md", "kept", "candidate", "candidate"),
        ("kept", "measure", "sed -i 's/budget: 120/budget: soon/' program.md", "kept", "candidate", "candidate"),
        ("kept", "measure", "printf x >>data/prints/val.key.npy", "", "incumbent", "candidate"),
    ],
)
def test_what_the_user_does_meanwhile(small: Small, verdict, at, script, ends, head, file):
    small.git("commit", "-q", "--amend", "--no-edit", "train.py")  # `other` has another train.py
    if "reset" in script:
        small.write("train.py", train_py(120))
        small.git("commit", "-qm", "older", "train.py")
        small.write("train.py", INCUMBENT_TEXT)
        small.git("commit", "-qm", "newer", "train.py")
    texts = {"candidate": train_py(VALUES[verdict]), "incumbent": INCUMBENT_TEXT, "edited": None}
    small.write("train.py", texts["candidate"])
    small.hypothesis("an idea")
    was = small.git("rev-parse", "HEAD")
    done = small.run(point=Point(at, "meanwhile", script))
    assert block(done.stdout).get("verdict", "") == ends, done.stdout + done.stderr
    assert done.returncode == (0 if ends else 2) and "Traceback" not in done.stderr
    small.git("checkout", "-q", "program.md")
    if "val.key" in script:
        assert "data/prints/val.key.npy has 1729 bytes instead of 1728" in done.stderr
        assert small.experiments() == [1] and small.read("train.py") == texts["candidate"]
        return
    for want, text in ((head, small.git("show", "HEAD:train.py") + "\n"), (file, small.read("train.py"))):
        if want == "edited":
            assert "is edited" in text
        elif want in texts:
            assert text == texts[want]
    assert ("HEAD has gone from main to other meanwhile" in done.stderr) == ("switch" in script)
    assert small.trailers("refs/experiments/2")["Verdict"] == (ends or "kept") and small.experiments() == [1, 2]
    if "mine" in script:
        assert "mine" in small.git("log", "-3", "--format=%s").splitlines()
    assert was in small.git("reflog", "--format=%H").splitlines()
    staged = small.git("diff", "--cached", "--name-only").split()
    assert set(staged) <= {"LICENSE", "train.py"}
    assert "LICENSE" in staged or "commit" in script
    assert "fatal" not in small.git("fsck")
    assert len({small.trailers(f"refs/experiments/{n}")["Comparable"] for n in (1, 2)}) == 1


@pytest.mark.parametrize(
    ("verdict", "script", "told"),
    [
        ("discarded", EDIT, "may hold what lost: read it, and undo that change (runs/0002.diff)"),
        ("discarded", "rm train.py", "may hold what lost"),
        ("discarded", "ln -sf LICENSE train.py", "may hold what lost"),
        ("discarded", "sed -i 's/$/\\r/' train.py", "may hold what lost"),
        ("failed", EDIT, "may hold what lost"),
        ("kept", EDIT, "is not what was kept: read it first"),
        ("kept", "rm train.py", "is not what was kept"),
        ("discarded", "true", ""),
        ("kept", "git checkout -q train.py", ""),
        ("discarded", "git checkout -q train.py", ""),
        ("failed", "git stash -q", ""),
        # committed by somebody: the verdict is about what was HEAD's before
        ("discarded", "git commit -qam mine", "HEAD's is what this run measured since a commit meanwhile"),
        ("kept", "git commit -qam mine", "HEAD's is what this run measured since a commit meanwhile"),
        ("failed", f"{EDIT}; git commit -qam mine", "HEAD's is neither the incumbent nor what this run measured"),
    ],
)
def test_a_block_says_what_train_py_is_where_the_verdict_does_not(small: Small, verdict: str, script: str, told: str):
    small.git("commit", "-qm", "mine")
    small.write("train.py", CRASH if verdict == "failed" else train_py(VALUES[verdict]))
    small.hypothesis("an idea")
    shown = block(small.run(point=Point("measure", "meanwhile", script)).stdout)
    moved = "git commit" in script
    assert shown["verdict"] == ("discarded" if moved and verdict == "kept" else verdict), shown
    assert told in shown.get("train.py", "") and ("change" in shown) == (verdict != "failed"), shown
    assert not moved or small.read("runs/0002.diff")
    assert ("train.py" in shown) == shown["next"].startswith("first see train.py above; then ") == bool(told)
    if told:
        assert "again" not in shown["commit"]
    else:
        assert small.read("train.py") == (KEPT if verdict == "kept" else INCUMBENT_TEXT)


STOP = "GIT_SEQUENCE_EDITOR='sed -i s/^pick/edit/' git rebase -qi HEAD^"


@pytest.mark.parametrize(
    ("leave", "back"),
    [
        ("git checkout -q --orphan new", "git checkout -q main"),
        ("git symbolic-ref HEAD refs/heads/nowhere", "git symbolic-ref HEAD refs/heads/main"),
        ("git branch -q there; git update-ref -d HEAD", "git update-ref HEAD there"),
        ("git checkout -q --detach", "git checkout -q main"),
        ("git stash -q; git checkout -q HEAD^", "git checkout -q main; git stash pop -q"),
        (f"git stash -q; {STOP}", "git rebase --abort; git stash pop -q"),
        (f"git stash -q; {STOP}; git stash pop -q", "git stash -q; git rebase --continue; git stash pop -q"),
    ],
)
@pytest.mark.parametrize("verdict", ["kept", "discarded"])
def test_where_head_is_on_no_branch_meanwhile_its_own_waits(small: Small, verdict: str, leave: str, back: str):
    """An orphan branch, a rebase, a look at what was: nothing is changed there, and nothing is lost."""
    small.git("commit", "-qm", "mine")
    small.write("train.py", train_py(VALUES[verdict]))
    small.hypothesis("an idea")
    look = "git symbolic-ref -q HEAD || git rev-parse HEAD; git status --short; cat train.py"
    script = f"{leave}; ({look}) >runs/there"
    done = small.run(point=Point("measure", "meanwhile", script))
    shown = block(done.stdout)
    assert (done.returncode, shown.get("verdict")) == (0, verdict), done.stdout + done.stderr
    assert shown["train.py"] == "left as it is, for HEAD has left main: the next run there carries the verdict out"
    assert small.trailers("refs/experiments/2")["Branch"] == "main" and shown["commit"].endswith("(in the record)")
    there = subprocess.run(["sh", "-c", look], cwd=small.path, capture_output=True, text=True).stdout
    assert there == small.read("runs/there")
    assert "an idea" in small.git("show", "refs/experiments/2:scratchpad.md")
    subprocess.run(["bash", "-ec", back], cwd=small.path, check=True, capture_output=True)
    assert "completed experiment 2" in small.run().stderr
    assert small.read("train.py") == small.git("show", "main:train.py") + "\n"
    assert small.read("train.py") == (KEPT if verdict == "kept" else INCUMBENT_TEXT)
    assert small.git("status", "--short", "train.py") == "" and small.experiments() == [1, 2, 3]


def test_another_line_of_work_meanwhile_takes_nothing_from_the_planned_branch(small: Small):
    """A branch whose train.py is another one: what gained on its own branch is not lost there."""
    small.git("commit", "-qm", "mine")
    small.git("branch", "other")
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    other = "git stash -q; git switch -q other; echo '# other' >>train.py; git commit -qm other train.py"
    shown = block(small.run(point=Point("measure", "meanwhile", other)).stdout)
    assert shown["verdict"] == "kept" and shown["train.py"].startswith("left as it is, for HEAD has left main")
    assert small.read("train.py") == INCUMBENT_TEXT + "# other\n"
    small.git("switch", "-q", "main")
    assert "completed experiment 2" in small.run().stderr
    assert small.git("show", "main:train.py") + "\n" == small.read("train.py") == KEPT


@pytest.fixture
def waiting(small: Small) -> Small:
    """A verdict `kept` waits for main, and HEAD is detached."""
    small.git("commit", "-qm", "mine")
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    small.run(point=Point("measure", "meanwhile", "git stash -q; git checkout -q --detach"))
    return small


def test_nothing_is_tried_on_no_branch_while_a_verdict_waits(waiting: Small):
    """It would be kept where nobody finds it again."""
    waiting.write("train.py", DISCARDED)
    waiting.hypothesis("another idea")
    waiting.refused("HEAD has left main, where experiment 2 waits for the next run: git checkout main")
    waiting.git("checkout", "-q", "train.py", "scratchpad.md")
    waiting.git("checkout", "-q", "main")
    assert "completed experiment 2" in waiting.run().stderr and waiting.read("train.py") == KEPT


def test_a_verdict_that_came_too_late_is_said_and_can_be_taken_over(waiting: Small):
    waiting.git("checkout", "-q", "main")
    waiting.write("train.py", train_py(99))
    waiting.git("commit", "-qm", "the person's own", "train.py")
    done = waiting.run()
    said = "HEAD's train.py is not what experiment 2 kept, since a commit: ./run.sh keep 2 takes it over"
    assert done.returncode == 2 and said in done.stderr and waiting.experiments() == [1, 2]
    assert waiting.run("keep", "2").returncode == 0 and waiting.read("train.py") == KEPT


def test_a_verdict_whose_branch_is_gone_waits_no_longer(waiting: Small):
    waiting.git("branch", "-m", "main", "trunk")
    waiting.git("checkout", "-q", "trunk")
    said = "run.sh: main, which experiment 2 waited for, is gone; ./run.sh keep 2 would take it over"
    assert said in waiting.run().stderr
    assert said not in waiting.run().stderr and not list((waiting.path / "runs").glob("*pending*"))
    assert waiting.run("keep", "2").returncode == 0 and waiting.read("train.py") == KEPT


def test_a_tag_with_the_branchs_name_is_no_other_branch(small: Small):
    """Git's short name of the branch is then heads/main."""
    small.write("train.py", DISCARDED)
    small.hypothesis("worse")
    done = small.run(point=Point("update-ref refs/experiments/2", "after"))
    small.git("tag", "main")
    assert done.returncode == -signal.SIGKILL and "completed experiment 2" in small.run().stderr
    assert {small.trailers(f"refs/experiments/{n}")["Branch"] for n in small.experiments()} == {"main"}
    assert small.read("train.py") == INCUMBENT_TEXT


def test_an_incumbent_whose_experiment_is_deleted_meanwhile(small: Small):
    """As README says; what was planned against decides."""
    forget = "git update-ref -d refs/experiments/1; rm .git/autoresearch.experiments"
    small.write("train.py", KEPT)
    small.hypothesis("better")
    done = small.run(point=Point("measure", "meanwhile", forget))
    assert block(done.stdout)["verdict"] == "kept", done.stderr
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["verdict"] == "discarded"


def test_what_an_interrupted_verdict_left_is_not_built_upon_without_a_word(small: Small):
    """The agent's call was killed after its record was written, and it has made the next edit on top."""
    small.write("train.py", DISCARDED)
    small.hypothesis("worse")
    assert small.run(point=Point("update-ref refs/experiments/2", "after")).returncode == -9
    small.write("train.py", DISCARDED + "# and another idea\n")
    small.hypothesis("another idea")
    done = small.run()
    assert (done.returncode, done.stdout) == (2, "") and "completed experiment 2" in done.stderr
    assert done.stderr.endswith(
        "may hold what lost: read it, and undo that change (runs/0002.diff); then run ./run.sh again\n"
    )
    assert small.experiments() == [1, 2]
    assert small.experiment("on top, on purpose")[1]["experiment"] == "3"  # it is said once


@pytest.mark.parametrize(
    "script",
    [
        "sed -i 's/data: prints/data: nowhere/' program.md",
        "rm program.md scratchpad.md",
        "printf '\\377\\376' >program.md",
        "printf '\\377\\376' >scratchpad.md; rm -rf runs/session",
        "rm runs/0002.log runs/experiments.tsv runs/running.json",
        "git config user.email ''; git config i18n.commitEncoding latin1",
        "rm -r runs",
    ],
)
@pytest.mark.parametrize(("verdict", "at"), [("kept", "measure"), ("failed", "update-ref refs/experiments/2")])
def test_whatever_is_edited_meanwhile_what_was_recorded_is_shown(small: Small, verdict: str, at: str, script: str):
    if (script, at) == ("rm -r runs", "measure"):
        script = "rm -f runs/*.*"  # else what runs is gone as well
    (small.path / "runs/session").mkdir(exist_ok=True)
    small.write("train.py", CRASH if verdict == "failed" else train_py(VALUES[verdict]))
    small.hypothesis("an idea")
    done = small.run(point=Point(at, "meanwhile", script))
    assert (done.returncode, block(done.stdout).get("verdict")) == (int(verdict == "failed"), verdict), done.stderr
    assert small.trailers("refs/experiments/2")["Verdict"] == verdict and len(done.stdout.encode()) < 2048
    commit = small.git("rev-parse", "HEAD" if verdict == "kept" else "refs/experiments/2")
    assert block(done.stdout)["commit"].startswith(commit[:9])


def test_where_git_is_busy_the_verdict_is_shown_and_the_next_run_carries_it_out(small: Small):
    """An editor's git holds the index."""
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    done = small.run(point=Point("measure", "meanwhile", "touch .git/index.lock"))
    shown = block(done.stdout)
    assert (done.returncode, shown.get("verdict")) == (0, "kept"), done.stdout + done.stderr
    assert "is not carried out, which the next run does: git update-index failed" in shown["train.py"]
    (small.path / ".git/index.lock").unlink()
    assert "completed experiment 2" in small.run().stderr and small.git("status", "--short", "train.py") == ""
    assert small.git("show", "HEAD:train.py") + "\n" == KEPT


def test_a_git_that_outlives_a_killed_run_keeps_its_locks(small: Small, tmp_path):
    """A run that begins meanwhile is refused, and the one after that completes what git has written by then."""
    (tmp_path / "git").write_text(SLOW_GIT.format(folder=tmp_path, git=shutil.which("git")))
    (tmp_path / "git").chmod(0o755)
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    child = small.start(env={"PATH": f"{tmp_path}:{repository.PATH}"})
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.finish().returncode == -signal.SIGKILL
    small.refused("another experiment is running: it has just begun; wait for it")
    assert "completed experiment 2" in sweep.again(small).stderr and small.experiments() == [1, 2, 3]
    assert small.git("show", "HEAD:train.py") + "\n" == KEPT


SLOW_GIT = """#!/bin/sh
case "$*" in *"update-ref refs/experiments"*) touch {folder}/begun; sleep 2 ;; esac
exec {git} "$@"
"""
