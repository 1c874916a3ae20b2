"""Options and fixtures of all tiers. tests/unit needs no engine and no client; tests/engine and tests/client do."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import pytest

import engine
import repository
from repository import Project

collect_ignore = ["inside", "bench"]  # run inside the image (engine/test_inside.py), or by hand
SAMPLE_SEED = 4  # of what a sweep tries where it does not try everything


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
    commit = repository.git_at(repository.ROOT, "describe", "--always", "--dirty")

    def add(sweep: str, tried: int, wrong: int, **more) -> None:
        row = {"sweep": sweep, "tried": tried, "wrong": wrong, "engine": engine_name()}
        row |= {"seconds": round(time.monotonic() - started), "commit": commit, "when": time.strftime("%Y-%m-%d %H:%M")}
        print(json.dumps(row | more))
        if file := request.config.getoption("figures"):
            with file.open("a") as f:
                f.write(json.dumps(row | more) + "\n")

    return add


def engine_name() -> str:
    """As people write it: podman 4.3.1; none where there is none."""
    try:
        said = subprocess.run([engine.name(), "--version"], capture_output=True, text=True).stdout
        return f"{engine.name()} {re.search(r'[0-9][0-9.]*[0-9]', said)[0]}"
    except engine.Refused:
        return "none"


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Project:
    """A project with tiny data whose baseline is measured. Not to be changed: use `project`."""
    os.umask(0o022)
    made = repository.copy_of_the_repository(tmp_path_factory.mktemp("measured") / "repo")
    done = made.run("data", "prints", *repository.TINY)
    assert done.returncode == 0, done.stderr
    made.baseline = made.run()
    assert made.baseline.returncode == 0, made.baseline.stderr + made.baseline.stdout
    return made


@pytest.fixture
def project(measured: Project, tmp_path: Path) -> Project:
    """A copy of `measured`, to be used up by one test."""
    return measured.copy(tmp_path / "repo")


@pytest.fixture(scope="session")
def quick_base(measured: Project, tmp_path_factory) -> Project:
    """`measured` with a train.py that takes no time. Not to be changed: use `fast`."""
    return repository.quick(tmp_path_factory.mktemp("quick") / "base", measured)


@pytest.fixture
def fast(quick_base: Project, tmp_path: Path) -> Project:
    """A copy of `quick_base`, to be used up by one test."""
    return quick_base.copy(tmp_path / "repo")
