"""The record: what a commit's message keeps, and that nothing gets lost: killed anywhere, locked, damaged."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from dataclasses import replace

import pytest

import record
from in_process import DISCARDED, KEPT, VALUES, Point, Scenario, Small, made_up_run, train_py, variant
from measure import Run
from record import Attempt, Chain
from repository import CRASH, block
from sweep import DISK_KIB, consistent, fill, mounted, next_run

KILLS, ROOMS = 3, 3  # points of each scenario, and sizes of a full disk, in an ordinary test run
CHAINS = "until: 40 experiments\npatience: 3"

# Messages


WHOLE = Attempt(
    "kept", "Verdict: failed: an idea like a trailer", train="a" * 40, scratchpad="b" * 40, experiment=12,
    runs=[made_up_run(80.25, 1), made_up_run(81, 2)], phase="first: optimiser", before=[100.0, 102.0], sigma=0.03,
    percent=-20.2, sigmas=7.5, change="-20.2 % (7.5 sigma better)",
    comparable="0123456789ab", branch="main", chain=Chain(2, 3, "c" * 9, False),
    web="2 requests, 28 characters", by_hand=True, when=5,
)  # fmt: skip


def test_a_record_says_what_the_attempt_was():
    found = record.parse("12", "34", WHOLE.message())
    kept = ("verdict", "hypothesis", "phase", "train", "comparable", "branch", "chain", "web", "by_hand", "reason")
    assert {key: getattr(found, key) for key in kept} == {key: getattr(WHOLE, key) for key in kept}
    assert (found.number, found.when, found.test_evaluation) == (12, 34, 0)
    assert found.runs == {"mean_rank": [80.25, 81.0], "median_rank": [40.125, 40.5]}
    assert found.change == "-20.2 % (7.5 sigma better)" and found.percent == -20.2
    assert WHOLE.message().startswith("Verdict: failed: an idea like a trailer (101.0 → 80.6)\n\nExperiment: 12\n")
    assert json.loads(WHOLE.json())["runs"][1]["metrics"]["mean_rank"] == 81


def test_a_failure_has_its_reason_and_no_numbers():
    run = Run("failed", 7, "crash after 3 s: ValueError: x: y")
    attempt = replace(WHOLE, verdict="failed", by_hand=False, runs=[run], reason=run.reason, change="", chain=None)
    found = record.parse("1", "0", attempt.message())
    assert (found.reason, found.change, found.percent, found.runs["mean_rank"]) == (run.reason, "", 0.0, [])
    assert attempt.message().startswith("failed: Verdict: failed: an idea") and found.chain is None


@pytest.mark.parametrize("chain", [Chain(1, 3, "0" * 9, True), Chain(10, 12, "f" * 9, False)])
def test_a_chain_is_read_as_it_was_written(chain: Chain):
    assert Chain.parse(str(chain)) == chain and chain.position == f"{chain.link} of {chain.limit}"


def test_messages_of_others_are_empty_records():
    for text in ("", "one line", "a subject\n\nExperiment: 5\nChain: nonsense\nVerdict kept\n"):
        found = record.parse("5", "0", text)
        assert (found.verdict, found.chain, found.runs["mean_rank"]) == ("", None, [])


def test_what_a_person_garbled_in_a_message_counts_as_not_told():
    """And what an earlier version wrote is read."""
    lines = {"Experiment": 5, "Verdict": "final", "Mean-Rank": 80.62, "Mean-Rank-Runs": "80.2500 81.0000",
             "Split": "test", "Test-Look": 2}  # fmt: skip
    text = "final: best\n\n" + "".join(f"{key}: {value}\n" for key, value in lines.items())
    found = record.parse("5", "0", text)
    assert (found.runs["mean_rank"], found.test_evaluation, found.split) == ([80.25, 81.0], 2, "test")
    for junk in ("x", "inf", "NaN", "-3", "0.0", "1e999", "٣x", "9" * 5000):
        found = record.parse(
            "5", "0", f"{text}Test-Look: {junk}\nMean-Rank-Runs: {junk}\nChain: {junk} of 3 on {'a' * 9}\n"
        )
        assert (found.runs["mean_rank"], found.test_evaluation, found.chain) == ([], 0, None), junk


def test_an_attempt_in_git(small: Small):
    small.write("train.py", train_py(VALUES["kept"]))
    _, shown = small.experiment("better")
    assert shown["commit"] == small.git("rev-parse", "HEAD")[:9]
    files = small.git("ls-tree", "--name-only", "refs/experiments/2:experiment").split()
    assert files == ["examples.npy", "program.md", "ranks.npy", "result.json", "train.log"]
    result = json.loads(small.git("show", "refs/experiments/2:experiment/result.json"))
    assert result["verdict"] == "kept" and result["runs"][0]["metrics"]["mean_rank"] == 50
    assert result["experiment"] == 2 and result["before"] == [100.0, 100.1]
    assert small.git("show", "HEAD", "--format=", "--name-only").split() == ["scratchpad.md", "train.py"]
    assert small.trailers("HEAD") == small.trailers("refs/experiments/2")
    loaded = small.python("r = record.load_all()[-1]; print(r.number, r.verdict, r.runs['mean_rank'], r.train)")
    assert loaded == f"2 kept [50.0] {small.git('rev-parse', 'HEAD:train.py')}"


# Kill points


@pytest.fixture(scope="session")
def scenarios(small_base: Small, tmp_path_factory) -> dict[str, Scenario]:
    folder, found = tmp_path_factory.mktemp("scenarios"), {}

    def prepare(name: str, verdict: str, value: float, *words: str, plan: str = "") -> None:
        project = small_base.copy(folder / name)
        if plan:
            project.edit("until: 40 experiments", plan, "program.md")
        project.write("train.py", train_py(value))
        project.hypothesis(f"to be {verdict}")
        if words:  # by hand: what was discarded a moment ago
            assert project.run().returncode == 0
        found[name] = Scenario.prepare(project, train_py(value), verdict, *words)

    prepare("kept", "kept", VALUES["kept"])
    prepare("discarded", "discarded", VALUES["discarded"])
    prepare("kept after two runs", "kept", VALUES["small gain"])
    prepare("in a chain", "discarded", VALUES["small loss"], plan=CHAINS)
    prepare("by hand", "kept", VALUES["discarded"], "keep", "2")
    return found


@pytest.mark.parametrize("name", ["kept", "discarded", "kept after two runs", "in a chain", "by hand"])
def test_killed_anywhere(scenarios, name: str, request, tmp_path, figure):
    """At a seeded sample of points, more of them from the record on; at all with --full."""
    scenario = scenarios[name]
    points, recorded = scenario.points(), next(n for n, c in enumerate(scenario.calls, 1) if ".pending" in c)
    if not request.config.getoption("full"):
        late = [point for point in points if point.at >= recorded]
        rng = random.Random(name)
        points = [*rng.sample(late, KILLS - 1), *rng.sample(points[: -len(late)], 1)]
    elif name != "kept":
        points = [point for point in points if point.at >= recorded - 20]  # until there it is the same
    wrong = [complaint for point in points if (complaint := scenario.kill(point, tmp_path / "point"))]
    print(*("\n    ".join(lines) for lines in wrong), sep="\n")
    figure(f"kill points in process: {name}", len(points), len(wrong))
    assert not wrong


def test_a_full_disk(scenarios, sample, tmp_path, figure):
    """With more and more room left: an error in one line, or a verdict; nothing is lost, and it goes on later."""
    scenario, complaints, sizes = scenarios["kept"], {}, sample(list(DISK_KIB), ROOMS)
    (disk := tmp_path / "disk").mkdir()
    for room in sizes:
        with mounted("tmpfs", disk, "-t", "tmpfs", "-o", "size=16m") as small:
            if not small:
                pytest.skip("this user may not mount; tests/engine/test_lost.py has another way")
            project = scenario.project.copy(disk / "repo")
            fill(disk / "filler", room)
            done = project.run()
            (disk / "filler").unlink()
            ended = (done.returncode, block(done.stdout).get("verdict"))
            wrong = [] if ended in ((0, "kept"), (2, None)) else [f"ended as {ended}"]
            if "Traceback" in done.stderr or not (done.stderr or done.stdout).splitlines()[-1].startswith(
                ("run.sh:", "next:")
            ):
                wrong.append(done.stderr)
            wrong += consistent(project, scenario.before, recovered=False) + next_run(project, scenario.before)
            if wrong:
                complaints[room] = [done.stderr, *wrong]
                print(f"{room} KiB free", *complaints[room], sep="\n    ", flush=True)
    figure("full disk, in process", len(sizes), len(complaints))
    assert not complaints


def killed_before(small: Small, words: str) -> None:
    small.write("train.py", train_py(VALUES["kept"]))
    small.hypothesis("to be kept")
    assert small.run(point=Point(words, "before")).returncode == -9


def test_killed_between_record_and_branch_the_verdict_waits_for_this_worktrees_next_run(small: Small, tmp_path):
    other, head = small.worktree(tmp_path / "second", "second"), small.git("rev-parse", "HEAD")
    killed_before(small, "update-ref -m")
    other.write("train.py", CRASH)
    (other.path / "runs").mkdir()
    for name in ("runs/0002.log", "runs/0003.log"):  # left by a run here that was killed while it trained
        other.write(name, "step 1\n")
    done, shown = other.experiment("crash")
    assert "completed" not in done.stderr and shown["experiment"] == "3", done.stdout + done.stderr
    assert other.git("rev-parse", "HEAD") == head == small.git("rev-parse", "HEAD")
    small.edit("data: prints", "data: nowhere", "program.md")
    assert "completed experiment 2," in small.run().stderr
    assert small.git("show", "HEAD:train.py") + "\n" == train_py(VALUES["kept"])
    assert "completed" not in small.run().stderr


def test_an_interrupted_chain_is_carried_out_by_the_next_run(small: Small):
    """The file stays, for the next idea builds on it."""
    small.edit("until: 40 experiments", CHAINS, "program.md")
    small.write("train.py", train_py(VALUES["small loss"]))
    small.hypothesis("worse")
    assert small.run(point=Point("update-ref refs/experiments/2", "after")).returncode == -9
    done = small.run()
    assert "completed experiment 2" in done.stderr and done.returncode == 2 and "already judged" in done.stderr
    assert small.read("train.py") == train_py(VALUES["small loss"])


def test_what_was_recorded_on_another_branch_is_left_to_that_branch(small: Small):
    killed_before(small, "update-ref -m")
    small.git("switch", "-qc", "other")
    assert "completed" not in small.run().stderr and small.git("log", "--format=%s") == "start"
    small.write("train.py", train_py(VALUES["discarded"]))
    assert small.experiment("something else, on that branch")[1]["experiment"] == "3"
    small.git("switch", "-q", "main")
    assert "completed experiment 2" in small.run().stderr
    assert small.git("show", "HEAD:train.py") + "\n" == train_py(VALUES["kept"])


def test_a_number_that_another_branch_waits_for_is_not_given_away(small: Small):
    """Its experiment, which is not in the record yet, would be lost."""
    killed_before(small, "update-ref refs/experiments/2")
    small.git("switch", "-qc", "other")
    small.write("train.py", DISCARDED)
    assert small.experiment("something else, on that branch")[1]["experiment"] == "3"
    small.git("switch", "-q", "main")
    assert "completed experiment 2" in small.run().stderr
    assert small.git("show", "HEAD:train.py") + "\n" == KEPT


def test_what_another_process_is_writing_is_left_alone(small: Small):
    """A night's keeper writes its runs/night.json while an experiment cleans up."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    files = [f"runs/night.json.{pid}.new" for pid in (os.getpid(), ended.pid)]
    for file in files:
        small.write(file, "{")
    small.run()
    assert [(small.path / file).exists() for file in files] == [True, False]


def test_a_stale_lock_on_the_record_goes_also_while_a_git_runs(small: Small):
    """A log left open in a pager is a git that runs all night. A lock that is new is waited for."""
    (lock := small.path / ".git/refs/experiments/2.lock").touch()
    small.write("train.py", train_py(VALUES["discarded"]))
    with subprocess.Popen(["git", "cat-file", "--batch"], cwd=small.path, stdin=subprocess.PIPE) as left_open:
        done, shown = small.experiment("worse")
        assert left_open.poll() is None
        left_open.stdin.close()
    assert shown["verdict"] == "discarded" and small.experiments() == [1, 2], done.stdout + done.stderr
    assert "removed" in done.stderr and not lock.exists()


@pytest.mark.parametrize("name", ["index.lock", "HEAD.lock", "refs/heads/main.lock", "reftable/tables.list.lock"])
def test_a_lock_that_is_not_ours_is_reported_and_left_alone(small: Small, name: str):
    """The last is a stand-in: git before 2.45 knows no reftable."""
    (lock := small.path / ".git" / name).parent.mkdir(exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - 60,) * 2)
    done = small.run()
    assert done.returncode == 2 and f"{lock} exists: a git is at work, or was killed" in done.stderr and lock.exists()


def test_nothing_is_kept_amid_a_bisect(small: Small):
    """Which leaves the commit behind when it ends."""
    small.git("commit", "-qm", "what is staged")
    small.git("bisect", "start", "HEAD", "HEAD^")
    small.write("train.py", train_py(VALUES["kept"]))
    small.hypothesis("an idea")
    small.refused("git is in the middle of a bisect; finish or abort it first")


@pytest.mark.parametrize("state", ["MERGE", "rebase", "CHERRY_PICK", "REVERT"])
def test_in_the_middle_of_something_nothing_runs(small: Small, state: str):
    small.git("commit", "-qm", "what is staged")
    for branch in ("other", "main"):
        small.git("switch", "-qC", branch)
        small.write("LICENSE", branch)
        small.git("commit", "-qam", branch)
        small.git("branch", "-f", "old", "HEAD^")
    small.git("branch", "-f", "other", "old")
    small.git("switch", "-q", "other")
    small.write("LICENSE", "something else")
    small.git("commit", "-qam", "something else")
    command = {"MERGE": "merge", "rebase": "rebase", "CHERRY_PICK": "cherry-pick", "REVERT": "revert"}[state]
    small.git(command, *(["--no-edit", "main^"] if state == "REVERT" else ["main"]), check=False)
    small.write("train.py", train_py(VALUES["kept"]))
    for verb in ([], ["keep", "1"], ["final"]):
        done = small.run(*verb)
        text = f"run.sh: git is in the middle of a {command}; finish or abort it first\n"
        assert (done.returncode, done.stderr) == (2, text)
    small.git(command, "--abort")
    assert small.experiments() == [1] and small.git("rev-parse", "HEAD") == small.git("rev-parse", "other")


# What is damaged, or was left half-done


def test_what_was_measured_but_not_claimed_is_recorded_by_the_next_run(small: Small):
    """Killed between the note and the ref."""
    small.write("train.py", train_py(VALUES["discarded"]))
    small.experiment("worse")
    commit = small.git("rev-parse", "refs/experiments/2")
    small.git("update-ref", "-d", "refs/experiments/2")
    small.write("runs/0002.pending", json.dumps({"number": 2, "commit": commit, "branch": "main"}))
    assert "completed experiment 2" in small.run().stderr
    assert small.git("rev-parse", "refs/experiments/2") == commit and not list((small.path / "runs").glob("*.pending"))


def test_what_a_power_cut_leaves_of_refs_costs_no_training(small: Small):
    """Empty files, and other things under the names of experiments, of which HEAD may be one."""
    refs, first = small.path / ".git/refs/experiments", small.git("rev-parse", "refs/experiments/1")
    (refs / "1").write_text("")
    (refs / "2").write_text("")
    (refs / "3").mkdir()
    (refs / "3/x").write_text(first + "\n")
    small.git("-c", "tag.gpgSign=false", "tag", "-am", "a tag", "a", "HEAD")
    small.git("update-ref", "refs/experiments/5", small.git("rev-parse", "a"))
    for n in (2, 4, 6):
        small.write("train.py", f"{DISCARDED}# {n}\n")
        done, shown = small.experiment(f"idea {n}")
        assert shown["experiment"] == str(n), done.stderr
    assert small.git("rev-parse", "refs/experiments/1") == first and small.run("log").returncode == 0


@pytest.mark.parametrize("left", ["", "garbage\n", "12" * 20 + "\n"])
def test_a_head_without_its_commit_is_said_before_anything_else(small: Small, left: str):
    """A person told to commit would make a new root of it."""
    small.write(".git/refs/heads/main", left)
    for words in ((), ("keep", "1"), ("audit",), ("final",)):
        small.refused("git finds no commit at HEAD", *words)


def test_a_request_that_was_logged_in_part_costs_no_training(small: Small):
    (small.path / "runs/web").mkdir(parents=True)
    small.write("runs/web/1", "2026-11-28T00:00:00Z\tWebSearch\t5\thello\n2026-11-28T00:0")
    small.write("train.py", DISCARDED)
    small.experiment("an idea")
    assert small.trailers("refs/experiments/2")["Web"] == "1 requests, 5 characters"


def test_a_note_whose_number_was_taken_meanwhile_takes_the_next_free_one(small: Small, tmp_path):
    """Killed between the note and the ref, and another worktree has both what was to be its number and the next."""
    other = small.worktree(tmp_path / "second", "second")
    killed_before(small, "update-ref refs/experiments/2")
    log = small.read("runs/0002.log")
    for n in (2, 3):
        other.write("train.py", variant(DISCARDED, n))
        assert other.experiment(f"theirs, {n}")[1]["experiment"] == str(n)
    small.edit("data: prints", "data: nowhere", "program.md")  # so that nothing runs besides
    done = small.run()
    assert "completed experiment 4" in done.stderr and small.experiments() == [1, 2, 3, 4], done.stderr
    assert small.trailers("refs/experiments/4")["Hypothesis"] == "to be kept"
    assert small.git("show", "HEAD:train.py") + "\n" == KEPT and small.read("runs/0004.log") == log
    assert not list((small.path / "runs").glob("*.pending"))


def test_a_note_stays_until_its_commit_is_in_the_record(small: Small):
    """What was measured is not measured again where git cannot write, and one that git has lost is given up."""
    small.git("pack-refs", "--all", "--prune")
    killed_before(small, "update-ref refs/experiments/2")
    (refs := small.path / ".git/refs/experiments").rmdir()
    refs.touch()  # for root, whom permissions do not stop
    for _ in range(2):
        small.refused("cannot write refs/experiments/2 (disk full or read-only?)")
    refs.unlink()
    small.edit("data: prints", "data: nowhere", "program.md")  # so that nothing runs besides
    assert "completed experiment 2" in small.run().stderr and small.experiments() == [1, 2]
    small.write("runs/0003.pending", json.dumps({"number": 3, "commit": "1" * 40, "branch": "main"}))
    assert "is lost: git has no commit 111" in small.run().stderr and small.experiments() == [1, 2]


@pytest.mark.parametrize("note", [{}, {"number": "2", "commit": "1" * 40}, {"number": 2, "commit": 3}])
def test_a_damaged_note_is_none(small: Small, note: dict):
    small.write("runs/0002.pending", json.dumps({**note, "branch": "main"}))
    small.write("train.py", DISCARDED)
    done, shown = small.experiment("worse")
    assert shown["verdict"] == "discarded" and done.stderr == ""


def test_an_experiment_whose_commit_is_lost_has_a_remedy(small: Small):
    small.write("train.py", DISCARDED)
    small.experiment("worse")
    commit = small.git("rev-parse", "refs/experiments/2")
    (small.path / ".git/objects" / commit[:2] / commit[2:]).unlink()
    small.write("train.py", variant(DISCARDED, 2))
    small.refused(f"{commit} for refs/experiments/2; if no other copy has it, give that ref up: git update-ref -d REF")
    small.git("update-ref", "-d", "refs/experiments/2")
    assert small.experiment("again")[1]["experiment"] == "2"


def test_a_damaged_list_of_what_was_known_is_none(small: Small):
    small.write(".git/autoresearch.experiments", '{"refs/experiments/1": 4}')
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["experiment"] == "2"


def test_what_git_writes_for_us_survives_a_power_cut(small: Small, tmp_path, monkeypatch):
    """Every object and ref is flushed to the disk; by default git (2.36 and later) leaves its objects to chance."""
    (tmp_path / ".gitconfig").write_text(f"[trace2]\neventTarget = {tmp_path}/events\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["experiment"] == "2"
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    flushed = {e["sid"] for e in events if e.get("key") == "fsync/hardware-flush"}
    writers = {e["sid"]: e["argv"] for e in events if e["event"] == "start" and "commit-tree" in e["argv"]}
    assert writers and set(writers) <= flushed
