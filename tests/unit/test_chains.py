"""Chains of experiments, each built on one that lost; and plans that are edited meanwhile."""

from __future__ import annotations

import json
import time

import pytest

from in_process import DISCARDED, INCUMBENT_TEXT, KEPT, LOSER, Point, Small, variant
from repository import CRASH, block


@pytest.fixture
def bold(small: Small) -> Small:
    small.edit("until: 40 experiments", "until: 3 experiments\npatience: 3\nchanges: many", "program.md")
    small.edit("## Phase 2 — second", "## Phase 2 — careful\nuntil: 9 experiments\n\nOne constant.", "program.md")
    return small


def test_a_chain_is_kept_whole(bold: Small):
    head = bold.git("rev-parse", "HEAD")
    bold.write("train.py", variant(LOSER, 1))
    _, first = bold.experiment("worse")
    assert first["verdict"] == "discarded" and "train.py keeps your edit, build on it: 1 of 3" in first["commit"]
    assert bold.read("train.py") == variant(LOSER, 1) and bold.git("rev-parse", "HEAD") == head
    assert "chain 1 of at most 3" in first["phase"]
    bold.hypothesis("worse, unchanged")
    bold.refused("already judged")
    bold.write("train.py", CRASH)
    _, second = bold.experiment("a crash on top")
    assert second["verdict"] == "failed" and second["next"].startswith("your edit failed: mend it where it stands, or")
    assert bold.read("train.py") == CRASH
    bold.write("train.py", variant(KEPT, 3))
    _, third = bold.experiment("what both were for")
    assert third["verdict"] == "kept" and "the whole chain of 3" in third["commit"], third
    assert bold.git("show", "HEAD:train.py") + "\n" == variant(KEPT, 3)
    assert bold.git("rev-parse", "HEAD^") == head and bold.git("status", "--porcelain", "train.py") == ""
    chains = [bold.trailers(f"refs/experiments/{n}")["Chain"].split(" on ") for n in (2, 3, 4)]
    assert [c[0] for c in chains] == ["1 of 3", "2 of 3", "3 of 3"]
    assert [c[1].endswith(", goes on") for c in chains] == [True, True, False]
    assert "(chain, 2 of 3)" in bold.read("runs/experiments.tsv") and "(chain, 2 of 3)" in bold.run("log").stdout


def test_a_chain_that_loses_is_reverted_whole(bold: Small):
    bold.edit("until: 3 experiments", "until: 5 experiments", "program.md")
    for n in (1, 2, 3):
        bold.write("train.py", variant(bold.read("train.py") if n > 1 else LOSER, n))
        _, shown = bold.experiment(f"worse {n}")
    assert "train.py is the incumbent again, the chain has ended)" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT and "chain" not in shown["phase"]
    bold.write("train.py", variant(LOSER, 4))
    assert "1 of 3 in this chain" in bold.experiment("the next begins at one")[1]["commit"]


def test_the_agent_can_drop_a_chain(bold: Small):
    bold.hypothesis("drop the chain")
    bold.refused("no chain is open")
    bold.write("train.py", LOSER)
    _, shown = bold.experiment("worse")
    assert shown["commit"].endswith("; or write 'drop the chain' as the next experiment, then run ./run.sh)")
    bold.write("train.py", variant(LOSER, 2))
    done, shown = bold.experiment("Drop the chain.")
    assert (done.returncode, shown["verdict"], bold.read("train.py")) == (0, "dropped", INCUMBENT_TEXT), done.stderr
    assert "the incumbent again, the chain has ended)" in shown["commit"] and "write the next" in shown["next"]
    assert "1 of 3 experiments" in shown["phase"] and "chain" not in shown["phase"] and "mean_rank" not in shown
    assert bold.git("show", "refs/experiments/3:train.py") + "\n" == variant(LOSER, 2)
    bold.write("train.py", variant(LOSER, 3))
    assert "1 of 3 in this chain" in bold.experiment("the next")[1]["commit"]


def test_a_drop_that_is_killed_is_completed_and_waits_for_no_device(bold: Small):
    bold.edit("data: prints", "data: prints\ncooldown: 60", "program.md")
    bold.write("train.py", LOSER)
    assert "chain" in bold.experiment("worse", given="experiment.time.sleep = lambda seconds: None")[1]["phase"]
    bold.hypothesis("drop the chain")
    bold.run(
        given="def device_for(*how): raise OSError\nexperiment.device_for = device_for",
        point=Point("update-ref", "after"),
    )
    assert bold.read("train.py") == LOSER
    done = bold.run()
    assert "completed experiment 3" in done.stderr and "no chain is open" in done.stderr
    assert bold.read("train.py") == INCUMBENT_TEXT


def test_what_loses_by_far_ends_a_chain(bold: Small):
    bold.write("train.py", LOSER)
    bold.experiment("worse")
    bold.write("train.py", DISCARDED)
    _, shown = bold.experiment("far worse")
    assert "the chain has ended: nothing is built on a control, or on what loses by over 4 sigma" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT and "chain" not in shown["phase"]


def test_a_chain_ends_with_its_phase_and_the_new_one_is_named(bold: Small):
    bold.edit("until: 3 experiments", "until: 1 experiment", "program.md")
    bold.write("train.py", LOSER)
    done, shown = bold.experiment("worse")
    assert "train.py is the incumbent again, the chain has ended with its phase)" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT and shown["phase"] == "2 of 2 (careful), 0 of 9 experiments"
    assert shown["new phase"] == "careful: read its section in program.md"
    assert "Agent, subagent_type planner" in shown["next"] and len(done.stdout.encode()) < 2048


LOOP = {"CLAUDE_CODE_SESSION_ID": "s"}


def loop_on(project: Small, **state) -> None:
    (project.path / "runs/session").mkdir(exist_ok=True)
    project.write("runs/session/s.json", json.dumps({"on": True, "since": time.time(), "after": 1, **state}))


def test_the_last_block_says_that_the_loop_has_ended_and_its_chain_ends_with_it(bold: Small):
    loop_on(bold)
    bold.edit("until: 3 experiments", "until: 5 experiments", "program.md")
    bold.edit("stop: 100 experiments", "stop: 2 experiments", "program.md")
    bold.write("train.py", variant(LOSER, 1))
    _, shown = bold.experiment("worse", env=LOOP)
    assert "build on it: 1 of 3" in shown["commit"] and "write the next hypothesis" in shown["next"]
    bold.write("train.py", variant(LOSER, 2))
    done, shown = bold.experiment("worse still", env=LOOP)
    assert "the incumbent again, the chain has ended with the loop)" in shown["commit"]
    assert bold.read("train.py") == INCUMBENT_TEXT
    why = "the loop has ended: 2 experiments since start, as program.md's `stop` says; sum up in scratchpad.md in a few"
    assert shown["next"].startswith(why) and "next hypothesis" not in done.stdout
    loop_on(bold, on=False, stopped=True)
    bold.write("train.py", variant(LOSER, 3))
    _, shown = bold.experiment("of a person, whose loop is another's")
    assert "build on it: 1 of 3" in shown["commit"] and "write the next hypothesis" in shown["next"]


def test_an_open_chain_is_reverted_when_the_loop_ends_with_what_was_begun_on_top(bold: Small):
    """That is in the record: the loop may have ended before it was measured."""
    before = bold.experiments()
    assert (done := bold.run("end-chain")).returncode == 0 and bold.experiments() == before, done
    bold.write("train.py", variant(LOSER, 1))
    bold.experiment("worse")
    bold.write("train.py", edit := variant(LOSER, 1) + "# begun\n")
    for _ in range(2):
        done = bold.run("end-chain")
        assert (done.returncode, done.stdout) == (0, ""), done
        assert bold.read("train.py") == INCUMBENT_TEXT and bold.experiments() == [1, 2, 3]
    told = bold.trailers("refs/experiments/3")
    assert bold.blob("refs/experiments/3:train.py").decode() == edit and "+# begun" in bold.read("runs/0003.diff")
    assert told["Verdict"] == "dropped" and "Chain" not in told and "chain" not in bold.run("status").stdout
    assert "2 of 2" not in bold.run("status").stdout, "it counts for nothing"
    bold.write("train.py", variant(LOSER, 4))
    assert "1 of 3 in this chain" in bold.experiment("the next begins at one")[1]["commit"]


def test_a_plan_that_is_edited_during_a_run_is_for_the_next_one_and_the_agent_is_told(bold: Small):
    (bold.path / "runs/session").mkdir(exist_ok=True)
    bold.write("runs/session/program.md", bold.read("program.md"))  # as the client's start does
    bold.write("train.py", variant(LOSER, 1))
    bold.hypothesis("worse")
    shown = block(
        bold.run(point=Point("measure", "meanwhile", "sed -i 's/patience: 3/patience: 2/' program.md")).stdout
    )
    assert shown["plan"] == "program.md has changed since you last read it: read it"
    assert "build on it: 1 of 3" in shown["commit"]  # what was decided by the plan of then
    assert "patience: 3" in bold.git("show", "refs/experiments/2:experiment/program.md")
    bold.write("train.py", variant(LOSER, 2))
    done, shown = bold.experiment("worse still")
    assert "plan" not in shown and "the chain has ended" in done.stdout
    assert "patience: 2" in bold.git("show", "refs/experiments/3:experiment/program.md")


def test_a_plan_with_a_mistake_made_during_the_run(bold: Small):
    bold.write("train.py", variant(LOSER, 1))
    bold.hypothesis("worse")
    done = bold.run(point=Point("measure", "meanwhile", "sed -i 's/until: 9 experiments/until: never/' program.md"))
    assert (done.returncode, block(done.stdout)["verdict"]) == (0, "discarded")
    bold.write("train.py", variant(LOSER, 2))
    bold.hypothesis("worse still")
    bold.refused("program.md line 15: until: never")
