"""Kinds of experiments with rules of their own: simplifications and controls."""

from __future__ import annotations

import pytest

import experiment
from in_process import INCUMBENT_TEXT, KEPT, Small, train_py

FASTER, SHORTER = "SECONDS = 1.2\n", ""  # than the incumbent's 1.5, and than its lines


def test_a_simplification_that_loses_nothing_is_kept(small: Small):
    small.write("train.py", train_py(100.5, FASTER))
    done, shown = small.experiment("Simplify: half precision, exactly the same")
    assert shown["verdict"] == "kept" and shown["costs"] == "training time -20 %, lines of code +100 %", done.stderr
    assert "mean of 2 runs" in shown["mean_rank"] and small.git("log", "-1", "--format=%s").endswith("(100.0 → 100.6)")
    trailers = small.trailers("HEAD")
    assert trailers["Anchor"] == small.git("rev-parse", "HEAD^:train.py") and trailers["Saved"] == shown["costs"]
    small.write("train.py", train_py(101.2))
    _, shown = small.experiment("simplify: a line less")
    assert shown["verdict"] == "kept" and shown["costs"].endswith("against what was there before all simplifications")
    small.write("train.py", train_py(102.3, FASTER))  # 1.1 % worse than the incumbent, 2.3 % than the anchor
    _, shown = small.experiment("simplify: another")
    assert shown["verdict"] == "discarded" and "+1.1 %" in shown["change"] and "; +2.3 % against" in shown["costs"]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""A docstring."""\nx = 1\n', 1),
        ("x = 1; y = 2;\n", 2),
        ("f(\n    1,\n\n    2,  # a comment\n)\n", 1),
        ('def f():\n    """What it\n    does."""\n    return 1\n', 2),
        ("# \xe9\n\nx = '# no comment'\n", 1),
        ("(", 0),
        ("", 0),
    ],
)
def test_what_counts_as_a_line_of_code(source: str, count: int):
    assert experiment.lines_of_code(source.encode()) == count


def test_a_simplification_that_saves_too_little_or_loses_too_much_is_not(small: Small):
    small.write("train.py", train_py(100.5, "# a comment\n\n"))
    _, shown = small.experiment("simplify: nothing")
    assert shown["verdict"] == "discarded" and "lines of code +0 % (too little saved: 10 % less time" in shown["costs"]
    assert "mean of" not in shown["mean_rank"]
    small.write("train.py", train_py(104, FASTER))
    _, shown = small.experiment("simplify: half precision")
    assert shown["verdict"] == "discarded" and "mean of 2 runs" in shown["mean_rank"]
    small.write("train.py", KEPT)
    assert small.experiment("simplify: and much better")[1]["verdict"] == "kept"
    assert "Anchor" not in small.trailers("HEAD")


def test_an_incumbent_of_one_run_runs_again_before_a_simplification(small: Small):
    small.write("train.py", KEPT)
    small.experiment("better")
    small.write("train.py", train_py(50.1, FASTER))
    done, shown = small.experiment("simplify: half precision")
    assert "measured the incumbent first" in done.stderr and "(2 runs)" in shown["before"]


def test_a_control_is_measured_and_never_kept(small: Small):
    small.write("train.py", KEPT)
    done, shown = small.experiment("control: without the expert")
    assert (done.returncode, shown["verdict"]) == (0, "control") and "sigma better" in shown["change"]
    assert small.read("train.py") == INCUMBENT_TEXT and "the incumbent again)" in shown["commit"]
    assert "2\tcontrol\t50.0\t-50.0 %" in small.read("runs/experiments.tsv") and " control " in small.run("log").stdout
    assert "1 experiment: 0 kept, 0 discarded, 0 failed, 1 control" in small.run("status").stdout
    small.write("train.py", KEPT)  # what it taught may be used
    assert small.experiment("without the expert")[1]["verdict"] == "kept"
