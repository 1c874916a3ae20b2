"""A plan and the attempts recorded under it, in memory: the history that follows is the harness's own."""

from __future__ import annotations

from pathlib import Path

import pytest

import git
import program
import record
from history import History
from in_process import made_up_run
from record import Attempt, Record

PLAN = """# Plan

## Settings
data: prints

## Phase 1 — optimiser
until: 2 experiments

Learning rate, warm-up, weight decay.

## Phase 2 — expert views
until: 3 experiments, 2 discards

Heatmaps: on, off, always; mixup of both views.

## Phase 3 — architecture

Anything about the towers.
"""
INCUMBENT = "1" * 40  # blob of HEAD's train.py


class Recorded:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str = PLAN):
        self.text, self.records = text, []
        self.branch, self.incumbent, self.comparable = "main", INCUMBENT, "x"
        monkeypatch.setattr(git, "folder", lambda *_: Path("/dev/null"))  # root cannot write there either
        monkeypatch.setattr(record, "load_all", lambda: list(self.records))
        monkeypatch.setattr(git, "branch", lambda: self.branch)
        monkeypatch.setattr(git, "main_worktree", lambda: Path("/dev/null"))
        monkeypatch.setattr(git, "object_id", lambda name: self.incumbent)
        monkeypatch.setattr(program, "read", lambda: program.parse(self.text))

    def edit(self, old: str, new: str) -> None:
        assert old in self.text
        self.text = self.text.replace(old, new)

    @property
    def history(self) -> History:
        return History.load()

    def add(self, *verdicts: str, ranks: tuple = (100.0,), sigmas: float | None = None, **fields) -> Record:
        """Attempts in the current phase, as an experiment records them. Returns the last."""
        for verdict in verdicts:
            history, number = self.history, len(self.records) + 1
            runs = [] if verdict in ("failed", "unmeasured") else [made_up_run(rank) for rank in ranks]
            phase = history.phase.name if history.phase and verdict in record.JUDGED else ""
            how = {"train": f"{number:040d}", "comparable": self.comparable, "branch": self.branch, "phase": phase}
            how = {"hypothesis": f"idea {number}", **how, **fields}
            if verdict in record.JUDGED:
                how = {"chain": history.chain_after(verdict, sigmas), **how}
            attempt = Attempt(verdict, scratchpad="2" * 40, experiment=number, runs=runs, **how)
            self.records.append(record.parse(str(number), str(1000 + number), attempt.message()))
        return self.records[-1]
