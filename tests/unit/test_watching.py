"""What a person sees of a training under way: the live line of a terminal, and the status line."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

import locks
from locks import Running


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "train.log"


def training(log: Path, text: str, seconds: float = 30, ago: float = 0, skip: int = 0) -> Running:
    """One whose log was written after so many seconds, and that is looked at a while later."""
    log.write_text(text)
    os.utime(log, (now := time.time(), now - ago))
    stage = {"log": str(log), "skip": skip, "stage": locks.TRAINS}
    return Running(1, 17, "candidate, run 1", now - ago - seconds, 120, **stage)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("step 100/400 loss 2.310\n", "step 100/400 (25 %), 90 s left, loss 2.310"),
        ("step 10/400 loss 3\nstep 300/400 loss -2.5\nnoise\n", "step 300/400 (75 %), 10 s left, loss -2.5"),
        ("step 100/400\n", "step 100/400 (25 %), 90 s left"),
        ("step 100/400 loss nan\n", "step 100/400 (25 %), 90 s left, loss nan"),
        ("step 100/400 loss 2.3e-5\n", "step 100/400 (25 %), 90 s left, loss 2.3e-5"),
        ("step 1/400 loss 2.0\n", "step 1/400 (0 %), 90 s left, loss 2.0"),  # the budget ends before
        ("step 900/400 loss 2.0\n", "step 900/400 (100 %), 0 s left, loss 2.0"),
        ("step 100/400 loss 2.0\nstep 200/4", "step 100/400 (25 %), 90 s left, loss 2.0"),  # half-written
        ("step 100/400 loss 2.0.1\n", "step 100/400 (25 %), 90 s left"),
        ("step 100/400 loss \x1b[2J\n", "step 100/400 (25 %), 90 s left"),
        ("x" * 9000 + "\nstep 100/400\n", "step 100/400 (25 %), 90 s left"),
        ("step 100/400\n" + "x\n" * 9000, "at most 90 s left"),
        ("", "at most 90 s left"),
        ("step 0/400\nstep 1/0\nstep 1/4000000000\n step 1/4\nstep one/2\n", "at most 90 s left"),
        ("step 3/4 \x1b[2J loss 1\n", "step 3/4 (75 %), 10 s left"),
    ],
)
def test_the_progress_of_a_training(log, text, line):
    assert ", ".join(locks.progress(training(log, text))) == line


def test_seconds_left_fall_between_two_steps(log):
    assert locks.progress(training(log, "step 100/400\n", ago=40))[1] == "50 s left"
    assert locks.progress(training(log, "step 100/400\n", ago=200))[1] == "0 s left"
    assert locks.progress(training(log, "step 100/400\n", seconds=-500))[1] == "0 s left", "the clock was set back"


def test_what_earlier_runs_and_stages_left_is_not_shown(log):
    first = "step 400/400 loss 1.0\n"
    assert locks.progress(training(log, first, skip=len(first))) == ["at most 90 s left"]
    assert locks.progress(training(log, f"{first}step 4/400\n", skip=len(first)))[0] == "step 4/400 (1 %)"
    log.unlink()
    assert locks.progress(Running(1, 17, "", time.time(), 90, log=str(log), stage=locks.TRAINS)) == [
        "at most 90 s left"
    ]
    assert locks.progress(Running(1, 17, "", 0.0, 90, stage=locks.EMBEDS)) == [locks.EMBEDS]
    assert locks.progress(Running(1, 17, "waits for a device", 0.0, 90)) == []


def test_a_stage_begins_where_the_log_ends(monkeypatch, tmp_path, log):
    """Also on a full disk, where nothing is said of it."""
    monkeypatch.setattr(locks, "ROOT", tmp_path)
    locks.announce(17, "candidate, run 2", 120)
    monkeypatch.setattr(locks, "running", lambda: Running(**locks.read_json(tmp_path / locks.RUNNING, {})))
    before = locks.running()
    log.write_text("step 400/400\n")
    locks.enter(locks.TRAINS, log)
    now = Running(**locks.read_json(tmp_path / locks.RUNNING, {}))
    assert (now.activity, now.stage, now.skip) == (
        "candidate, run 2",
        locks.TRAINS,
        13,
    ) and now.started > before.started
    monkeypatch.setattr(locks, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    locks.enter(locks.EMBEDS, log)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_live_line_in_a_terminal_alone(monkeypatch, tmp_path, terminal):
    here, there = os.openpty()
    where = os.fdopen(there, "w") if terminal else (tmp_path / "stderr").open("w")
    monkeypatch.setattr(sys, "stderr", where)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(locks, "running_line", lambda: "experiment 17 (candidate, run 1), step 3/4")
    done = threading.Event()
    (drawer := threading.Thread(target=locks.draw_live_line, args=(done,))).start()
    if terminal:
        assert os.read(here, 99) == b"experiment 17 (cand\r"
        done.set()
    drawer.join(10)  # without a terminal it has ended by itself
    assert os.read(here, 99) == b"\x1b[K" if terminal else (tmp_path / "stderr").read_text() == ""
    assert not drawer.is_alive()


@pytest.mark.parametrize("activity", ["candidate, run 2", "training 99 of 100, best without 1000", "a" * 300])
def test_the_status_line_fits_and_begins_with_what_runs(loop, monkeypatch, log, activity):
    loop.plan.edit("## Phase 1 — first\n", "## Phase 1 — first (a (long) name)\npatience: 3\n")
    loop.plan.add("baseline", train=loop.plan.incumbent)
    runs = training(log, "step 123456789/987654321 loss 2.31\n")
    runs.number, runs.activity = 1000, activity
    monkeypatch.setattr(locks, "running", lambda: runs)
    loop.plan.add("discarded")
    line = loop.call("statusline").rstrip("\n")
    assert len(line) <= 96 and line.startswith(
        f"#1000 {activity}, step 123456789/987654321 (12 %), "[:96].replace("candidate, ", "")
    ), line
    runs.log = str(log.with_name("missing"))
    if activity == "candidate, run 2":
        best = r"mean_rank 100\.0[^|]* \(\+0\.0 %\) \| phase 1/2, 1/40, chain 1/3"
        assert re.fullmatch(rf"#1000 run 2, at most 90 s left \| {best}\n", line := loop.call("statusline")), line
