"""Projects for the client: made-up data and baseline, real hooks, settings and record. Few tests need an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import instant
from repository import Project


@pytest.fixture(scope="session")
def made_up_base(tmp_path_factory) -> Project:
    """Not to be changed: use `made_up`, or `quick`."""
    return instant.create(tmp_path_factory.mktemp("made-up") / "repo")


@pytest.fixture
def made_up(made_up_base: Project, tmp_path: Path) -> Project:
    """A copy to be used up by one test. Its run.sh is the real one, which would want an engine for an experiment."""
    shutil.copytree(made_up_base.path, tmp_path / "repo", symlinks=True)
    return Project(tmp_path / "repo")


@pytest.fixture
def quick(made_up: Project) -> Project:
    """In which ./run.sh alone records a made-up discarded experiment, in no time."""
    instant.make_instant(made_up)
    return made_up


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
