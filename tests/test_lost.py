"""Nothing gets lost: run.sh killed at every call it makes, accidents with git, disk and clock, and damaged data."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import made_up
import pytest
from conftest import Project, block, engine
from sweep import ALONE, CANDIDATES, CRASH, LIMIT_S, STAGES, WHERE, Sweep, again, consistent, next_run

KILLS = 1  # kill points of each kind in an ordinary test run
RECORDED, TIMES, SLOWER_S = 1000, 9, 0.3  # experiments; runs of which the fastest counts; what they may cost
DISK_KIB, ROOMS = range(0, 241, 8), 2  # room left on a full disk; how many of them in an ordinary test run


@pytest.fixture(scope="module")
def sweep(quick_base: Project, tmp_path_factory) -> Sweep:
    return Sweep(quick_base, tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize(
    ("side", "verdict"), [(s, v) for s in WHERE for v in CANDIDATES if v == "kept" or s not in ALONE]
)
def test_killed(sweep: Sweep, sample, figure, side, verdict):
    points = [p for p in [*sweep.points(), *sweep.moments(), *sweep.deaths()] if p[2] == side and p[0] == verdict]
    complaints = {}
    for point in (points := sample(points, KILLS)):
        if wrong := sweep.kill(*point):
            call = sweep.calls[point[0]][point[1] - 1][:80] if point[2] in ("before", "after", "inside") else ""
            complaints[point] = [call, *wrong]
            print(point, call, *wrong, sep="\n    ", flush=True)
    figure(f"kill points: {WHERE[side]}, {verdict}", len(points), len(complaints))
    assert not complaints


MINE = "git commit -q --only LICENSE -m mine"
EDIT = "sed -i 's/takes no time/is edited/' train.py"


@pytest.mark.parametrize(
    ("verdict", "at", "script", "ends", "head", "file"),
    [
        # meanwhile: a commit of another file, or HEAD amended; the experiment goes on top
        ("kept", "judge", MINE, "kept", "candidate", "candidate"),
        ("kept", "train", "git commit -q --amend --only -m amended", "kept", "candidate", "candidate"),
        ("kept", "train", "git switch -qc other", "kept", "candidate", "candidate"),
        # train.py edited, put back or staged: what was judged is in HEAD, what the user wrote stays in the file
        ("kept", "judge", EDIT, "kept", "candidate", "edited"),
        ("discarded", "judge", EDIT, "discarded", "incumbent", "edited"),
        ("kept", "judge", "git checkout -q train.py", "kept", "candidate", "candidate"),
        ("discarded", "train", "git add train.py", "discarded", "incumbent", "incumbent"),
        # HEAD's train.py changed: nothing to compare with any more
        ("kept", "judge", f"{EDIT}; git commit -qm mine train.py", "discarded", "edited", "edited"),
        ("kept", "train", "git reset -q --soft HEAD~2", "discarded", "other", "other"),
        # at the worst moment, when the record is written and the branch is not: the next run completes it
        ("kept", "update-ref -m", MINE, "", "candidate", "candidate"),
        # what the settings are by then is for the next run
        ("kept", "judge", "sed -i 's/budget: 120/budget: 119/' program.md", "kept", "candidate", "candidate"),
        ("kept", "judge", "sed -i 's/budget: 120/budget: soon/' program.md", "kept", "candidate", "candidate"),
        ("kept", "judge", "printf x >>data/prints/val.key.npy", "", "incumbent", "candidate"),
    ],
)
def test_what_the_user_does_meanwhile(sweep: Sweep, tmp_path, verdict, at, script, ends, head, file):
    """Never lost and never overwritten, whatever a run under way then decides."""
    project, before = sweep.bases[verdict].copy(tmp_path / "repo"), sweep.before[verdict]
    if "val.key" in script:  # its own copy: the data of all projects here are hard links
        key = project.path / "data/prints/val.key.npy"
        key.write_bytes((key.read_bytes(), key.unlink())[0])
    (sweep.shims.folder / "meanwhile").write_text(script + "\n")
    sweep.shims.arm(at if at in STAGES else sweep.call(verdict, at), "meanwhile")
    done = project.run(timeout=LIMIT_S)
    sweep.shims.arm()
    n, was = before.last + 1, project.git("reflog", "--format=%H")
    assert block(done.stdout).get("verdict", "") == ends, done.stdout + done.stderr
    assert done.returncode == (0 if ends else 2) and "Traceback" not in done.stderr
    project.git("checkout", "-q", "program.md")
    if "val.key" in script:
        assert "data/prints/val.key.npy has 1729 bytes instead of 1728" in done.stderr
        assert project.experiments() == [*range(1, n)] and project.read("train.py") == before.candidate
        return
    if not ends:
        project.edit("data: prints", "data: nowhere", "program.md")
        assert f"completed experiment {n}" in again(project).stderr
    texts = {"candidate": before.candidate, "incumbent": before.incumbent, "edited": None}
    for want, text in ((head, project.git("show", "HEAD:train.py") + "\n"), (file, project.read("train.py"))):
        if want == "edited":
            assert "is edited" in text
        elif want in texts:
            assert text == texts[want]
    assert project.trailers(f"refs/experiments/{n}")["Verdict"] == (ends or "kept")
    assert project.experiments() == [*range(1, n + 1)]
    if "-m mine" in script or "-qm mine" in script:
        assert "mine" in project.git("log", "-3", "--format=%s").splitlines() and was
    staged = project.git("diff", "--cached", "--name-only").split()
    assert set(staged) <= {"LICENSE", "train.py"} or "reset" in script
    assert "LICENSE" in staged or "commit" in script
    assert "fatal" not in project.git("fsck") and project.containers() == ""
    assert len({project.trailers(f"refs/experiments/{i}")["Comparable"] for i in (2, n)}) == 1


@pytest.mark.parametrize("state", ["MERGE", "rebase", "CHERRY_PICK", "REVERT"])
def test_in_the_middle_of_something_nothing_runs(project: Project, state: str):
    for branch in ("other", "main"):
        project.git("switch", "-qC", branch)
        project.write("LICENSE", branch)
        project.git("commit", "-qam", branch)
        project.git("branch", "-f", "old", "HEAD^")
    project.git("branch", "-f", "other", "old")
    project.git("switch", "-q", "other")
    project.write("LICENSE", "something else")
    project.git("commit", "-qam", "something else")
    command = {"MERGE": "merge", "rebase": "rebase", "CHERRY_PICK": "cherry-pick", "REVERT": "revert"}[state]
    project.git(command, *(["--no-edit", "main^"] if state == "REVERT" else ["main"]), check=False)
    project.set("STEPS", "7")
    for verb in ([], ["keep", "1"], ["final"]):
        done = project.run(*verb)
        assert (done.returncode, done.stderr) == (2, f"run.sh: git is in the middle of a {state}; finish or abort it "
                                                     "first\n")  # fmt: skip
    project.git(command, "--abort")
    assert project.experiments() == [1] and project.git("rev-parse", "HEAD") == project.git("rev-parse", "other")


def test_killed_between_record_and_branch_the_verdict_waits_for_this_worktrees_next_run(sweep: Sweep, tmp_path):
    project, before = sweep.bases["kept"].copy(tmp_path / "repo"), sweep.before["kept"]
    project.git("worktree", "add", "-q", "-b", "second", str(tmp_path / "second"))
    other, n = Project(tmp_path / "second"), before.last + 1
    sweep.shims.arm(sweep.call("kept", "update-ref -m"), "before", "self")
    subprocess.run(["./run.sh"], cwd=project.path, capture_output=True, start_new_session=True)
    sweep.shims.arm()
    other.write("train.py", CRASH)
    for name in (f"runs/{n:04d}.log", f"runs/{n + 1:04d}.log"):  # left by a run here that was killed while it trained
        (other.path / "runs").mkdir(exist_ok=True)
        other.write(name, "step 1\n")
    other.hypothesis("crash")
    done = again(other)
    assert "completed" not in done.stderr and block(done.stdout)["experiment"] == str(n + 1), done.stdout + done.stderr
    assert other.git("rev-parse", "HEAD") == before.head == project.git("rev-parse", "HEAD")
    project.edit("data: prints", "data: nowhere", "program.md")
    assert f"completed experiment {n}," in again(project).stderr
    assert project.git("show", "HEAD:train.py") + "\n" == before.candidate and "completed" not in again(project).stderr


def test_a_stale_lock_on_the_record_goes_also_while_a_git_runs(sweep: Sweep, tmp_path):
    """A log left open in a pager is a git that runs all night."""
    project = sweep.bases["discarded"].copy(tmp_path / "repo")
    n = project.experiments()[-1] + 1
    (lock := project.path / f".git/refs/experiments/{n}.lock").touch()
    with subprocess.Popen(["git", "cat-file", "--batch"], cwd=project.path, stdin=subprocess.PIPE) as left_open:
        done = project.run()
        assert left_open.poll() is None
        left_open.stdin.close()
    assert block(done.stdout)["verdict"] == "discarded" and project.experiments()[-1] == n, done.stdout + done.stderr
    assert not lock.exists()


def test_clones_shallow_and_without_the_record(sweep: Sweep, tmp_path):
    project = sweep.bases["kept"].copy(tmp_path / "repo")
    assert block(project.run(timeout=LIMIT_S).stdout)["verdict"] == "kept"
    for name, *options in (("plain",), ("shallow", "--depth=1")):
        subprocess.run(["git", "clone", "-q", *options, f"file://{project.path}", tmp_path / name], check=True)
        clone = Project(tmp_path / name)
        shutil.copytree(project.path / "data", clone.path / "data", copy_function=os.link)
        clone.write("train.py", CRASH)
        done, shown = clone.experiment("crash", timeout=LIMIT_S)
        assert (done.returncode, shown["verdict"], shown["experiment"]) == (1, "failed", "4"), done.stdout + done.stderr
        assert "best:     mean_rank 51.9" in clone.run("status").stdout
        assert clone.git("status", "--porcelain") == "M scratchpad.md" and clone.experiments() == [4]


def test_a_clock_that_was_set_back(sweep: Sweep, tmp_path):
    """Records, and what is left of a killed run, from next year: numbers count, not times."""
    project, before = sweep.bases["kept"].copy(tmp_path / "repo"), sweep.before["kept"]
    later = f"{time.time() + 366 * 86400:.0f}"
    for n in project.experiments():
        text = project.git("cat-file", "commit", f"refs/experiments/{n}")
        text = re.sub(r"^(author|committer)(.*> )\d+", rf"\1\g<2>{later}", text, flags=re.M) + "\n"
        done = subprocess.run(["git", "hash-object", "-t", "commit", "-w", "--stdin"], cwd=project.path, input=text,
                              capture_output=True, text=True, check=True)  # fmt: skip
        project.git("update-ref", f"refs/experiments/{n}", done.stdout.strip())
    for file in (project.path / "runs").glob("*.*"):
        os.utime(file, (int(later), int(later)))
    runs = subprocess.Popen(["bash", "-c", "exec -a run.sh sleep 300"], cwd=project.path)
    left = {"pid": runs.pid, "n": 9, "what": "run 1", "started": int(later), "budget": 5}
    project.write("runs/running.json", json.dumps(left))
    assert re.search(r"running: +experiment 9 \(run 1\), at most [0-5] s left", project.run("status").stdout)
    runs.kill()
    runs.wait()
    done = project.run(timeout=LIMIT_S)
    assert block(done.stdout)["verdict"] == "kept", done.stdout + done.stderr
    assert consistent(project, before, recovered=True) == [] and "nothing" in project.run("status").stdout


def test_a_thousand_experiments_cost_no_time(sweep: Sweep, tmp_path, monkeypatch, figure):
    """All that run.sh itself does for an experiment, with an engine that refuses to train, against two records."""
    seconds: dict = {2: [], RECORDED: []}
    for count in seconds:
        project = sweep.bases["kept"].copy(tmp_path / str(count))
        project.git("checkout", "-q", "HEAD", "train.py")  # the made-up baseline
        if count > 2:
            mark, real = project.trailers("refs/experiments/2")["Comparable"], made_up.Day.add
            monkeypatch.setattr(made_up.Day, "add", lambda day, *a, **k: real(day, *a, **{"comparable": mark, **k}))
            made_up.day(project.path, count).done()
        project.edit("until: 40", f"until: {2 * RECORDED}", "program.md")
        project.git("commit", "-qm", "a longer plan", "program.md")
        assert len(project.experiments()) >= count
        sweep.shims.arm("train", "refused", "1")
        project.write("train.py", "IDEA = 'first'\n")
        project.experiment("where the incumbent is due to be measured once more, that is tried now", timeout=LIMIT_S)
    for i in range(TIMES):
        for count, took in seconds.items():
            project = Project(tmp_path / str(count))
            project.write("train.py", f"IDEA = {i}\n")
            sweep.shims.arm("train", "refused", "1")
            started = time.monotonic()
            done, shown = project.experiment(f"idea {i}", timeout=LIMIT_S)
            took.append(time.monotonic() - started)
            assert shown.get("verdict") == "failed" and "did not start" in shown["reason"], done.stdout + done.stderr
    sweep.shims.arm()
    few, many = (min(took) for took in seconds.values())  # the least disturbed by whatever else runs
    figure("1,000 experiments", 2 * TIMES, int(many > few + SLOWER_S), seconds=round(many, 2), few=round(few, 2))
    assert many <= few + SLOWER_S, seconds


def test_an_engine_that_starts_nothing_is_no_experiment(sweep: Sweep, tmp_path):
    """A full storage, a driver that was updated: it would end phase after phase."""
    project = sweep.bases["kept"].copy(tmp_path / "repo")
    before, pad = project.experiments(), project.read("train.py")
    for stage in ("train", "images"):
        sweep.shims.arm(stage, "refused", "125")
        done = project.run(timeout=LIMIT_S)
        assert done.returncode == 2 and f"could not start the sandbox of {stage}" in done.stderr, done.stdout
    sweep.shims.arm()
    assert (project.experiments(), project.read("train.py"), project.containers()) == (before, pad, "")


@contextlib.contextmanager
def mounted(kind: str, at: Path, *options: str):
    """A mount for the time of the test. Yields False where the caller may not mount."""
    done = subprocess.run(["mount", *options, kind, at], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", at], check=True)


def test_a_full_disk(sweep: Sweep, tmp_path, sample, figure):
    """With more and more room left, from none: an error in one line, or a verdict; nothing lost, and it goes on later.

    Who may not mount gets a limit on the size of files instead, which ends whoever writes beyond it.
    """
    sizes, complaints, before, ends = sample(list(DISK_KIB), ROOMS), {}, sweep.before["kept"], {}
    (tmp_path / "disk").mkdir()
    started = time.monotonic()
    for room in sizes:
        with mounted("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m") as small:
            base = sweep.bases["kept"]
            shutil.copytree(base.path, tmp_path / "disk/repo", symlinks=True, ignore=shutil.ignore_patterns("data"))
            project = Project(tmp_path / "disk/repo")
            (project.path / "data").symlink_to(base.path / "data")
            limit = {}
            if small:
                free = os.statvfs(project.path)
                (tmp_path / "disk/filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (room << 10))))
            else:
                limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room << 10, room << 10))}
            done = project.run(timeout=LIMIT_S, **limit)
            (tmp_path / "disk/filler").unlink(missing_ok=True)
            ends[room] = f"{done.returncode} {block(done.stdout).get('verdict', '')}"
            wrong = [] if ends[room] in ("0 kept", "1 failed", "2 ") or not small else [ends[room]]
            if "Traceback" in done.stderr or not (done.stderr or done.stdout).splitlines()[-1].startswith(
                ("run.sh: ", "next: ") if small else ""
            ):
                wrong.append(done.stderr)
            wrong += consistent(project, before, recovered=False) + next_run(project, before)
            if wrong:
                complaints[room] = [done.stderr, *wrong]
                print(f"{room} KiB free", *complaints[room], sep="\n    ", flush=True)
            shutil.rmtree(project.path)
    figure("full disk", len(sizes), len(complaints), seconds=round(time.monotonic() - started),
           **collections.Counter(f"ended {end}".strip() for end in ends.values()))  # fmt: skip
    assert not complaints


def test_read_only_git(project: Project):
    """One line, and nothing runs; for root, whom permissions do not stop, it is a mount."""
    git = project.path / ".git"
    project.set("STEPS", "7")
    with mounted(git, git, "--bind") as root:
        if root:
            subprocess.run(["mount", "-o", "remount,ro,bind", git], check=True)
        else:
            (git / "autoresearch.lock").chmod(0o400)
        done = project.run()
        told = f"run.sh: cannot write {git}/autoresearch.lock; is .git read-only?\n"
        assert (done.returncode, done.stderr) == (2, told)
        assert "baseline" in project.run("log").stdout and project.run("status").returncode == 0


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


def test_damaged_data_are_named_and_never_give_a_number(project: Project):
    data, kept = project.path / "data/prints", project.path / "data/kept"
    shutil.copytree(data, kept)  # not a link: every damage is to a copy of these

    def refusal() -> str:
        done = project.run()
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
        return done.stderr

    project.set("STEPS", "7")
    project.hypothesis("")
    for name, damage, message in DAMAGE:
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        assert "no hypothesis" in refusal()  # a copy is as good, and is remembered
        damage(data / name)
        said = refusal()
        assert message in said and f"data/prints/{name}" in said or "version" in said, (name, damage, said)
        assert said == refusal()  # what is bad is not remembered as good
    assert project.experiments() == [1]


def test_other_data_or_another_image_of_the_same_tag_are_not_compared(sweep: Sweep, tmp_path):
    project = sweep.bases["discarded"].copy(tmp_path / "repo")

    def python(*words: str) -> str:
        done = subprocess.run(["python3", *words], cwd=project.path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def kind() -> str:
        return python(".claude/hooks/result.py", "plan", "0", python("container/engine.py", "image")).split()[0]

    assert kind() == "kind=candidate"
    info = project.path / "data/prints/info.json"
    text = info.read_text()
    info.unlink()
    info.write_text(text.replace(json.loads(text)["hash"], "0" * 64))
    assert kind() == "kind=baseline"
    info.write_text(text)
    assert kind() == "kind=candidate"

    base = python("container/engine.py", "image")
    project.write("container/requirements.txt", project.read("container/requirements.txt") + f"# {tmp_path}\n")
    name = "import sys; sys.path.insert(0, 'container'); import engine; print(engine.image_tag(engine.DEBIAN_BASE))"
    tag, found = python("-c", name), {base}
    try:
        for version in ("1", "2"):
            (tmp_path / "Containerfile").write_text(f"FROM {base}\nLABEL version={version}\n")
            build = [*python("-c", name.split(";")[0] + "; sys.path.insert(0, 'container'); import engine; "
                             "print(*engine.client())").split(), "build", "-q", "-t", tag, str(tmp_path)]  # fmt: skip
            subprocess.run(build, check=True, capture_output=True)
            found.add(python("container/engine.py", "image"))
            assert kind() == "kind=baseline"
            if version == "1":
                project.git("checkout", "-q", "train.py")
                assert block(project.run(timeout=LIMIT_S).stdout)["verdict"] == "baseline"
                assert kind() == "kind=remeasure"
    finally:
        subprocess.run([engine(), "rmi", "-f", tag], capture_output=True)
    assert len(found) == 3
