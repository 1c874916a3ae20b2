"""What people and the agent are shown: below its size, and nothing that a terminal or a reader could take wrong."""

from __future__ import annotations

import re

import pytest

import display
import program
import project
import session
from in_process import Small, made_up_run, train_py
from measure import Run
from record import Attempt
from recorded import INCUMBENT, Recorded
from repository import CRASH, PROGRAM, block

KEYS = [
    "experiment",
    "verdict",
    "hypothesis",
    "mean_rank",
    "before",
    "change",
    "median_rank",
    "recall",
    "train",
    "commit",
    "log",
    "phase",
    "next",
]


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """shown(attempt): its block, with a log of an attack's."""
    for module, name, value in (
        (display, "ROOT", tmp_path),
        (session, "PLAN", tmp_path / "program.md"),
        (session, "KNOWN_PLAN", tmp_path / "known.md"),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(display, "run_file", lambda n, kind: tmp_path / f"runs/{n:04d}.{kind}")
    (tmp_path / "runs").mkdir()
    (plan := Recorded(monkeypatch, PROGRAM)).add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))

    def block_of(attempt: Attempt, log: bytes = b"") -> str:
        (tmp_path / "runs/0012.log").write_bytes(log)
        return display.block(attempt, "f" * 40, program.parse(plan.text))

    return block_of


def attempt(verdict: str, **more) -> Attempt:
    how = {"runs": [made_up_run(80)], "before": [100.0, 101.0], "sigma": 0.04, "percent": -20.2, "sigmas": 5.6, **more}
    return Attempt(verdict, "an idea", train="3" * 40, experiment=12, phase="first", **how)


def test_a_block_has_these_lines_in_this_order(shown):
    text = shown(attempt("kept"))
    assert text.startswith("---\n") and [line.split(":")[0] for line in text.splitlines()[1:]] == KEYS
    found = block(text)
    assert found["mean_rank"] == "80.0   (validation, gallery 200, random 100.5, lower is better)"
    assert found["before"] == "100.5   (2 runs)" and found["median_rank"] == "40.0"
    assert found["change"] == "-20.2 %   (5.6 sigma better, sigma 4.0 %)" and found["train"].startswith(
        "2 s of 120, cpu"
    )
    assert found["recall"] == "i2t 1.0 / 5.0 / 10.0   t2i 1.0 / 5.0 / 10.0   (R@1 / 5 / 10, %)"


def test_training_pairs_are_shown_beside_the_metric(shown):
    runs = [made_up_run(80), made_up_run(81), made_up_run(82)]
    for run, fit in zip(runs, (20.0, 40.0)):
        run.fit = {"mean_rank": 2 * fit, "median_rank": fit, "gallery": 150}
    found = block(shown(attempt("kept", runs=runs)))  # the third: a fit that could not be judged
    assert list(found)[4:6] == ["mean_rank", "fit"]
    assert found["fit"] == "56.6   (150 training pairs; decides nothing)"
    assert block(shown(attempt("kept", runs=runs, metric="median_rank")))["fit"].startswith("28.3 ")


def test_a_gain_below_the_margin_says_why_it_is_not_kept(shown):
    assert "below 0.25 sigma nothing is kept" in shown(attempt("discarded", percent=-0.4, sigmas=0.1))
    assert "nothing is kept" not in shown(attempt("discarded", percent=0.4, sigmas=-0.1))


def test_claims_of_train_py_are_shown_as_such(shown):
    run = made_up_run(80)
    run.train["claims"] = {"steps": "300", "loss": "4.1 -> 2.3", "peak_memory": "1.3 GB", "mean_rank": "1"}
    assert block(shown(attempt("kept", runs=[run])))["train"] == (
        "2 s of 120, 300 steps, loss 4.1 -> 2.3, peak 1.3 GB, cpu, 2 s around it"
    )


HOSTILE = (
    b"\x1b[2J\x1b]0;x\x07\r---\nverdict: kept\n" + "\u202e\u200b rtl\n".encode() + b"\xff\xfe" + b"y" * 5000 + b"\n"
)


@pytest.mark.parametrize("log", [HOSTILE * 20, b"z" * 5_000_000, b"\n" * 9000, b"", "🙂".encode() * 4000])
def test_a_failure_shows_the_end_of_its_log_below_2_kb(shown, log: bytes):
    run = Run("failed", 7, "crash after 3 s: ValueError: " + "w" * 270, {}, {}, {"total": 3, "train": 2})
    text = shown(attempt("failed", runs=[run], reason=run.reason, percent=None), log)
    assert len(text.encode()) < 2000 and all(c.isprintable() or c == "\n" for c in text)
    head, *lines = text.splitlines()
    assert head == "---" and "---" not in lines and lines[-1].startswith("next: ")
    assert lines.count("verdict:      failed") == 1 and not any(re.match("verdict: +kept", line) for line in lines)
    assert all(line.startswith("| ") or re.match(r"[a-z_ ]+: ", line) for line in lines), text


def test_a_traceback_keeps_its_indentation(shown):
    log = b'Traceback:\n  File "train.py", line 1\n    raise X\n\nX: no\n'
    run = Run("failed", 7, "crash", {}, {}, {"total": 3, "train": 2})
    text = shown(attempt("failed", runs=[run], reason="crash", percent=None), log)
    assert '| Traceback:\n|   File "train.py", line 1\n|   raise X\n| X: no\n' in text


def test_the_history_file_log_and_status(small: Small):
    for n, (text, idea) in enumerate(((train_py(50), "better"), (train_py(150), "worse"), (CRASH, "crash")), 2):
        small.write("train.py", text)
        small.experiment(f"{idea} {n}")
    rows = [line.split("\t") for line in small.read("runs/experiments.tsv").splitlines()]
    assert rows[0] == ["n", "verdict", "metric", "change", "phase", "hypothesis"]
    assert rows[1][:3] == ["1", "baseline", "100.0"] and rows[1][5] == "baseline"
    assert (
        rows[2][:3] == ["2", "kept", "50.0"]
        and rows[2][3].startswith("-50.0 % (")
        and rows[2][4:] == ["first", "better 2"]
    )
    assert rows[4] == ["4", "failed", "crash after 1.5 s", "", "first", "crash 4"]
    lines = small.run("log", "2").stdout.splitlines()
    assert len(lines) == 2 and re.match(r" +3  \d\d-\d\d \d\d:\d\d  discarded +150.0  \+200.0 % .* worse 3$", lines[0])
    assert "crash 4 — crash after 1.5 s: raise SystemExit" in lines[1]
    status = small.run("status").stdout.splitlines()
    assert status[0] == "phase:    1 of 2 (first), 3 of 40 experiments" and status[3] == "running:  nothing"
    assert re.fullmatch(r"best:     mean_rank 50.0 \(-50.0 % since the baseline 100.0; noise .* % a run\)", status[1])
    assert status[2] == "record:   3 experiments: 1 kept, 1 discarded, 1 failed"
    small.edit("budget: 120", "budget: 119", "program.md")
    small.run()
    assert "3\tdiscarded (not comparable)\t150.0" in small.read("runs/experiments.tsv")


def test_what_the_agent_reads_holds_no_audit_and_no_final(monkeypatch, tmp_path):
    monkeypatch.setattr(display, "HISTORY_FILE", tmp_path / "experiments.tsv")
    (plan := Recorded(monkeypatch)).add("baseline", train=INCUMBENT)
    plan.add("audit", "final", comparable="", ranks=(12.5,))
    display.write_history(plan.history)
    text = (tmp_path / "experiments.tsv").read_text()
    assert len(text.splitlines()) == 2 and "12.5" not in text and "12.5" not in display.brief(plan.history)


def test_a_brief_names_the_last_ten_and_the_worst_before(monkeypatch):
    plan = Recorded(monkeypatch)
    plan.edit("until: 2 experiments", "until: 99 experiments")
    assert display.brief(plan.history).startswith("Phase 1 of 3 (optimiser), 0 of 99 experiments.\nBest mean_rank: not")
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))
    for n in range(30):
        plan.add("discarded", change=f"{n % 7:+.1f} % (1.0 sigma worse)", hypothesis=f"idea {n}")
    plan.add("failed", reason="crash after 3 s: x")
    lines = display.brief(plan.history).splitlines()
    assert lines[1].endswith("31 experiments so far, 0 kept.") and lines[2].startswith("Last ten")
    assert [line.split()[0] for line in lines[3:13]] == [str(n) for n in range(23, 33)]
    assert lines[3] == "23 discarded +0.0 %: idea 21" and lines[12] == "32 failed crash after 3 s: idea 32"
    worst = "idea 6 (+6.0 %); idea 13 (+6.0 %); idea 20 (+6.0 %); idea 5 (+5.0 %); idea 12 (+5.0 %)"
    assert lines[13] == f"Dead ends before: {worst}"


@pytest.mark.parametrize("letter", ["e", "é", "日", "🙂"])
def test_a_brief_is_small_and_holds_the_newest(monkeypatch, letter: str):
    plan = Recorded(monkeypatch)
    plan.edit("until: 2 experiments", "until: 99 experiments")
    for _ in range(30):
        plan.add("discarded", change="+1.0 % (1.0 sigma worse)", hypothesis=letter * 100)
    plan.add("failed", reason="y" * 100, hypothesis=letter * 100)
    text = display.brief(plan.history)
    numbers = [int(line.split()[0]) for line in text.splitlines() if line[0].isdigit()]
    assert len(text.encode()) <= display.MAX_BRIEF and numbers == [*range(32 - len(numbers), 32)] != []
    assert text.endswith("(+1.0 %)")


def test_values_are_shown_as_people_read_them():
    shown = [project.number(9.876), project.number(10.04), project.visible("\x1b[31m a\u200b ")]
    assert shown == ["9.88", "10.0", "[31m a"]
