"""What audit and final add to a data set, and the interval they print."""

from __future__ import annotations

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import COUNTS, SIZE, TINY, make
from scipy import stats

import prepare_data
import prints
import publish


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path / "prints", *TINY)


def add(folder: Path, what: str) -> None:
    assert prepare_data.main(["prints", "--add", what, "--out", str(folder)]) == 0


def rows(table: datasets.Dataset) -> list[tuple[bytes, str]]:
    return [(np.asarray(r["image"], np.uint8).tobytes(), r["caption"]) for r in table]


def drawn(first: int, count: int) -> list[tuple[bytes, str]]:
    made = (prints.draw(prepare_data.PRINTS_SEED, i, SIZE) for i in range(first, first + count))
    return [(image.tobytes(), caption) for image, caption, _ in made]


def test_trainval_holds_the_pairs_of_both_splits(made: Path):
    before = {file for file in made.rglob("*") if "trainval" not in file.parts}
    add(made, "trainval")
    after = {file for file in made.rglob("*") if "trainval" not in file.parts}
    assert after == before  # nothing of validation pairs beside what a train.py sees
    table = datasets.load_from_disk(made / "trainval")
    assert sorted(rows(table)) == sorted(drawn(0, COUNTS["train"] + COUNTS["val"]))
    regions = dict(zip(table["caption"], table["regions"], strict=True))
    _, caption, expected = prints.draw(prepare_data.PRINTS_SEED, COUNTS["train"], SIZE)  # the first of validation
    assert [r["phrase"] for r in regions[caption]] == [r["phrase"] for r in expected]


def test_an_audit_draws_pairs_that_nothing_else_has(made: Path):
    seen = {image for image, _ in drawn(0, sum(COUNTS.values()))}
    for number in (0, 1):
        add(made, f"audit={number}")
        images, captions = (datasets.load_from_disk(made / "audit" / side) for side in ("images", "captions"))
        key = np.load(made / "audit.key.npy")
        pairs = [(np.asarray(r["image"], np.uint8).tobytes(), captions[int(k)]["caption"]) for r, k in zip(images, key)]
        assert sorted(pairs) == sorted(drawn(sum(COUNTS.values()) + number * COUNTS["val"], COUNTS["val"]))
        assert not seen & {image for image, _ in pairs}
        seen |= {image for image, _ in pairs}
    assert not list(made.glob("*.partial"))


def test_an_audit_of_prints_that_another_version_drew_is_refused(made: Path, capsys, monkeypatch):
    monkeypatch.setattr(prints, "VERSION", prints.VERSION + 1)
    assert prepare_data.main(["prints", "--add", "audit=0", "--out", str(made)]) == 1
    assert "was drawn by another version of prints.py; move it away" in capsys.readouterr().err
    assert not (made / "audit").exists()


@pytest.mark.parametrize(("before", "after"), [([285.0, 270, 301], [160.0, 171, 150]), ([10.0, 12], [10.5, 11.9, 11])])
def test_the_interval_is_welchs(before: list, after: list):
    found = publish.difference(before, after)
    welch = stats.ttest_ind(np.log(after), np.log(before), equal_var=False)
    shift = np.log(after).mean() - np.log(before).mean()
    assert found["percent"] == pytest.approx((math.exp(shift) - 1) * 100, abs=0.06)
    half = stats.t.ppf(0.975, math.floor(welch.df)) * abs(shift / welch.statistic)  # whole degrees: the cautious side
    assert found["low"] == pytest.approx((math.exp(shift - half) - 1) * 100, rel=0.01, abs=0.1)
    assert found["high"] == pytest.approx((math.exp(shift + half) - 1) * 100, rel=0.01, abs=0.1)
