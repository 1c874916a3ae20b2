"""Repositories in which a run takes a third of a second (support/in_process.py), and a loop in process (looping.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import night
from in_process import Small
from looping import Loop
from session import Night


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Small:
    """With a measured baseline. Not to be changed: use `small`."""
    return Small.create(tmp_path_factory.mktemp("small") / "repo")


@pytest.fixture
def small(small_base: Small, tmp_path: Path) -> Small:
    """A copy of `small_base`, to be used up by one test."""
    return small_base.copy(tmp_path / "repo")


@pytest.fixture
def loop(monkeypatch, capsys, tmp_path) -> Loop:
    return Loop(monkeypatch, capsys, tmp_path)


@pytest.fixture
def keeper(loop, monkeypatch):
    """keeper(what claude does, in sh): a night's, which knows no other client and does not wait long."""
    program = loop.folder / "bin/claude"
    path = f"{program.parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setitem(night.ENV, "PATH", path)
    monkeypatch.setattr(night, "OUTPUT", loop.folder / "runs/night.out")
    monkeypatch.setattr(night, "NIGHT", loop.folder / "runs/night.json")
    monkeypatch.setattr(night, "POLL", 0.05)

    def make(does: str, version: str = "") -> night.Keeper:
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n[ \"$1\" != --version ] || {{ echo '{version}'; exit; }}\n{does}\n")
        program.chmod(0o755)
        return night.Keeper(Night())

    return make
