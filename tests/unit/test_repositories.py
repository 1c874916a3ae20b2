"""Any repository that people have: clones, settings, formats, worktrees, fetches, and gits that run meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from in_process import VALUES, Point, Scenario, Small, train_py
from repository import CRASH, ROOT, block
from sweep import again, consistent


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
        left = {
            "pid": runs.pid,
            "number": 9,
            "activity": "run 1",
            "started": int(later),
            "budget": 5,
            "stage": "trains",
        }
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
        "print(*(f'{r.number} {r.hypothesis} {r.runs[\"mean_rank\"]}' for r in record.load_all()[1:]))"
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


def test_a_path_that_is_no_text_is_named(tmp_path: Path):
    here = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(os.fsencode(ROOT / "container"), here + b"/container")
    done = subprocess.run(
        [sys.executable, "-I", here + b"/container/harness", "status"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "") and "caf\ufffd, is not UTF-8" in done.stderr
