"""One experiment, without its trainings: what is refused, what is measured, the verdict, what becomes of the edit."""

from __future__ import annotations

import collections
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import dataset
import experiment
import project
import repository
import sweep
from in_process import VALUES, Point, Small, made_up_run, train_py
from measure import Run
from record import Attempt
from recorded import INCUMBENT, Recorded
from repository import CRASH, block

SAMPLE, FULL = (3, 3, 2), (8, 25, 3)  # worktrees, runs of each, devices
RECORDED, TIMES, SLOWER_S = 1000, 2, 0.3  # experiments; runs of which the fastest counts; what they may cost of a CPU
KEPT, DISCARDED = train_py(VALUES["kept"]), train_py(VALUES["discarded"])
UNFINISHED = Path("final/work")  # of an audit under way
INCUMBENT_TEXT = train_py(VALUES["incumbent"])


def attempt(*values: float, kind: str = "candidate") -> Attempt:
    """0: a run that failed."""
    runs = [made_up_run(value) if value else Run("failed", 7, "crash") for value in values]
    return Attempt(kind=kind, train="3" * 40, scratchpad="2" * 40, hypothesis="an idea", runs=runs)


# Verdicts


@pytest.mark.parametrize(
    ("kind", "values", "verdict"),
    [
        ("candidate", [50], "kept"),
        ("candidate", [150], "discarded"),
        ("candidate", [97], "again"),
        ("candidate", [97, 97.1], "kept"),
        ("candidate", [97, 103], "discarded"),
        ("candidate", [0], "failed"),
        ("candidate", [97, 0], "failed"),
        ("candidate", [97, 97], "failed"),  # its result does not depend on SEED
        ("baseline", [100], "again"),
        ("baseline", [100, 101], "baseline"),
        ("baseline", [100, 0], "unmeasured"),
        ("baseline", [100, 100], "unmeasured"),
        ("remeasured", [100], "remeasured"),
        ("remeasured", [0], "unmeasured"),
    ],
)
def test_verdicts(monkeypatch, kind: str, values: list, verdict: str):
    (plan := Recorded(monkeypatch)).add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))
    assert experiment.verdict(made := attempt(*values, kind=kind), plan.history) == verdict
    if len(set(values)) < len(values):
        assert {run.reason for run in made.runs} == {experiment.IGNORES_SEED}


def test_two_equal_runs_may_be_luck_in_a_small_gallery(monkeypatch):
    (plan := Recorded(monkeypatch)).add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))
    made = attempt(97, 97)
    for run in made.runs:
        run.metrics["gallery"] = 20
    assert experiment.verdict(made, plan.history) == "kept"


def test_with_an_incumbent_that_nobody_measured_nothing_is_kept(monkeypatch):
    assert experiment.verdict(attempt(50), Recorded(monkeypatch).history) == "discarded"


# Refusals: each is one line, exit 2, and leaves no experiment behind


def refused(small: Small, message: str, **how) -> None:
    before = small.experiments()
    done = small.run(**how)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stdout + done.stderr
    assert done.stderr.startswith("run.sh: ") and done.stderr.count("\n") == 1, done.stderr
    assert small.experiments() == before


@pytest.mark.parametrize(
    ("hypothesis", "message"),
    [
        ("", "no hypothesis"),
        ("- write one line here", "no hypothesis"),
        ("\x1b\u202e \n\n", "no hypothesis"),
        ("x" * 101, "has 101 characters"),
    ],
)
def test_without_a_hypothesis_nothing_runs(small: Small, hypothesis: str, message: str):
    small.write("train.py", KEPT)
    small.hypothesis(hypothesis)
    refused(small, message)


def test_a_hypothesis_is_the_first_line_without_its_marks(small: Small):
    small.write("train.py", KEPT)
    small.hypothesis("\n\n  * \x1b[31ma \u202ebold idea  \nand why")
    assert block(small.run().stdout)["hypothesis"] == "[31ma bold idea"


def test_refusals_name_the_next_step(small: Small):
    small.hypothesis("an idea")
    small.edit("budget: 120", "budget: soon", "program.md")
    refused(small, "program.md line 5: budget: soon: want a whole number")
    small.git("checkout", "program.md")
    small.edit("data: prints", "data: elsewhere", "program.md")
    refused(small, "data/elsewhere/info.json is missing: run ./run.sh data elsewhere in a terminal")
    small.git("checkout", "program.md")
    refused(small, "train.py is unchanged", env={"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": proof(small)})
    assert not list((small.path / "runs/session").glob("proof.*"))  # good for one call
    refused(small, "its guard did not approve this call", env={"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": "s"})
    small.edit("until: 40 experiments\n\n## Phase 2 — second\n", "until: 0 experiments\n", "program.md")
    small.write("train.py", KEPT)
    refused(small, "all phases of program.md are done")
    small.git("checkout", "program.md")
    small.git("rm", "-q", "--cached", "train.py")
    small.git("commit", "-qm", "gone")
    refused(small, "train.py is not committed")
    assert "unknown verb" in small.run("fly").stderr and "exit status" in small.run("help").stdout
    for verb, words in (("log", ("0",)), ("log", ("1", "2")), ("keep", ()), ("status", ("x",))):
        assert f"usage: ./run.sh {verb}" in small.run(verb, *words).stderr


CHANGES = {  # of what results are compared by
    "budget": lambda small: small.edit("budget: 120", "budget: 60", "program.md"),
    "data": lambda small: small.edit("data: prints", "data: other", "program.md"),
    "content": lambda small: small.write("data/prints/info.json", small.read("data/other/info.json")),
}


@pytest.mark.parametrize("what", ["budget", "data", "content"])
def test_what_hooks_and_displays_compare_with_is_what_a_run_would(small: Small, what: str):
    """With all phases done, a changed plan begins anew for them too, and the old plan finds its own results again."""
    small.make_data("other")
    small.edit("until: 40 experiments\n\n## Phase 2 — second\n", "until: 1 experiments\n", "program.md")
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    small.run()
    before, data = small.read("program.md"), small.read("data/prints/info.json")
    reason = "from session import Session; print(Session(on=True).reason_to_end(history.History.load()))"
    done, anew = "phase:    all phases of program.md are done", "phase:    1 of 1 (first), 0 of 1 experiments"
    assert done in small.run("status").stdout and "all phases" in small.python(reason)

    CHANGES[what](small)
    status = small.run("status").stdout
    assert anew in status and "not measured yet" in status and small.python(reason) == ""
    if what == "content":
        small.make_data("other")
        shutil.copytree(small.path / "data/other", small.path / "data/prints", dirs_exist_ok=True)
    small.hypothesis("another idea")
    small.write("train.py", train_py(33))
    small.run()
    assert done in small.run("status").stdout and "all phases" in small.python(reason)

    small.write("program.md", before)
    small.write("data/prints/info.json", data)
    status = small.run("status").stdout
    assert done in status and "1 experiments: 1 kept" in status


def test_data_that_are_not_there_are_compared_with_nothing(small: Small):
    """A run says so; hooks let it, and displays go on."""
    small.edit("data: prints", "data: elsewhere", "program.md")
    for verb in ("status", "log"):
        done = small.run(verb)
        assert done.returncode == 0, done.stderr
    assert "not measured yet" in small.run("status").stdout
    small.git("checkout", "program.md")
    assert "not measured yet" not in small.run("status").stdout


def test_a_worktree_in_which_nothing_ran_goes_by_the_record(small: Small):
    (small.path / "runs/compared.json").unlink()
    assert "not measured yet" not in small.run("status").stdout
    small.hypothesis("an idea")
    small.write("train.py", KEPT)
    assert small.run().returncode == 0 and (small.path / "runs/compared.json").exists()


def proof(small: Small) -> str:
    """As the guard leaves one for every call that it lets through."""
    (small.path / "runs/session").mkdir(exist_ok=True)
    small.write("runs/session/proof.s", "")
    return "s"


def test_train_py_must_be_one_ordinary_file(small: Small):
    small.hypothesis("an idea")
    train, real = small.path / "train.py", small.path / "real.py"
    message = (
        "train.py must be one ordinary file below 1 MiB, not missing, a link or a folder; a person can put it back"
    )
    train.rename(real)
    refused(small, message)
    train.symlink_to("real.py")
    refused(small, message)
    train.unlink()
    os.link(real, train)
    refused(small, message)
    train.unlink()
    train.mkdir()
    refused(small, message)
    train.rmdir()
    train.write_bytes(bytes(experiment.MAX_FILE + 1))
    refused(small, message)


def test_what_was_judged_is_not_judged_again_and_a_failure_may_be_tried_again(small: Small):
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["verdict"] == "discarded"
    small.write("train.py", DISCARDED)
    small.hypothesis("the same file again")
    refused(small, "already judged: experiment 2, discarded, mean_rank 150.0 (worse); change something else")
    small.write("train.py", KEPT)
    small.hypothesis("worse")
    refused(small, "the hypothesis is still that of experiment 2 (discarded); write the new one")
    small.hypothesis("crash")
    for n in (3, 4):
        small.write("train.py", CRASH)
        done = small.run()
        assert (done.returncode, block(done.stdout)["experiment"]) == (1, str(n)), done.stderr
    assert small.read("train.py") == INCUMBENT_TEXT


# What is measured


def test_a_change_that_helps_is_kept_and_one_that_hurts_is_reverted(small: Small):
    """And the user's own uncommitted and staged work survives both, and the next commit holds only what was staged."""
    small.write("notes.txt", "mine, edited")
    small.write(".gitignore", small.read(".gitignore") + "uncommitted\n")
    small.write("train.py", KEPT)
    done, shown = small.experiment("words: fitted to rough pixels")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert small.git("log", "-1", "--format=%s") == "words: fitted to rough pixels (100.0 → 50.0)"
    assert small.git("show", "--stat", "--format=", "--name-only", "HEAD").split() == ["scratchpad.md", "train.py"]
    assert small.git("diff", "--cached", "--name-only") == "LICENSE"
    assert small.git("diff", "--name-only") == ".gitignore" and "uncommitted" in small.read(".gitignore")
    small.git("commit", "-qm", "what the user staged")
    assert small.git("show", "--format=", "--name-only", "HEAD").split() == ["LICENSE"]

    small.write("train.py", DISCARDED)
    done, shown = small.experiment("the sign turned")
    assert (done.returncode, shown["verdict"]) == (0, "discarded"), done.stdout + done.stderr
    assert small.read("train.py") == KEPT and small.git("log", "-1", "--format=%s") == "what the user staged"
    assert "VALUE = 150" in small.git("show", "refs/experiments/3:train.py") and "+VALUE" in small.read(
        "runs/0003.diff"
    )
    assert "the sign turned" in small.read("runs/experiments.tsv") and small.read("notes.txt") == "mine, edited"
    assert "VALUE = 150" in small.git("show", "refs/experiments/3")


def test_a_small_gain_is_run_twice_with_fresh_seeds(small: Small):
    small.write("train.py", train_py(VALUES["small gain"]))
    done, shown = small.experiment("a little better")
    assert shown["verdict"] == "kept" and "mean of 2 runs" in shown["mean_rank"], done.stdout + done.stderr
    trailers = small.trailers("HEAD")
    assert len(trailers["Mean-Rank-Runs"].split()) == 2 and len(set(trailers["Seed"].split())) == 2
    files = small.git("ls-tree", "--name-only", "refs/experiments/2:experiment").split()
    assert set(files) >= {"examples-2.npy", "examples.npy", "ranks-2.npy", "ranks.npy"}
    assert small.read("runs/0002.log").count("SEED") == 2


def test_a_person_measures_the_incumbent_once_more_and_other_data_is_never_compared(small: Small):
    assert block(small.run().stdout)["verdict"] == "remeasured"
    assert len(small.trailers("refs/experiments/2")["Mean-Rank-Runs"].split()) == 1
    small.edit("budget: 120", "budget: 119", "program.md")
    small.write("train.py", DISCARDED)
    done, shown = small.experiment("worse, under another budget")
    assert shown["verdict"] == "discarded" and "2 runs" in shown["before"]
    assert "experiment 3 measured the incumbent first; yours is the next" in done.stderr
    assert small.experiments() == [1, 2, 3, 4] and small.trailers("refs/experiments/3")["Verdict"] == "baseline"
    assert "budget 119" in small.read("runs/0004.log")


def test_an_incumbent_that_does_not_run_is_for_a_person_to_fix(small: Small):
    small.write("train.py", CRASH)
    small.git("commit", "-qm", "broken", "train.py")
    small.write("train.py", KEPT)
    done, shown = small.experiment("an idea")
    assert (done.returncode, shown["verdict"]) == (
        1,
        "unmeasured",
    ) and "HEAD's own train.py does not run" in done.stderr
    assert small.read("train.py") == KEPT and small.experiments() == [1, 2]


def test_after_ten_discards_the_incumbent_runs_again(small: Small):
    small.add_made_up(10)
    small.write("train.py", KEPT)
    done, shown = small.experiment("at last")
    assert (shown["experiment"], shown["verdict"]) == ("13", "kept") and "(3 runs)" in shown["before"], done.stderr
    assert small.trailers("refs/experiments/12")["Verdict"] == "remeasured"


def test_a_scratchpad_that_git_does_not_know(small: Small):
    small.git("rm", "-q", "--cached", "scratchpad.md")
    small.git("commit", "-qm", "mine alone")
    small.edit("budget: 120", "budget: 119", "program.md")  # HEAD is measured first
    small.write("train.py", KEPT)
    done, shown = small.experiment("words fitted to rough pixels")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert "best:     mean_rank 50.0" in small.run("status").stdout
    assert small.experiments() == [1, 2, 3] and small.git("status", "--short", "scratchpad.md") == ""


def test_bytes_are_the_same_in_file_run_hash_and_record(small: Small):
    """With autocrlf and a clean filter configured, which git would apply to what it is given."""
    small.git("config", "core.autocrlf", "true")
    small.git("config", "filter.shout.clean", "tr a-z A-Z")
    small.write(".git/info/attributes", "train.py filter=shout\n")
    for n, value in ((2, VALUES["discarded"]), (3, VALUES["kept"])):
        text = train_py(value, "# no newline at the end").replace("\n", "\r\n").encode()
        (small.path / "train.py").write_bytes(text)
        small.experiment(f"odd line ends {n}")
        assert f"sha256 {hashlib.sha256(text).hexdigest()}" in small.read(f"runs/{n:04d}.log")
        assert blob(small, f"refs/experiments/{n}:train.py") == text
        after = (small.path / "train.py").read_bytes()
        assert after == (INCUMBENT_TEXT.encode() if n == 2 else text) == blob(small, "HEAD:train.py")


def blob(small: Small, name: str) -> bytes:
    return subprocess.run(["git", "cat-file", "blob", name], cwd=small.path, capture_output=True).stdout


def test_nothing_that_git_is_told_to_run_runs(small: Small):
    """Hooks, monitors, diff and signature programs of the repository, and variables of the caller."""
    (planted := small.path / "planted").write_text(f"#!/bin/sh\ntouch {small.path}/ran\n")
    planted.chmod(0o755)
    hooks = ("pre-commit", "post-commit", "reference-transaction", "post-index-change", "post-checkout")
    (small.path / ".git/hooks").mkdir()
    for hook in hooks:
        (small.path / ".git/hooks" / hook).symlink_to(planted)
    for key in ("core.fsmonitor", "core.pager", "core.editor", "diff.external", "gpg.program", "core.sshCommand"):
        small.git("config", key, str(planted))
    small.git("config", "commit.gpgSign", "true")
    small.git("config", "log.showSignature", "true")
    small.write("train.py", KEPT)
    small.hypothesis("better")
    assert block(small.run(env={"GIT_EXTERNAL_DIFF": str(planted)}).stdout)["verdict"] == "kept"
    small.write("train.py", DISCARDED)
    small.experiment("worse")
    small.run("log")
    assert not (small.path / "ran").exists()


def test_odd_places(small_base: Small, tmp_path):
    """Spaces, quotes and unicode in the path, a detached HEAD, no identity, a worktree that shares data."""
    small = small_base.copy(tmp_path / 'it\'s a "répo" dir')
    small.git("config", "--unset", "user.name")
    small.git("config", "--unset", "user.email")
    small.git("checkout", "-q", "--detach")
    other = small.worktree(tmp_path / "second", "second")
    other.write("train.py", KEPT)
    other.hypothesis("from a worktree")
    env = {"HOME": str(tmp_path), "EMAIL": ""}
    done = other.run(env=env)
    assert block(done.stdout)["verdict"] == "kept", done.stdout + done.stderr
    assert other.git("log", "-1", "--format=%an") == "autoresearch" and small.trailers("refs/experiments/2")["Branch"]
    small.write("train.py", DISCARDED)
    small.hypothesis("the sign turned")
    done = small.run(env=env)
    assert block(done.stdout)["verdict"] == "discarded" and small.experiments() == [1, 2, 3], done.stderr
    assert small.trailers("refs/experiments/3")["Branch"] == "detached"


def test_kept_by_hand(small: Small):
    small.write("train.py", DISCARDED)
    small.experiment("the sign turned")
    small.write("train.py", KEPT)
    done = small.run("keep", "2")
    assert done.returncode == 2 and "uncommitted changes" in done.stderr
    small.git("checkout", "train.py")
    done = small.run("keep", "2")
    assert done.returncode == 0 and small.read("train.py") == DISCARDED, done.stderr
    assert done.stdout.endswith("experiment 2, kept by hand: the sign turned\n")
    assert small.trailers("HEAD")["By-Hand"] == "yes" and "best:     mean_rank 150.0" in small.run("status").stdout
    assert small.git("diff", "--name-only") == "" and small.git("diff", "--cached", "--name-only") == "LICENSE"
    assert "is the incumbent already" in small.run("keep", "3").stderr
    assert "there is no experiment 9" in small.run("keep", "9").stderr
    assert "2 of 40 experiments" not in small.run("status").stdout  # one candidate


def test_requests_to_the_web_are_in_the_record(small: Small):
    (small.path / "runs/web").mkdir(parents=True)
    lines = ["2026-11-23T01:02:03\tWebFetch\t24\thttps://arxiv.org/abs/1?x", "2026-11-23T01:03:04\tWebSearch\t4\tclip"]
    for i, line in enumerate(lines):
        small.write(f"runs/web/{i}.toolu_{i}", line + "\n")
    small.write("train.py", DISCARDED)
    small.experiment("read about it")
    assert small.trailers("refs/experiments/2")["Web"] == "2 requests, 28 characters"
    assert small.git("show", "refs/experiments/2:experiment/web.log").splitlines() == lines
    assert not list((small.path / "runs/web").iterdir())


# What the user does meanwhile is never lost and never overwritten, whatever a run under way then decides

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
    ],
)
def test_a_block_says_what_train_py_is_where_the_verdict_does_not(small: Small, verdict: str, script: str, told: str):
    small.git("commit", "-qm", "mine")
    small.write("train.py", CRASH if verdict == "failed" else train_py(VALUES[verdict]))
    small.hypothesis("an idea")
    shown = block(small.run(point=Point("measure", "meanwhile", script)).stdout)
    assert shown["verdict"] == verdict and told in shown.get("train.py", ""), shown
    assert ("train.py" in shown) == shown["next"].startswith("first see train.py above; then ") == bool(told)
    if told:
        assert "again" not in shown["commit"]
    else:
        assert small.read("train.py") == (KEPT if verdict == "kept" else INCUMBENT_TEXT)


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
    assert block(done.stdout)["commit"].startswith(small.git("rev-parse", "refs/experiments/2")[:9])


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


# A train.py that ignores SEED

FIXED = """
real = measure.run
def fixed(job):
    run = real(job)
    for side in ("i2t", "t2i"):
        run.metrics[side] = [1.0, 5.0, 10.0]
    run.metrics.update(mean_rank=round(run.metrics["mean_rank"], -1), median_rank=40.0)
    return run
measure.run = fixed
"""


def test_a_train_py_that_ignores_seed_is_not_kept(small: Small):
    """One that does not even name it runs twice, however much it wins."""
    small.write("train.py", "VALUE = 50\n")
    done, shown = small.experiment("no luck at all", given=FIXED)
    assert (done.returncode, shown["verdict"]) == (1, "failed") and shown["reason"].startswith(experiment.IGNORES_SEED)
    assert small.read("train.py") == INCUMBENT_TEXT and "Mean-Rank" not in small.trailers("refs/experiments/2")
    small.write("train.py", "VALUE = 50\n")  # and not at the second try, nor a third that differs
    assert small.experiment("once more", given=FIXED)[1]["verdict"] == "failed"
    small.write("train.py", "VALUE = 40\n")
    done, shown = small.experiment("takes its luck from the clock")
    assert shown["verdict"] == "kept" and "mean of 2 runs" in shown["mean_rank"], done.stdout + done.stderr


def test_runs_of_the_same_train_py_are_compared_over_the_whole_record(small: Small):
    """One that names SEED without using it is found when it is measured again, and sigma does not shrink."""
    small.write("train.py", KEPT)
    assert small.experiment("better", given=FIXED)[1]["verdict"] == "kept"
    before = small.run("status").stdout
    done = small.run(given=FIXED)
    assert (done.returncode, block(done.stdout)["verdict"]) == (1, "unmeasured"), done.stdout + done.stderr
    assert block(done.stdout)["reason"].startswith(experiment.IGNORES_SEED)
    assert small.run("status").stdout == before and small.git("log", "-1", "--format=%s").startswith("better")


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
    refused(small, "another experiment is running: it has just begun; wait for it")
    assert "completed experiment 2" in sweep.again(small).stderr and small.experiments() == [1, 2, 3]
    assert small.git("show", "HEAD:train.py") + "\n" == KEPT


SLOW_GIT = """#!/bin/sh
case "$*" in *"update-ref refs/experiments"*) touch {folder}/begun; sleep 2 ;; esac
exec {git} "$@"
"""


# Chains and plans


@pytest.fixture
def bold(small: Small) -> Small:
    small.edit("until: 40 experiments", "until: 3 experiments\npatience: 3\nchanges: many", "program.md")
    small.edit("## Phase 2 — second", "## Phase 2 — careful\nuntil: 9 experiments\n\nOne constant.", "program.md")
    return small


def variant(text: str, n: int) -> str:
    return f"{text}# {n}\n"


def test_a_chain_is_kept_whole(bold: Small):
    head = bold.git("rev-parse", "HEAD")
    bold.write("train.py", variant(DISCARDED, 1))
    _, first = bold.experiment("worse")
    assert first["verdict"] == "discarded" and "train.py keeps your edit, build on it: 1 of 3" in first["commit"]
    assert bold.read("train.py") == variant(DISCARDED, 1) and bold.git("rev-parse", "HEAD") == head
    assert "chain 1 of at most 3" in first["phase"]
    bold.hypothesis("worse, unchanged")
    refused(bold, "already judged")
    bold.write("train.py", CRASH)
    _, second = bold.experiment("a crash on top")
    assert second["verdict"] == "failed" and second["next"].startswith("fix it where it stands")
    assert bold.read("train.py") == CRASH
    bold.write("train.py", variant(KEPT, 3))
    _, third = bold.experiment("what both were for")
    assert third["verdict"] == "kept" and "the whole chain of 3" in third["commit"], third
    assert bold.git("show", "HEAD:train.py") + "\n" == variant(KEPT, 3)
    assert bold.git("rev-parse", "HEAD^") == head and bold.git("status", "--porcelain", "train.py") == ""
    chains = [bold.trailers(f"refs/experiments/{n}")["Chain"].split(" on ") for n in (2, 3, 4)]
    assert [c[0] for c in chains] == ["1 of 3", "2 of 3", "3 of 3"]
    assert [c[1].endswith(", goes on") for c in chains] == [True, True, False]
    assert "(chain, 2 of 3)" in bold.read("runs/experiments.tsv") and "(chain, 2 of 3)" in bold.run("log").stdout


def test_a_chain_that_loses_is_reverted_whole(bold: Small):
    bold.edit("until: 3 experiments", "until: 5 experiments", "program.md")
    for n in (1, 2, 3):
        bold.write("train.py", variant(bold.read("train.py") if n > 1 else DISCARDED, n))
        _, shown = bold.experiment(f"worse {n}")
    assert "train.py is the incumbent again, the chain has ended)" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT and "chain" not in shown["phase"]
    bold.write("train.py", variant(DISCARDED, 4))
    assert "1 of 3 in this chain" in bold.experiment("the next begins at one")[1]["commit"]


def test_a_chain_ends_with_its_phase_and_the_new_one_is_named(bold: Small):
    bold.edit("until: 3 experiments", "until: 1 experiment", "program.md")
    bold.write("train.py", DISCARDED)
    done, shown = bold.experiment("worse")
    assert "train.py is the incumbent again, the chain has ended with its phase)" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT and shown["phase"] == "2 of 2 (careful), 0 of 9 experiments"
    assert shown["new phase"] == "careful: read its section in program.md"
    assert "Agent, subagent_type planner" in shown["next"] and len(done.stdout.encode()) < 2048


def test_a_plan_that_is_edited_during_a_run_is_for_the_next_one_and_the_agent_is_told(bold: Small):
    (bold.path / "runs/session").mkdir(exist_ok=True)
    bold.write("runs/session/program.md", bold.read("program.md"))  # as the client's start does
    bold.write("train.py", variant(DISCARDED, 1))
    bold.hypothesis("worse")
    shown = block(
        bold.run(point=Point("measure", "meanwhile", "sed -i 's/patience: 3/patience: 2/' program.md")).stdout
    )
    assert shown["plan"] == "program.md has changed since you last read it: read it"
    assert "build on it: 1 of 3" in shown["commit"]  # what was decided by the plan of then
    assert "patience: 3" in bold.git("show", "refs/experiments/2:experiment/program.md")
    bold.write("train.py", variant(DISCARDED, 2))
    done, shown = bold.experiment("worse still")
    assert "plan" not in shown and "the chain has ended" in done.stdout
    assert "patience: 2" in bold.git("show", "refs/experiments/3:experiment/program.md")


def test_a_plan_with_a_mistake_made_during_the_run(bold: Small):
    bold.write("train.py", variant(DISCARDED, 1))
    bold.hypothesis("worse")
    done = bold.run(point=Point("measure", "meanwhile", "sed -i 's/until: 9 experiments/until: never/' program.md"))
    assert (done.returncode, block(done.stdout)["verdict"]) == (0, "discarded")
    bold.write("train.py", variant(DISCARDED, 2))
    bold.hypothesis("worse still")
    refused(bold, "program.md line 15: until: never")


# Worktrees, and many experiments


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


# Numbers to publish

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


@pytest.mark.parametrize("odd", [b"# caf\xe9\n", b"\xff\xfe\0\0\n", b"x = 1\r\n", "# \ud7ff \u202e\n".encode()])
def test_a_train_py_of_any_bytes_is_kept_audited_and_shown(small: Small, odd: bytes):
    text = KEPT.encode() + odd + b"# the end"
    (small.path / "train.py").write_bytes(text)
    assert small.experiment("odd bytes")[1]["verdict"] == "kept" and blob(small, "HEAD:train.py") == text
    assert "+VALUE = 50" in small.read("runs/0002.diff") and "Binary" not in small.read("runs/0002.diff")
    more = text.replace(b"VALUE = 50", b"VALUE = 25")
    (small.path / "train.py").write_bytes(more)
    assert small.experiment("more of them")[1]["verdict"] == "kept"
    done = small.run("audit", "2", "--ablate", given=NOISY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    logs = [(small.path / f"final/0004/run-{n}/train.log").read_text() for n in (3, 4)]
    assert all(f"sha256 {hashlib.sha256(more).hexdigest()}" in log for log in logs)
    assert "VALUE = 25" in small.python("print([report.diff(r) for r in record.load_all()])")


# Data that were changed


def test_other_data_are_not_compared(small: Small):
    info = small.path / "data/prints/info.json"
    text, kind = info.read_text(), "print(experiment.make_plan(False)[1][0].kind)"
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    assert small.python(kind) == "candidate"
    info.write_text(text.replace(json.loads(text)["hash"], "0" * 64, 1))
    assert small.python(kind) == "baseline"
    info.write_text(text)
    assert small.python(kind) == "candidate"
    for name in ("inside/judge.py", "inside/stage.py", "image/seccomp.json"):
        (file := small.path / "container" / name).write_text(file.read_text() + "\n")
        assert small.python(kind) == "baseline", name
        file.write_text(file.read_text()[:-1])
    assert small.python(f"engine.find_image = lambda: 'another'\n{kind}") == "baseline"
    assert small.python(kind) == "candidate"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_in_the_dark(file: Path) -> None:
    was = file.stat()
    flip(file)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def in_info(key: str, value: object = None):
    def change(file: Path) -> None:
        info = {**json.loads(file.read_text()), key: value}
        file.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))

    return change


ARROW = "train/data-00000-of-00001.arrow"
DAMAGE = [
    ("info.json", cut, "is damaged: move it away and run ./run.sh data prints in a terminal"),
    ("info.json", in_info("hash"), "is damaged: move it away"),
    ("info.json", in_info("files"), "is damaged: move it away"),
    ("info.json", in_info("files", {"train": 7}), "is damaged: move it away"),
    ("info.json", in_info("format", 1), "data/prints was made by another version of prepare_data.py: move it away"),
    ("info.json", Path.unlink, "data/prints/info.json is missing: run ./run.sh data prints in a terminal"),
    (ARROW, flip, "is not what prepare_data.py wrote: move it away and run ./run.sh data prints in a terminal"),
    (ARROW, flip_in_the_dark, "is not what prepare_data.py wrote"),
    (ARROW, cut, "bytes instead of"),
    ("val/captions", shutil.rmtree, "cannot be read (No such file or directory): move it away"),
    ("val.key.npy", flip, "is not what prepare_data.py wrote"),
    ("val.key.npy", lambda file: shutil.copy(file.with_name("test.key.npy"), file), "bytes instead of"),
]


def test_damaged_data_are_named(small: Small, monkeypatch):
    data, kept = small.path / "data/prints", small.path / "data/kept"
    monkeypatch.setattr(dataset, "folder", lambda name: small.path / "data" / name)
    monkeypatch.setattr(dataset, "VERIFIED", small.path / "runs/data.json")
    shutil.copytree(data, kept)
    content = dataset.verified_hash("prints")
    for name, damage, message in DAMAGE:
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        assert dataset.verified_hash("prints") == content  # a copy is as good, and is remembered
        damage(data / name)
        for _ in range(2):  # what is bad is not remembered as good
            with pytest.raises(project.Refused) as error:
                dataset.verified_hash("prints")
            text = str(error.value)
            assert message in text and f"data/prints/{name}" in text or "version" in text, (name, damage, text)
            assert "\n" not in text
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    refused(small, "data/prints/val.key.npy has 928 bytes instead of 1728: move it away and run ./run.sh data prints")


def test_the_standard_repository_is_what_these_tests_think(small: Small):
    """Small's copies are today's."""
    for name in ("container/inside/judge.py", ".gitignore", "scratchpad.md"):
        assert Path(small.path / name).read_bytes() == (repository.ROOT / name).read_bytes()
