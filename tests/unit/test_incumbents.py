"""The report: what the incumbent was after every experiment, which is the line of the progress curve."""

from __future__ import annotations

import pytest

import report
from recorded import Recorded

BASELINE, BETTER, BEST = "a" * 40, "b" * 40, "c" * 40  # blobs of train.py


@pytest.fixture
def recorded(monkeypatch) -> Recorded:
    made = Recorded(monkeypatch)
    made.add("baseline", ranks=(90.0, 100.0), train=BASELINE)
    return made


def test_the_incumbent_is_the_mean_of_its_runs_until_then(recorded: Recorded):
    recorded.add("discarded", ranks=(120.0,))
    recorded.add("kept", ranks=(80.0,), train=BETTER)
    recorded.add("failed")
    recorded.add("remeasured", ranks=(85.0,), train=BETTER)
    found, train = report.incumbents(recorded.history)
    baseline, twice = (90 * 100) ** 0.5, (80 * 85) ** 0.5
    assert found == pytest.approx({1: baseline, 2: baseline, 3: 80, 4: 80, 5: twice}) and train == BETTER


def test_each_branch_has_its_own(recorded: Recorded):
    recorded.add("kept", ranks=(80.0,), train=BETTER)
    recorded.branch = "gpu1"  # begins with what main had kept until then
    assert report.incumbents(recorded.history)[1] == BETTER
    recorded.add("kept", ranks=(70.0,), train=BEST)
    recorded.branch = "main"
    found, train = report.incumbents(recorded.history)
    assert found[3] == pytest.approx(80) and train == BETTER


def test_one_kept_by_hand_that_nobody_measured_changes_nothing(recorded: Recorded):
    recorded.add("kept", ranks=(), train=BETTER, by_hand=True)
    assert report.incumbents(recorded.history)[1] == BASELINE


def test_none_where_what_was_kept_is_missing(monkeypatch):
    recorded = Recorded(monkeypatch)
    recorded.add("discarded", ranks=(120.0,))
    assert report.incumbents(recorded.history) == ({}, "")


def test_a_baseline_that_failed_once_is_not_what_the_curve_begins_with(monkeypatch, recorded: Recorded):
    monkeypatch.setattr(report.git, "contents", lambda names: {})
    monkeypatch.setattr(report.git, "read", lambda *words, **how: "")
    monkeypatch.setattr(report.locks, "running_line", lambda: "")
    first = recorded.records.pop()
    half = recorded.add("baseline", ranks=(95.0,), train=BASELINE)
    recorded.records[-1] = report.Record(**{**vars(half), "verdict": "unmeasured"})
    recorded.records.append(report.Record(**{**vars(first), "number": 2}))
    found = report.gather()
    assert found["sides"] == {"baseline": 2, "best": 2}
    assert found["experiments"][0]["incumbent"] is None
