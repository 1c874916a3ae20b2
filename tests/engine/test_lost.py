"""Nothing gets lost: the real ./run.sh killed, accidents with the engine, the disk and git.

Every call of git and every file written is a kill point of tests/unit/test_record.py, without an engine; what a user
does meanwhile is in tests/unit/test_experiment.py.
"""

from __future__ import annotations

import collections
import resource
import shutil
import subprocess
import time

import pytest

import engine
from repository import CANDIDATES, Project, block
from sweep import DISK_KIB, LIMIT_S, WHERE, Sweep, consistent, fill, mounted, next_run

KILLS = 1  # kill points of each kind in an ordinary test run
ROOMS = 1  # of those left on a full disk, in an ordinary test run


@pytest.fixture(scope="module")
def sweep(quick_base: Project, tmp_path_factory) -> Sweep:
    return Sweep(quick_base, tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("side", WHERE)
def test_killed(sweep: Sweep, sample, figure, side: str):
    """A seeded sample; with --full everywhere, and a run that is discarded too."""
    points = [p for p in [*sweep.points(), *sweep.moments(), *sweep.deaths()] if p[2] == side]
    complaints = {}
    for point in (points := sample(points, KILLS)):
        if wrong := sweep.kill(*point):
            call = sweep.calls[point[0]][point[1] - 1][:80] if point[2] in ("before", "after", "inside") else ""
            complaints[point] = [call, *wrong]
            print(point, call, *wrong, sep="\n    ", flush=True)
    figure(f"kill points: {WHERE[side]}", len(points), len(complaints))
    assert not complaints


def test_what_the_user_does_meanwhile(sweep: Sweep, tmp_path):
    """While containers run: the file is edited and another is committed, and the settings have a mistake."""
    project, before = sweep.bases["kept"].copy(tmp_path / "repo"), sweep.before["kept"]
    script = "sed -i 's/takes no time/is edited/' train.py; git commit -q --only LICENSE -m mine\n"
    (sweep.shims.folder / "meanwhile").write_text(script + "sed -i 's/budget: 120/budget: soon/' program.md\n")
    sweep.shims.arm("judge", "meanwhile")
    done = project.run()
    sweep.shims.arm()
    assert (done.returncode, block(done.stdout)["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert project.git("show", "HEAD:train.py") + "\n" == before.candidate and "is edited" in project.read("train.py")
    assert project.git("log", "-1", "--skip=1", "--format=%s") == "mine" and project.containers() == ""


def test_an_engine_that_starts_nothing_is_no_experiment(sweep: Sweep, tmp_path):
    """A full storage, a driver that was updated, a CDI specification that is missing (126 or 127): it would end phase
    after phase."""
    project = sweep.bases["kept"].copy(tmp_path / "repo")
    before, text = project.experiments(), project.read("train.py")
    for stage, status in (("train", 125), ("train", 126), ("train", 127), ("train", 1), ("images", 126)):
        sweep.shims.arm(stage, "refused", str(status))
        done = project.run()
        assert done.returncode == 2 and f"the sandbox of {stage} did not start" in done.stderr, done.stdout
        assert "nothing is recorded, and ./run.sh doctor says more" in done.stderr
    sweep.shims.arm()
    assert (project.experiments(), project.read("train.py"), project.containers()) == (before, text, "")


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
            project.given = f"{base.given}\nmeasure.ROOM = 0\n"  # as if another program filled it during the run
            (project.path / "data").symlink_to(base.path / "data")
            limit = {}
            if small:
                fill(tmp_path / "disk/filler", room)
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
    seconds = round(time.monotonic() - started)
    counts = collections.Counter(f"ended {end}".strip() for end in ends.values())
    figure("full disk", len(sizes), len(complaints), seconds=seconds, **counts)
    assert not complaints


def test_read_only_git(fast: Project):
    """One line, and nothing runs; for root, whom permissions do not stop, it is a mount."""
    git = fast.path / ".git"
    with mounted(git, git, "--bind") as root:
        if root:
            subprocess.run(["mount", "-o", "remount,ro,bind", git], check=True)
        else:
            (git / "autoresearch.lock").chmod(0o400)
        done = fast.run()
        text = f"run.sh: cannot write {git}/autoresearch.lock; is .git read-only?\n"
        assert (done.returncode, done.stderr) == (2, text)
        assert "baseline" in fast.run("log").stdout and fast.run("status").returncode == 0


def test_another_image_of_the_same_tag_is_not_compared(fast: Project, tmp_path):
    fast.write("train.py", CANDIDATES["discarded"])
    fast.hypothesis("an idea")

    def planned(code: str = "print(experiment.make_plan(False)[1][0].kind)") -> str:
        done = fast.run("help", given=f"{code}\nraise SystemExit")
        return done.stdout.strip() or done.stderr

    assert planned() == "candidate"
    base, found = engine.find_image(), {engine.find_image()}
    fast.write("container/image/requirements.txt", fast.read("container/image/requirements.txt") + f"# {tmp_path}\n")
    tag = planned("print(engine.image_tag(engine.DEBIAN_BASE))")
    try:
        for version in ("1", "2"):
            (tmp_path / "Containerfile").write_text(f"FROM {base}\nLABEL version={version}\n")
            build = [*engine.client(), "build", *engine.ulimits(), "-q", "-t", tag, str(tmp_path)]
            subprocess.run(build, check=True, capture_output=True)
            found.add(planned("print(engine.find_image())"))
            assert planned() == "baseline"
            if version == "1":
                fast.git("checkout", "-q", "train.py")
                assert block(fast.run().stdout)["verdict"] == "baseline"
                assert planned() == "remeasured"
    finally:
        subprocess.run([*engine.client(), "rmi", "-f", tag], capture_output=True)
    assert len(found) == 3
