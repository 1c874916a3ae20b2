"""Repositories in which a run takes a third of a second: no engine, no training (support/in_process.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from in_process import Small


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Small:
    """With a measured baseline. Not to be changed: use `small`."""
    return Small.create(tmp_path_factory.mktemp("small") / "repo")


@pytest.fixture
def small(small_base: Small, tmp_path: Path) -> Small:
    """A copy of `small_base`, to be used up by one test."""
    return small_base.copy(tmp_path / "repo")
