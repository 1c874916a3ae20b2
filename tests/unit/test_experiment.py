"""One experiment, without its trainings: what is refused, what is measured, the verdict, what becomes of the edit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import experiment
import repository
from in_process import DISCARDED, INCUMBENT_TEXT, KEPT, VALUES, Small, made_up_run, train_py
from measure import Run
from record import Attempt
from recorded import INCUMBENT, Recorded
from repository import CRASH, block


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
    made = attempt(*values, kind=kind)
    for n, run in enumerate(made.runs):
        run.fit = {"mean_rank": 30.0 + n}  # which a train.py may choose, and hides nothing by it
    assert experiment.verdict(made, plan.history) == verdict
    if len(set(values)) < len(values):
        assert {run.reason for run in made.runs} == {experiment.IGNORES_SEED}


def test_two_equal_runs_may_be_luck_in_a_small_gallery(monkeypatch):
    (plan := Recorded(monkeypatch)).add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))
    made = attempt(97, 97)
    for run in made.runs:
        run.metrics["gallery"] = 20
    assert experiment.verdict(made, plan.history) == "kept"


# Refusals


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
    small.refused(message)


def test_a_hypothesis_is_the_first_line_without_its_marks(small: Small):
    small.write("train.py", KEPT)
    small.hypothesis("\n\n  * \x1b[31ma \u202ebold idea  \nand why")
    assert block(small.run().stdout)["hypothesis"] == "[31ma bold idea"


@pytest.mark.parametrize(
    "heading",
    [
        "\ufeff## Next experiment",
        "## Next experiment:",
        "### Next experiment",
        "## **Next experiment**",
        "## next  experiment",
    ],
)
def test_the_hypothesis_is_found_under_any_such_heading(monkeypatch, tmp_path, heading: str):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    for comment in ("", "<!-- one line -->\n", "<!--\nold idea\n-->\n"):
        text = f"{heading}\n{comment}- an idea\n\n## Notes\n"
        (tmp_path / "scratchpad.md").write_text(text, encoding="utf-8")
        assert experiment.next_experiment() == "an idea"


def test_refusals_name_the_next_step(small: Small):
    small.hypothesis("an idea")
    small.edit("budget: 120", "budget: soon", "program.md")
    small.refused("program.md line 5: budget: soon: want a whole number")
    small.git("checkout", "program.md")
    small.edit("data: prints", "data: elsewhere", "program.md")
    small.refused("data/elsewhere/info.json is missing: run ./run.sh data elsewhere in a terminal")
    small.git("checkout", "program.md")
    small.refused("train.py is unchanged", env={"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": proof(small)})
    assert not list((small.path / "runs/session").glob("proof.*"))  # good for one call
    small.refused("its guard did not approve this call", env={"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": "s"})
    small.edit("until: 40 experiments\n\n## Phase 2 — second\n", "until: 0 experiments\n", "program.md")
    small.write("train.py", KEPT)
    small.refused("all phases of program.md are done")
    small.git("checkout", "program.md")
    small.git("rm", "-q", "--cached", "train.py")
    small.git("commit", "-qm", "gone")
    small.refused("train.py is not committed")
    assert "unknown verb" in small.run("fly").stderr and "exit status" in small.run("help").stdout
    for verb, words in (("log", ("0",)), ("log", ("x",)), ("log", ("1", "2")), ("keep", ()), ("status", ("x",))):
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
    assert done in status and "1 experiment: 1 kept" in status


def test_data_that_are_not_there_are_compared_with_nothing(small: Small):
    """A run says so; hooks let it, and displays go on."""
    small.edit("data: prints", "data: elsewhere", "program.md")
    for verb in ("status", "log"):
        done = small.run(verb)
        assert done.returncode == 0, done.stderr
    assert "not measured yet" in small.run("status").stdout
    small.git("checkout", "program.md")
    assert "not measured yet" not in small.run("status").stdout


def test_a_clone_in_which_nothing_ran_goes_by_the_record(small: Small):
    (small.path / ".git/autoresearch.compared").unlink()
    assert "not measured yet" not in small.run("status").stdout
    small.hypothesis("an idea")
    small.write("train.py", KEPT)
    assert small.run().returncode == 0 and (small.path / ".git/autoresearch.compared").exists()


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
    small.refused(message)
    train.symlink_to("real.py")
    small.refused(message)
    train.unlink()
    os.link(real, train)
    small.refused(message)
    train.unlink()
    train.mkdir()
    small.refused(message)
    train.rmdir()
    train.write_bytes(bytes(experiment.MAX_FILE + 1))
    small.refused(message)


def test_what_was_judged_is_not_judged_again_and_a_failure_may_be_tried_again(small: Small):
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["verdict"] == "discarded"
    small.write("train.py", DISCARDED)
    small.hypothesis("the same file again")
    small.refused("already judged: experiment 2, discarded, mean_rank 150.0 (worse); change something else")
    small.write("train.py", KEPT)
    small.hypothesis("worse")
    small.refused("the hypothesis is still that of experiment 2 (discarded); write the new one")
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


def test_what_is_waited_for_is_recorded(small: Small):
    """So that it is not taken for the model's time."""
    small.edit("data: prints", "data: prints\ncooldown: 2", "program.md")
    small.write("train.py", DISCARDED)
    small.experiment("an idea")
    assert json.loads(small.blob("refs/experiments/2:experiment/result.json"))["waited"] >= 2


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
    assert "experiment 3 measured the incumbent first: mean_rank 100.0; yours is next" in done.stderr
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
        assert small.blob(f"refs/experiments/{n}:train.py") == text
        after = (small.path / "train.py").read_bytes()
        assert after == (INCUMBENT_TEXT.encode() if n == 2 else text) == small.blob("HEAD:train.py")


@pytest.mark.parametrize("verdict", ["kept", "discarded"])
def test_an_executable_train_py_stays_one(small: Small, verdict: str):
    (small.path / "train.py").chmod(0o755)
    small.git("commit", "-qm", "mine", "train.py")
    small.write("train.py", train_py(VALUES[verdict]))
    assert small.experiment("an idea")[1]["verdict"] == verdict
    assert small.git("status", "--short", "train.py") == "" and os.access(small.path / "train.py", os.X_OK)
    assert small.git("ls-tree", "HEAD", "train.py").startswith("100755")


def test_a_part_of_another_repository(small: Small):
    """There HEAD:train.py would be somebody else's; and a downloaded archive is in none."""
    whole = small.path.parent
    small.write("train.py", DISCARDED)
    (small.path / ".git").rename(whole / "kept")
    assert "get this project with git clone" in small.run().stderr
    small.git("init", "-q", str(whole))
    (whole / "train.py").write_text("mine\n")
    small.git("-C", str(whole), "add", "train.py")
    small.git("-C", str(whole), "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "mine")
    for words in ((), ("keep", "1"), ("audit",)):
        small.refused("is a part of another repository; give it one of its own", *words)
    assert small.read("train.py") == DISCARDED and (whole / "train.py").read_text() == "mine\n"


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
    before = small.run("status").stdout.partition("time:")[0]
    done = small.run(given=FIXED)
    assert (done.returncode, block(done.stdout)["verdict"]) == (1, "unmeasured"), done.stdout + done.stderr
    assert block(done.stdout)["reason"].startswith(experiment.IGNORES_SEED)
    assert small.run("status").stdout.startswith(before) and small.git("log", "-1", "--format=%s").startswith("better")


def test_the_standard_repository_is_what_these_tests_think(small: Small):
    """Small's copies are today's."""
    for name in ("container/inside/judge.py", ".gitignore", "scratchpad.md"):
        assert Path(small.path / name).read_bytes() == (repository.ROOT / name).read_bytes()
