"""The record: what a commit's message keeps, and that nothing gets lost: killed anywhere, locked, cloned, set back."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import record
from in_process import DISCARDED, KEPT, VALUES, Point, Scenario, Small, made_up_run, train_py, variant
from measure import Run
from record import Attempt, Chain
from repository import CRASH, ROOT, block
from sweep import DISK_KIB, again, consistent, fill, mounted, next_run

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
    assert (found.reason, found.change, found.percent, found.values("mean_rank")) == (run.reason, "", 0.0, [])
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
    assert (found.values("mean_rank"), found.test_evaluation, found.split) == ([80.25, 81.0], 2, "test")
    for junk in ("x", "inf", "NaN", "-3", "0.0", "1e999", "٣x", "9" * 5000):
        found = record.parse(
            "5", "0", f"{text}Test-Look: {junk}\nMean-Rank-Runs: {junk}\nChain: {junk} of 3 on {'a' * 9}\n"
        )
        assert (found.values("mean_rank"), found.test_evaluation, found.chain) == ([], 0, None), junk


def test_an_attempt_in_git(small: Small):
    small.write("train.py", train_py(VALUES["kept"]))
    _, shown = small.experiment("better")
    assert shown["commit"] == small.git("rev-parse", "refs/experiments/2")[:9]
    files = small.git("ls-tree", "--name-only", "refs/experiments/2:experiment").split()
    assert files == ["examples.npy", "program.md", "ranks.npy", "result.json", "train.log"]
    result = json.loads(small.git("show", "refs/experiments/2:experiment/result.json"))
    assert result["verdict"] == "kept" and result["runs"][0]["metrics"]["mean_rank"] == 50
    assert result["experiment"] == 2 and result["before"] == [100.0, 100.1]
    assert small.git("show", "HEAD", "--format=", "--name-only").split() == ["scratchpad.md", "train.py"]
    assert small.trailers("HEAD") == small.trailers("refs/experiments/2")
    loaded = small.python("r = record.load_all()[-1]; print(r.number, r.verdict, r.values('mean_rank'), r.train)")
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
    prepare("in a chain", "discarded", VALUES["discarded"], plan=CHAINS)
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
    small.write("train.py", train_py(VALUES["discarded"]))
    small.hypothesis("worse")
    assert small.run(point=Point("update-ref refs/experiments/2", "after")).returncode == -9
    done = small.run()
    assert "completed experiment 2" in done.stderr and done.returncode == 2 and "already judged" in done.stderr
    assert small.read("train.py") == train_py(VALUES["discarded"])


def test_what_was_recorded_on_another_branch_is_left_to_that_branch(small: Small):
    killed_before(small, "update-ref -m")
    small.git("switch", "-qc", "other")
    assert "completed" not in small.run().stderr and small.git("log", "--format=%s") == "start"
    small.write("train.py", train_py(VALUES["discarded"]))
    assert small.experiment("something else, on that branch")[1]["experiment"] == "3"
    small.git("switch", "-q", "main")
    assert "completed experiment 2" in small.run().stderr
    assert small.git("show", "HEAD:train.py") + "\n" == train_py(VALUES["kept"])


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
        text = f"run.sh: git is in the middle of a {state}; finish or abort it first\n"
        assert (done.returncode, done.stderr) == (2, text)
    small.git(command, "--abort")
    assert small.experiments() == [1] and small.git("rev-parse", "HEAD") == small.git("rev-parse", "other")


# Odd repositories


def test_clones_shallow_and_without_the_record(small: Small, tmp_path):
    small.write("train.py", train_py(VALUES["kept"]))
    assert small.experiment("better")[1]["verdict"] == "kept"
    for name, *options in (("plain",), ("shallow", "--depth=1")):
        subprocess.run(["git", "clone", "-q", *options, f"file://{small.path}", tmp_path / name], check=True)
        clone = Small(tmp_path / name)
        shutil.copytree(small.path / "data", clone.path / "data")
        clone.git("config", "user.name", "A Researcher")
        clone.git("config", "user.email", "researcher@example.org")
        clone.write("train.py", CRASH)
        done, shown = clone.experiment("crash")
        assert (done.returncode, shown.get("verdict"), shown.get("experiment")) == (1, "failed", "3"), (
            done.stdout + done.stderr
        )
        assert "best:     mean_rank 50.0" in clone.run("status").stdout
        assert clone.git("status", "--porcelain") == "M scratchpad.md" and clone.experiments() == [3]


def test_a_clock_that_was_set_back(small: Small):
    """Records, and what is left of a killed run, from next year: numbers count, not times."""
    small.write("train.py", train_py(VALUES["kept"]))
    small.hypothesis("to be kept")
    scenario = Scenario.prepare(small, train_py(VALUES["kept"]), "kept")
    later = f"{time.time() + 366 * 86400:.0f}"
    text = small.git("cat-file", "commit", "refs/experiments/1")
    text = re.sub(r"^(author|committer)(.*> )\d+", rf"\1\g<2>{later}", text, flags=re.M) + "\n"
    made = subprocess.run(["git", "hash-object", "-t", "commit", "-w", "--stdin"], cwd=small.path, input=text,
                          capture_output=True, text=True, check=True)  # fmt: skip
    small.git("update-ref", "refs/experiments/1", made.stdout.strip())
    for file in (small.path / "runs").glob("*.*"):
        os.utime(file, (int(later), int(later)))
    (lock := small.path / ".git/refs/experiments/2.lock").touch()
    os.utime(lock, (int(later), int(later)))
    runs = subprocess.Popen(["bash", "-c", "exec -a container/harness sleep 300"], cwd=small.path)
    try:
        left = {"pid": runs.pid, "number": 9, "activity": "run 1", "started": int(later), "budget": 5}
        small.write("runs/running.json", json.dumps(left))
        assert re.search(r"running: +experiment 9 \(run 1\), at most [0-5] s left", small.run("status").stdout)
    finally:
        runs.kill()
        runs.wait()
    done = small.run()
    assert block(done.stdout)["verdict"] == "kept" and not lock.exists(), done.stdout + done.stderr
    assert consistent(small, scenario.before, recovered=True) == [] and "nothing" in small.run("status").stdout


def test_read_only_git_is_one_line(small: Small):
    """For a run that may not write there; tests/engine/test_lost.py has the mount."""
    lock = small.path / ".git/autoresearch.lock"
    lock.unlink()
    lock.mkdir()  # for root, whom permissions do not stop
    assert again(small).stderr == f"run.sh: cannot write {lock}; is .git read-only?\n"
    lock.rmdir()
    (runs := Path(small.path / "runs")).rename(small.path / "kept")
    runs.touch()
    done = small.run()
    assert (done.returncode, done.stderr) == (2, f"run.sh: cannot write {runs}; is {small.path.name} read-only?\n")


SETTINGS = {  # of people's own, that bend what git writes and reads
    "encodings": {"i18n.commitEncoding": "ISO-8859-1", "i18n.logOutputEncoding": "UTF-16"},
    "diffs": {"diff.noprefix": "true", "diff.mnemonicPrefix": "true", "diff.orderFile": "/nowhere",
              "diff.context": "0", "color.ui": "always", "diff.algorithm": "histogram",
              "diff.wsErrorHighlight": "all", "diff.suppressBlankEmpty": "true", "diff.odd.binary": "true",
              "diff.odd.textconv": "false"},
    "logs": {"format.pretty": "oneline", "log.follow": "true", "log.date": "relative", "log.decorate": "full",
             "log.showRoot": "false", "log.mailmap": "true", "log.abbrevCommit": "true", "core.abbrev": "4",
             "core.quotePath": "true", "core.notesRef": "refs/notes/x", "notes.displayRef": "refs/notes/*"},
    "commits": {"commit.cleanup": "scissors", "commit.template": "/nowhere", "trailer.separators": "%",
                "trailer.ifexists": "replace", "core.commentChar": "E", "user.useConfigOnly": "true", "user.name": "",
                "committer.name": "C", "committer.email": "c@example.org", "commit.gpgSign": "true",
                "gpg.format": "ssh", "user.signingKey": "/nowhere"},
    "storage": {"core.splitIndex": "true", "index.version": "4", "feature.manyFiles": "true", "gc.auto": "1",
                "core.logAllRefUpdates": "always", "core.preferSymlinkRefs": "true", "core.safecrlf": "true",
                "core.autocrlf": "true", "core.eol": "crlf", "fetch.writeCommitGraph": "true",
                "core.sharedRepository": "group", "gc.pruneExpire": "now", "merge.conflictStyle": "zdiff3"},
}  # fmt: skip
ODD_IDEA = "Lernrate näher ans Ziel → µ, 日本 🙂"


def one_kept_one_lost(project: Small) -> None:
    """And both are read as they were written."""
    project.write("train.py", train_py(VALUES["kept"]))
    done, shown = project.experiment(ODD_IDEA)
    assert shown.get("verdict") == "kept", done.stdout + done.stderr
    project.write("train.py", train_py(VALUES["discarded"]))
    done, shown = project.experiment("worse again")
    assert shown.get("verdict") == "discarded", done.stdout + done.stderr
    assert project.experiments() == [1, 2, 3] and project.read("train.py") == train_py(VALUES["kept"])
    diff = project.read("runs/0003.diff")
    assert "\n-VALUE = 50\n+VALUE = 150\n" in diff and '\n """A train.py' in diff and "\n--- a/train.py\n" in diff
    assert "2\tkept\t50.0\t" in project.read("runs/experiments.tsv") and ODD_IDEA in project.run("log").stdout
    told = project.python(
        "print(*(f'{r.number} {r.hypothesis} {r.values(\"mean_rank\")}' for r in record.load_all()[1:]))"
    )
    assert told == f"2 {ODD_IDEA} [50.0] 3 worse again [150.0]"
    assert "best:     mean_rank 50.0" in project.run("status").stdout


@pytest.mark.parametrize("kind", SETTINGS)
def test_whatever_the_users_git_is_set_to(small: Small, kind: str):
    for key, value in SETTINGS[kind].items():
        small.git("config", key, value)
    small.write(".git/info/attributes", "*.py diff=odd text eol=crlf ident\n")
    one_kept_one_lost(small)
    for key in SETTINGS[kind]:  # and it stays so for who has other settings
        small.git("config", "--unset", key)
    assert ODD_IDEA in small.run("log").stdout


def sha256(small: Small, folder: Path) -> Small:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DEFAULT_HASH", "sha256")
        return Small.create(folder / "sha256")


def packed(small: Small, folder: Path) -> Small:
    small.git("pack-refs", "--all", "--prune")
    small.git("gc", "-q", "--prune=now")
    return small


def sparse(small: Small, folder: Path) -> Small:
    small.git("commit", "-qm", "mine")
    small.git("sparse-checkout", "set", "--cone", "--sparse-index", "container/inside", "container/image")
    return small


def partial(small: Small, folder: Path) -> Small:
    small.git("config", "uploadpack.allowFilter", "true")
    small.git("commit", "-qm", "mine")
    source, made = f"file://{small.path}", Small(folder / "partial")
    subprocess.run(["git", "clone", "-q", "--filter=blob:none", source, made.path], check=True)
    fetch = ["fetch", "-q", "origin", "refs/experiments/*:refs/experiments/*"]
    made.git(*fetch)
    shutil.copytree(small.path / "data", made.path / "data")
    return made


def apart(small: Small, folder: Path) -> Small:
    """The repository elsewhere, and the data where that looks for them."""
    (folder / "apart").mkdir()
    small.git("init", "-q", "--separate-git-dir", str(folder / "apart/repo.git"))
    shutil.copytree(small.path / "data", folder / "apart/data")
    return small


def rebased(small: Small, folder: Path) -> Small:
    small.git("commit", "-q", "--amend", "--allow-empty", "-m", "another start")
    small.git("reflog", "expire", "--expire=now", "--all")
    small.git("gc", "-q", "--prune=now")
    return small


def submodule(small: Small, folder: Path) -> Small:
    outer, made = folder / "outer", Small(folder / "outer/sub")
    small.git("commit", "-qm", "mine")
    subprocess.run(["git", "init", "-q", outer], check=True)
    add = ["git", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", small.path, "sub"]
    subprocess.run(add, cwd=outer, check=True)
    made.git("fetch", "-q", str(small.path), "refs/experiments/*:refs/experiments/*")
    for data in (made.path / "data", outer / ".git/modules/data"):  # wherever it looks for them
        shutil.copytree(small.path / "data", data)
    return made


def bare_with_worktree(small: Small, folder: Path) -> Small:
    small.git("commit", "-qm", "mine")
    subprocess.run(["git", "clone", "-q", "--mirror", small.path, folder / "bare/repo.git"], check=True)
    made = Small(folder / "bare/tree")
    subprocess.run(["git", "worktree", "add", "-q", "-b", "mine", made.path], cwd=folder / "bare/repo.git", check=True)
    for data in (made.path / "data", folder / "bare/data"):
        shutil.copytree(small.path / "data", data)
    return made


def replaced(small: Small, folder: Path) -> Small:
    """With a graft, a replaced commit, a note on each experiment and a tag that is called as a branch is."""
    small.git("commit", "-qm", "mine")
    small.git("replace", "--graft", "HEAD")
    small.git("notes", "add", "-m", "Verdict: failed", "refs/experiments/1")
    for name in ("main", "HEAD", "refs/experiments/1"):
        small.git("tag", "-f", name, "HEAD^{tree}", check=False)
    return small


@pytest.mark.parametrize(
    "kind", [sha256, packed, sparse, partial, apart, rebased, submodule, bare_with_worktree, replaced]
)
def test_any_repository(small: Small, kind, tmp_path):
    one_kept_one_lost(made := kind(small, tmp_path))
    assert "fatal" not in made.git("fsck", "--no-dangling")
    assert made.python("print(len(report.gather()['experiments']))") == "3"  # whatever a partial clone lacks


FETCHES = {
    "README's own, with prune": "git config fetch.prune true; git fetch -q --prune origin '{refs}'",
    "in the remote, and a pull": "git config --add remote.origin.fetch '{refs}'; git pull -q --prune --rebase=false",
    "forced": "git config --add remote.origin.fetch '+{refs}'; git config remote.origin.prune true; git fetch -q",
    "remote prune": "git config --add remote.origin.fetch '{refs}'; git remote prune origin",
    "mirror": "git config --add remote.origin.fetch '+refs/*:refs/*'; git switch -qc mine; git fetch -qp; git pull -qp",
}


@pytest.mark.parametrize("kind", FETCHES)
def test_no_fetch_takes_a_record_away(small: Small, kind: str, tmp_path):
    """The other repository has another experiment 2, and no third."""
    small.git("commit", "-qm", "mine")
    subprocess.run(["git", "clone", "-q", small.path, tmp_path / "other"], check=True)
    other = small.copy(tmp_path / "origin")
    small.git("remote", "add", "origin", str(other.path))
    small.git("fetch", "-q")
    small.git("branch", "-q", "--set-upstream-to", "origin/main")
    other.write("train.py", train_py(150, "# theirs\n"))
    other.experiment("theirs")
    for n in (2, 3):
        small.write("train.py", train_py(150, f"# ours, {n}\n"))
        small.experiment(f"ours, {n}")
    ours = {small.git("rev-parse", f"refs/experiments/{n}") for n in (1, 2, 3)}
    command = FETCHES[kind].format(refs="refs/experiments/*:refs/experiments/*")
    subprocess.run(["bash", "-c", command], cwd=small.path)
    assert small.experiments() != [1, 2, 3] or small.git("log", "-1", "--format=%s", "refs/experiments/2") != "ours"
    small.write("train.py", train_py(150, "# ours, the next\n"))
    done, shown = small.experiment("ours, the next")
    assert shown["verdict"] == "discarded" and "is back, which a fetch had taken away" in done.stderr, done.stderr
    there = {small.git("rev-parse", f"refs/experiments/{n}") for n in small.experiments()}
    assert ours < there and small.experiments() == list(range(1, len(there) + 1))
    log = small.run("log").stdout
    assert all(idea in log for idea in ("ours, 2", "ours, 3", "ours, the next"))
    for ref in small.git("for-each-ref", "--format=%(refname)", "refs/experiments").split():  # on purpose
        small.git("update-ref", "-d", ref)
    (small.path / ".git/autoresearch.experiments").unlink()
    small.run("status")
    assert small.experiments() == []


def test_a_fetch_while_it_trains_takes_nothing(small: Small):
    """An editor's own fetch, with prune: what is judged is judged against what was there."""
    small.write("train.py", train_py(VALUES["kept"]))
    small.hypothesis("better")
    prune = "git for-each-ref --format='delete %(refname)' refs/experiments | git update-ref --stdin"
    shown = block(small.run(point=Point("measure", "meanwhile", prune)).stdout)
    assert (shown["verdict"], shown["experiment"]) == ("kept", "2") and shown["before"].endswith("(2 runs)"), shown
    assert small.experiments() == [1, 2]


def test_a_rewritten_history_is_not_taken_for_a_loss(small: Small):
    small.write("train.py", train_py(VALUES["discarded"]))
    small.experiment("worse")
    for n in (1, 2):
        text = small.git("cat-file", "commit", f"refs/experiments/{n}").replace("A Researcher", "Somebody") + "\n"
        made = subprocess.run(["git", "hash-object", "-t", "commit", "-w", "--stdin"], cwd=small.path, input=text,
                              capture_output=True, text=True, check=True)  # fmt: skip
        small.git("update-ref", f"refs/experiments/{n}", made.stdout.strip())
    assert block(small.run().stdout)["experiment"] == "3" and small.experiments() == [1, 2, 3]


def test_a_clone_with_other_line_ends_runs(small: Small, tmp_path):
    """.gitattributes of this repository: what is committed is what is checked out."""
    shutil.copy(ROOT / ".gitattributes", small.path)
    shutil.copy(ROOT / "run.sh", small.path)
    small.write("crlf.py", "a = 1\r\n")
    small.git("add", ".")
    small.git("commit", "-qm", "all")
    for value in ("true", "input", "false"):
        clone, settings = tmp_path / value, ["-c", f"core.autocrlf={value}", "-c", "core.eol=crlf"]
        subprocess.run(["git", "clone", "-q", *settings, small.path, clone], check=True)
        for name in ("run.sh", "train.py", "program.md", "container/image/seccomp.json", "crlf.py"):
            assert (clone / name).read_bytes() == (small.path / name).read_bytes(), name
        assert Small(clone).git("status", "--porcelain") == ""


def test_a_gc_while_it_trains_takes_nothing(small: Small):
    small.write("train.py", train_py(VALUES["small gain"]))
    small.hypothesis("a little better")
    done = small.run(point=Point("measure run-1", "meanwhile", "git gc -q --prune=now"))
    assert block(done.stdout).get("verdict") == "kept", done.stdout + done.stderr
    assert "fatal" not in small.git("fsck") and small.git("show", "HEAD:train.py") + "\n" == small.read("train.py")


def test_a_commit_with_its_editor_open_is_not_broken(small: Small):
    """Also where a note of ours would allow to remove locks that a killed git left."""
    small.write(
        "runs/0002.pending", json.dumps({"number": 2, "commit": small.git("rev-parse", "HEAD"), "branch": "main"})
    )
    editor = {**os.environ, "GIT_EDITOR": "sh -c 'touch runs/open; sleep 60'"}
    with subprocess.Popen(["git", "commit", "-qa"], cwd=small.path, env=editor, start_new_session=True) as commit:
        while not (small.path / "runs/open").exists():
            time.sleep(0.05)
        os.utime(lock := small.path / ".git/index.lock", (time.time() - 60,) * 2)
        done = small.run()
        os.killpg(commit.pid, signal.SIGKILL)
    assert done.returncode == 2 and "a git commit is under way here" in done.stderr and lock.exists()


def test_a_git_that_writes_ends_before_we_do(small: Small, tmp_path: Path):
    """A signal to run.sh alone while the record is written: nothing is cut short, and what was measured is recorded."""
    slow = tmp_path / "git"
    slow.write_text(
        f'#!/bin/sh\ncase " $* " in *" update-ref refs/experiments/2 "*) touch {tmp_path}/now; sleep 1; esac\n'
        f'exec git "$@"\n'
    )
    slow.chmod(0o755)
    small.write("train.py", train_py(VALUES["discarded"]))
    small.hypothesis("worse")
    running = small.start(given=f"git.GIT = ({str(slow)!r}, *git.GIT[1:])\n")
    while not (tmp_path / "now").exists():
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGTERM)
    assert "SystemExit: 143" in running.finish().stderr and small.experiments() == [1, 2]
    assert "completed experiment 2" in small.run().stderr and small.read("train.py") == train_py(VALUES["incumbent"])


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
    assert shown["experiment"] == "2" and done.stderr == ""


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
