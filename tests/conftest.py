"""Throw-away copies of this repository with tiny data, for tests with the real engine, git, client and trainings."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = ["inside", "bench", "long"]  # run inside the image (test_inside.py), or by hand
TINY = ("--train", "600", "--val", "200", "--test", "100")
SAMPLE_SEED = 4  # of what a sweep tries where it does not try everything
STEPS = 30  # of a test's training: about 3 s on two quiet cores
PROGRAM = """# Program

## Settings
data: prints
budget: 120
memory: 3 GB
stop: 100 experiments

## Phase 1 — first
until: 40 experiments

## Phase 2 — second
"""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every point of every sweep instead of a seeded sample")
    parser.addoption("--figures", type=Path, help="append what the sweeps counted to this file, a JSON line a row")


@pytest.fixture
def sample(request):
    """sample(points, count): the same `count` of them every time, in their order; all with --full."""

    def pick(points: list, count: int) -> list:
        if request.config.getoption("full") or count >= len(points):
            return list(points)
        return [points[i] for i in sorted(random.Random(SAMPLE_SEED).sample(range(len(points)), count))]

    return pick


@pytest.fixture
def figure(request):
    """figure(sweep, tried, wrong, **more): a row of the table that tests/long/trust.py makes."""
    started = time.monotonic()
    where = {"commit": git_at(ROOT, "describe", "--always", "--dirty"), "when": time.strftime("%Y-%m-%d %H:%M")}

    def add(sweep: str, tried: int, wrong: int, **more) -> None:
        seconds = round(time.monotonic() - started)
        row = {
            "sweep": sweep,
            "tried": tried,
            "wrong": wrong,
            "engine": engine_name(),
            "seconds": seconds,
            **where,
            **more,
        }
        print(json.dumps(row))
        if file := request.config.getoption("figures"):
            with file.open("a") as f:
                f.write(json.dumps(row) + "\n")

    return add


def git_at(folder: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True).stdout.strip()


def engine_name() -> str:
    """As people write it: podman 4.3.1."""
    said = subprocess.run([engine(), "--version"], capture_output=True, text=True).stdout
    return f"{engine()} {re.search(r'[0-9][0-9.]*[0-9]', said)[0]}"


class Project:
    """A copy of the repository; every method works on its folder alone."""

    def __init__(self, path: Path):
        self.path = path

    def copy(self, path: Path) -> Project:
        """Another one there. Data files are hard links: they are only read."""
        shutil.copytree(self.path, path, symlinks=True, ignore=shutil.ignore_patterns("data"))
        shutil.copytree(self.path / "data", path / "data", copy_function=os.link)
        return Project(path)

    def run(self, *args: str, env: dict | None = None, timeout: int = 600, **kw) -> subprocess.CompletedProcess:
        """./run.sh ARGS, as a person would, with its output captured."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CLAUDE", "AR_"))}
        return subprocess.run(
            ["./run.sh", *args],
            cwd=self.path,
            env={**clean, **(env or {})},
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **kw,
        )

    def git(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(["git", *args], cwd=self.path, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def edit(self, old: str, new: str, name: str = "train.py") -> None:
        text = self.read(name)
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        self.write(name, text.replace(old, new))

    def set(self, constant: str, value: str) -> None:
        """Change a module constant of train.py."""
        text, n = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", self.read("train.py"), flags=re.M)
        assert n == 1, constant
        self.write("train.py", text)

    def hypothesis(self, text: str) -> None:
        pad = self.read("scratchpad.md")
        self.write(
            "scratchpad.md", re.sub(r"(## Next experiment\n).*?(?=\n## |\Z)", rf"\g<1>{text}\n", pad, flags=re.S)
        )

    def experiment(self, hypothesis: str, **kw) -> tuple[subprocess.CompletedProcess, dict]:
        """Write the hypothesis, run, return the process and the result block as a dict."""
        self.hypothesis(hypothesis)
        done = self.run(**kw)
        return done, block(done.stdout)

    def trailers(self, ref: str) -> dict:
        lines = self.git("show", "-s", "--format=%(trailers)", ref).splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def experiments(self) -> list[int]:
        return sorted(
            int(x) for x in self.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/experiments").split()
        )

    def containers(self, mark: str = "") -> str:
        label = subprocess.run(
            ["python3", "-c", "import engine; print(engine.label())"],
            cwd=self.path / "container",
            capture_output=True,
            text=True,
        ).stdout.strip()
        return subprocess.run(
            [engine(), "ps", "-aq", "--filter", f"label={label}{mark}"], capture_output=True, text=True
        ).stdout


def block(text: str) -> dict:
    """The last result block in run.sh's output."""
    lines = re.split(r"^---$", text, flags=re.M)[-1].splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines if not line.startswith("|"))}


def engine() -> str:
    return subprocess.run(
        ["python3", ROOT / "container" / "engine.py", "name"], capture_output=True, text=True
    ).stdout.strip()


def tracked() -> list[str]:
    """The files that git would carry."""
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    return [name for name in out.stdout.split("\0") if name and (ROOT / name).is_file()]


def tracked_code() -> dict[str, int]:
    """Lines of every file of product code: not the tests, not the drawing of the prints."""
    names = (f for f in tracked() if f.endswith((".py", ".sh")) and not f.startswith(("tests/", "container/prints.py")))
    return {f: len((ROOT / f).read_text().splitlines()) for f in names}


def copy_of_the_repository(path: Path) -> Project:
    """The files that git would carry, committed as one commit, with a short training and a short plan."""
    path.mkdir(parents=True)
    for name in tracked():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, path / name)
    project = Project(path)
    project.set("STEPS", str(STEPS))
    project.write("program.md", PROGRAM)
    project.git("init", "-q", "-b", "main")
    project.git("config", "user.name", "A Researcher")
    project.git("config", "user.email", "researcher@example.org")
    project.git("add", "-A")
    project.git("commit", "-qm", "start")
    return project


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Project:
    """A project with tiny data whose baseline is measured. Not to be changed: use `project`."""
    made = copy_of_the_repository(tmp_path_factory.mktemp("measured") / "repo")
    done = made.run("data", "prints", *TINY)
    assert done.returncode == 0, done.stderr
    done = made.run()
    assert done.returncode == 0, done.stderr + done.stdout
    made.baseline = done
    return made


@pytest.fixture
def project(measured: Project, tmp_path: Path) -> Project:
    """A copy of `measured`, to be used up by one test."""
    return measured.copy(tmp_path / "repo")


@pytest.fixture(scope="session")
def quick_base(measured: Project, tmp_path_factory) -> Project:
    """`measured` with a train.py that takes no time, sweep.QUICK. Not to be changed: use `fast`."""
    from sweep import quick

    return quick(tmp_path_factory.mktemp("quick") / "base", measured)


@pytest.fixture
def fast(quick_base: Project, tmp_path: Path) -> Project:
    """A copy of `quick_base`, to be used up by one test."""
    return quick_base.copy(tmp_path / "repo")
