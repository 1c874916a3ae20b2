"""What people and the agent are shown: below its size, and nothing that a terminal or a reader could take wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import display
import program
import project
import session
from in_process import DISCARDED, INCUMBENT_TEXT, KEPT, Small, made_up_run, train_py
from measure import Run
from record import Attempt, Record
from recorded import INCUMBENT, Recorded
from repository import CRASH, PROGRAM, block
from session import Session

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
    assert found["before"] == "100.5 ± 2.8   (2 runs)" and found["median_rank"] == "40.0"
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
    assert found["fit"] == "56.6   (in that gallery; 150 training pairs)"
    assert block(shown(attempt("kept", runs=runs, metric="median_rank")))["fit"].startswith("28.3 ")


def test_a_gain_below_the_margin_says_why_it_is_not_kept(shown):
    assert "below 0.25 sigma nothing is kept" in shown(attempt("discarded", percent=-0.4, sigmas=0.1))
    assert "nothing is kept" not in shown(attempt("discarded", percent=0.4, sigmas=-0.1))


def test_claims_of_train_py_are_shown_as_such(shown):
    run = made_up_run(80)
    run.train["claims"] = {"steps": "300", "loss": "4.1 -> 2.3", "peak_memory": "1.3 GB", "mean_rank": "1"}
    run.train["step_ms"] = 6.2
    assert block(shown(attempt("kept", runs=[run])))["train"] == (
        "2 s of 120, 6 ms a step, 300 steps, peak 1.3 GB, cpu, 2 s around it"
    )


def printing(value: float, *lines: str) -> str:
    return train_py(value, "".join(f"# prints {line}\n" for line in lines))


def test_a_block_shows_both_losses_and_what_was_changed(small: Small):
    """Of the candidate's last run, and within a chain what this link changed."""
    small.edit("until: 40 experiments", "until: 40 experiments\npatience: 3", "program.md")
    falls = [f"step {n * 5}/100 loss {5 - n / 10:.3f}" for n in range(1, 21)]
    small.write("train.py", printing(97, *falls))
    _, found = small.experiment("two runs")
    assert found["verdict"] == "kept" and found["mean_rank"].endswith("lower is better, mean of 2 runs: 97.0, 97.1)")
    assert "incumbent's" not in found
    assert found["loss"] == "4.80  4.60  4.20  3.80  3.40  3.00   (at 10 20 40 60 80 100 % of steps)"
    assert found["changed"] == "22 lines (3 shown)"
    stuck = printing(99, "step 150/1500 loss 9e-05", "step 600/1500 loss nan", *["step 3/0 loss 1"] * 9)
    small.write("train.py", stuck)
    done, found = small.experiment("another")
    assert found["loss"] == "9.00e-05 -     nan   -     -     -      (at 10 20 40 60 80 100 % of steps)"
    assert found["incumbent's"] == "4.80  4.60  4.20  3.80  3.40  3.00"
    small.write("train.py", stuck + "b = 2  # a comment\n\x1b]0;" + "é" * 99)
    done, found = small.experiment("a third")
    assert f"changed:      2 lines\n| + b = 2\n| + ]0;{'é' * 20}\nmean_rank" in done.stdout
    assert found["incumbent's"].startswith("4.80") and "build on it: 2 of 3 in this chain" in found["commit"]


def test_an_ordinary_block_is_small(shown, monkeypatch):
    """However much train.py printed and however much was changed in it."""
    log = b"".join(b"step %d/20 loss 4.567\n" % n for n in range(1, 21))
    monkeypatch.setattr(display.git, "contents", lambda names: {"refs/experiments/1:experiment/train.log": log})
    monkeypatch.setattr(
        display.git, "diff", lambda *blobs: "\n@@ -1\n" + "".join(f"-{'x' * 200}\n+{n}{'y' * 200}\n" for n in range(99))
    )
    claims = {"steps": "300", "peak_memory": "12.34 GB"}
    runs = [made_up_run(8123.4), made_up_run(8123.5)]
    runs[1].train |= {"claims": claims, "device": "NVIDIA H100 80GB HBM3", "step_ms": 1234.5}
    for run in runs:
        run.fit = {"mean_rank": 7654.3, "median_rank": 5432.1, "gallery": 20000}
    text = shown(attempt("discarded", runs=runs), log).replace("an idea", "w" * 100)
    assert "incumbent's" in text and "changed:      198 lines (3 shown)\n| - xxx" in text
    assert len(text.replace(display.ASK, "").encode()) <= 1228, len(text)


@pytest.mark.parametrize(
    ("diff", "shown"),
    [
        (["-x = f(" + "a" * 60 + ", 1)", "+x = f(" + "a" * 60 + ", 20)"], ["- …aaaaaaaa, 1)", "+ …aaaaaaaa, 20)"]),
        (["-" + "a" * 80, "+" + "a" * 80 + "b" * 80], ["- …" + "a" * 10, "+ …" + "a" * 10 + "b" * 31]),
        (["-" + "日" * 40 + "本", "+" + "日" * 40 + "人"], ["- …" + "日" * 10 + "本", "+ …" + "日" * 10 + "人"]),
        (["-    x = 1  # one", "+    x = 1  # two"], ["-     x = 1  # one", "+     x = 1  # two"]),
        (["-    x = 1", "+        x = 1"], ["-     x = 1", "+         x = 1"]),
        (["-    x = 1  # one", "+    x = 2  # one"], ["- x = 1", "+ x = 2"]),
        (["+    # why", "+    y = 1  # how"], ["+ # why", "+ y = 1"]),
        (["-\tx = 1\t\t# one"], ["- x = 1       # one"]),
        (["-a_long_name = another_long_name(of_a_thing, and_more)"], ["- a_long_name = another_long_name(of_a_thing,"]),
    ],
)
def test_an_old_line_and_a_new_one_do_not_look_alike(diff: list[str], shown: list[str]):
    assert display.told_apart(diff) == [f"| {line}" for line in shown]
    assert all(len(line.encode()) <= display.CHANGED_WIDTH for line in display.told_apart(diff))


def test_a_training_that_was_cut_short_is_said(small: Small):
    """In the block, the log and the record: its metric is not what a whole training gives."""
    small.write("train.py", printing(90, "step 57/60 loss 3.1"))
    assert "note" not in small.experiment("nearly whole")[1]
    small.write("train.py", printing(88, "step 28/60 loss 3.6", "step 42/60 loss 3.6"))
    done, found = small.experiment("two runs, and a slow machine")
    note = "cut short at 42 of 60 steps and 42 of 60 steps: not what a whole training gives, and may run again"
    assert found["note"] == note and "reason" not in found and "\n| step" not in done.stdout
    assert "3\tkept, cut short\t" in small.read("runs/experiments.tsv")
    assert note in small.run("log", "1").stdout and small.trailers("refs/experiments/3")["Reason"] == note
    for again in ("4", "5"):
        small.write("train.py", printing(150, "step 28/60 loss 3.6", "step 42/60 loss 3.6"))
        assert small.experiment("a slow machine")[1]["experiment"] == again
    crash = "step 42/60 loss 3.6"
    small.write("train.py", f"# prints {crash}\n{CRASH}")
    found = small.experiment("a crash has a reason of its own")[1]
    assert found["reason"].startswith("crash after") and "note" not in found


def test_a_training_that_was_tried_before_is_named(small: Small):
    """Where it is not refused: what a control measured, or the baseline."""
    small.write("train.py", KEPT)
    assert "tried before" not in small.experiment("control: without the expert")[1]
    small.write("train.py", KEPT)
    found = small.experiment("without the expert")[1]
    assert found["tried before"] == "experiment 2, control, mean_rank 50.0 (control: without the expert)"
    small.write("train.py", INCUMBENT_TEXT)
    assert small.experiment("back")[1]["tried before"] == "experiment 1, baseline, mean_rank 100.0 (baseline)"
    small.write("train.py", INCUMBENT_TEXT + "# another\n")
    assert "tried before" not in small.experiment("another")[1]


def test_the_commit_of_a_kept_one_is_the_branchs(small: Small):
    """That of any other is in the record alone, and git shows both."""
    for text, named in ((KEPT, "HEAD"), (DISCARDED, "refs/experiments/3")):
        small.write("train.py", text)
        shown = small.experiment("an idea for " + named)[1]["commit"].split(" ")[0]
        assert small.git("rev-parse", named).startswith(shown) and len(shown) == 9
        assert small.git("show", "-s", "--format=%s", shown).endswith(("(100.0 → 50.0)", named))


@pytest.mark.parametrize(("verdict", "before"), [("failed", 4), ("failed", 0), ("discarded", 4)])
def test_the_next_step_is_one_order(shown, monkeypatch, verdict: str, before: int):
    """Where the planner is due it comes first, also after a crash: after the repair it would not be due any more."""
    plan = Recorded(monkeypatch, PROGRAM)
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 101.0))
    plan.add(*["discarded"] * before, verdict)
    run = Run("failed", 7, "crash", {}, {}, {"total": 3, "train": 2})
    told = display.next_step(attempt(verdict, runs=[run], reason="crash", percent=None), plan.history, "")
    assert (display.ASK in told) == (before == 4) and told.count("run ./run.sh") == 1
    assert ("runs/0012.diff" in told) == (verdict == "failed" and not before)


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("A heron at dusk, above the reeds", 9, "A heron"),
        ("A heron at dusk, above the reeds", 10, "A heron at"),
        ("A heron at dusk, above the reeds", 11, "A heron at"),
        ("A heron at dusk, above the reeds", 31, "A heron at dusk, above the"),
        ("A heron at dusk, above the reeds", 32, "A heron at dusk, above the reeds"),
        ("A " + "x" * 40, 20, "A " + "x" * 18),
        ("葦の上の鷺、夕暮れ", 10, "葦の上"),
        ("é" * 40, 9, "éééé"),
        ("", 9, ""),
    ],
)
def test_what_is_cut_ends_with_a_word(text: str, most: int, shown: str):
    """Where it has words, and they are not too long."""
    assert display.cut(text, most) == shown


def test_the_losses_are_those_of_the_last_run():
    assert display.losses(b"step 1/2 loss 1\nstep 2/2 loss 2\nstep 1/2 loss 3\n") == [(1, 50, 3)]


@pytest.mark.parametrize("line", ["step 1/2 loss 1", "step 1/2 loss 1e-3 lr 4", "step 1/2 loss -0.5"])
def test_lines_with_a_loss(line: str):
    assert [step for step, *_ in display.losses(f"x\n{line}\nstep 2/2 loss inf\n".encode())] == [1, 2]


@pytest.mark.parametrize(
    "line", ["step 1/0 loss 1", "step 0/2 loss 1", "step 1/2 loss x", "step 1/2", f"step {'9' * 10}/1 loss 1"]
)
def test_lines_without_one(line: str):
    assert display.losses(f"{line}\n".encode()) == []


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
    best = r"best:     mean_rank 50.0 ± 1.6 \(-50.0 % since the baseline 100.0; noise .* % a run\)"
    assert re.fullmatch(best, status[1])
    assert status[2] == "record:   3 experiments: 1 kept, 1 discarded, 1 failed, 0 control"
    small.edit("budget: 120", "budget: 119", "program.md")
    small.run()
    assert "3\tdiscarded (not comparable)\t150.0" in small.read("runs/experiments.tsv")


def test_what_the_loop_took_so_far(monkeypatch, tmp_path):
    """Shares of the wall clock by the record, tokens and cost by what the client told; neither where nothing tells."""
    monkeypatch.setattr(session, "SESSIONS", tmp_path)
    plan = Recorded(monkeypatch)
    assert display.spent(plan.history) == [("time", ""), ("used", "")]
    found = []
    monkeypatch.setattr(display, "results", lambda records: found[: len(records)])
    timing = {"timing": {"total": 100, "train": 90}}
    for when, runs in ((0, [timing]), (150, [timing]), (9000, [timing, timing]), (9400, []), (9500, [{"timing": {}}])):
        plan.records.append(replace(Record("kept", comparable="x", branch="main"), number=len(found) + 1, when=when))
        found.append({"runs": runs})
    plan.records.append(replace(plan.records[0], branch="other"))
    plan.records.append(replace(plan.records[0], number=9, when=9600, comparable=""))  # an audit
    found += [{"runs": [timing]}]
    # 400 s of runs, 50 s between the first two; then a pause, which is nobody's
    assert display.spent(plan.history)[0] == ("time", "0.1 h: training 80 %, harness 9 %, model 11 %")
    found[1]["waited"] = 30  # for a device, or since the plan has a cooldown
    assert display.spent(plan.history)[0] == ("time", "0.1 h: training 80 %, harness 9 %, waiting 7 %, model 4 %")
    del found[1]["waited"]
    session.Counter.update(tmp_path / "a.tokens", 1_200_000)
    session.Counter.update(tmp_path / "b.tokens", 34_567)
    assert display.spent(plan.history)[1] == ("used", "1,234,567 tokens")
    Session(id="a").note_cost(1.5)
    assert display.spent(plan.history)[1] == ("used", "1,234,567 tokens, 1.50 USD")


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
    assert lines[1].endswith("31 experiments so far, 0 kept.") and lines[2].startswith("The last (")
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


def test_a_brief_tells_of_the_training_data_if_it_can(monkeypatch, tmp_path):
    """It is somebody's text: a line each, printable, cut. A data set of an older version has none."""
    plan = Recorded(monkeypatch)
    plan.edit("until: 2 experiments", "until: 99 experiments")
    monkeypatch.setattr(display.git, "main_worktree", lambda: tmp_path)
    (tmp_path / "data/prints").mkdir(parents=True)
    info, without = tmp_path / "data/prints/info.json", display.brief(plan.history)
    for text in ("", "{}", '{"training": 3}', '{"training": []}', "\xff"):
        info.write_text(text)
        assert display.brief(plan.history) == without
    told = ["9 training pairs, 96 x 96 px", "A heron\n\x1b[2J# New instructions" + "é" * 300, "more", {"a": 1}]
    info.write_text(json.dumps({"training": told}))
    shown = [f"Data: {told[0]}, such as", "| A heron[2J# New instructions" + "é" * 65]
    assert display.brief(plan.history).splitlines()[2:] == shown
    plan.add(*["discarded"] * 30, change="+1.0 % (1.0 sigma worse)", hypothesis="y" * 100)
    lines = display.brief(plan.history).splitlines()
    assert lines[2:5] == [*shown, "The last (runs/experiments.tsv has all):"] and lines[-1].startswith("Dead ends")
    assert len("\n".join(lines).encode()) <= display.MAX_BRIEF and lines[-2].startswith("30 discarded")


def test_values_are_shown_as_people_read_them():
    shown = [project.number(9.876), project.number(10.04), project.visible("\x1b[31m a\u200b ")]
    assert shown == ["9.88", "10.0", "[31m a"]
