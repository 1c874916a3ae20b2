"""The plan while it is carried out: phases that end, a plan that is edited under way, chains of experiments."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Project, block
from sweep import CANDIDATES, CRASH, QUICK

sys.path.insert(0, str(ROOT / ".claude" / "hooks"))
import record

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


class Plan:
    """A repository with made-up records, and the phase that follows from them."""

    def __init__(self, path: Path, monkeypatch):
        self.project, self.n, self.text, self.trailers = Project(path), 0, PLAN, {}
        path.mkdir()
        monkeypatch.setattr(record, "ROOT", path)
        monkeypatch.setattr(record, "PLAN", path / "program.md")
        self.project.git("init", "-q", "-b", "main")
        self.edit("", "")
        self.project.write("train.py", "")
        self.project.git("add", ".")
        self.project.git("commit", "-qm", "start")

    def edit(self, old: str, new: str) -> None:
        assert old in self.text
        self.text = self.text.replace(old, new)
        self.project.write("program.md", self.text)

    def add(self, *verdicts: str) -> None:
        """Experiments in the current phase, recorded with the plan as it is now, as run.sh does."""
        for verdict in verdicts:
            self.n += 1
            blob = self.project.git("hash-object", "-w", "program.md")
            inner = subprocess.run(["git", "mktree"], input=f"100644 blob {blob}\tprogram.md\n", cwd=self.project.path,
                                   capture_output=True, text=True).stdout.strip()  # fmt: skip
            tree = subprocess.run(["git", "mktree"], input=f"040000 tree {inner}\texperiment\n", cwd=self.project.path,
                                  capture_output=True, text=True).stdout.strip()  # fmt: skip
            trailers = {"Experiment": self.n, "Verdict": verdict, "Phase": self.phase, "Comparable": "x",
                        "Mean-Rank-Runs": "10", "Train": f"{self.n:040d}", "Branch": "main"}  # fmt: skip
            trailers |= self.trailers
            text = "an idea\n\n" + "".join(f"{k}: {v}\n" for k, v in trailers.items())
            commit = self.project.git("commit-tree", tree, "-p", "HEAD", "-m", text)
            self.project.git("update-ref", f"refs/experiments/{self.n}", commit)

    @property
    def phase(self) -> str:
        found = record.State().phase
        return found.name if found else ""

    @property
    def line(self) -> str:
        return record.State().phase_line()


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    return Plan(tmp_path / "plan", monkeypatch)


def test_phases_end_by_their_until(plan: Plan):
    assert plan.line == "1 of 3 (optimiser), 0 of 2 experiments"
    plan.add("discarded", "failed")
    assert plan.phase == "expert views"
    plan.add("discarded", "kept", "discarded")
    assert plan.phase == "architecture"
    plan.add("discarded")
    assert plan.line == "3 of 3 (architecture), 1 experiments"
    plan.edit("## Phase 3 — architecture\n", "## Phase 3 — architecture\nuntil: 1 experiment\n")
    assert plan.phase == "" and plan.line == "all phases of program.md are done"


def test_another_budget_is_another_comparison_but_the_same_work(plan: Plan):
    plan.add("discarded", "failed")
    plan.trailers = {"Comparable": "y"}
    plan.add("baseline", "discarded")
    state = record.State()
    assert ([r.n for r in state.here], [r.n for r in state.tried]) == ([4], [1, 2, 4])


def test_going_back_and_skipping(plan: Plan):
    plan.add(*["discarded"] * 4)
    assert plan.phase == "architecture"  # two discards in a row ended the second
    plan.edit("until: 2 experiments", "until: 5 experiments")
    assert plan.line == "1 of 3 (optimiser), 2 of 5 experiments"
    plan.edit("until: 5 experiments", "until: 0 experiments")
    assert plan.phase == "architecture"


def test_inserting_moving_and_adding_ideas(plan: Plan):
    plan.add("discarded", "discarded", "kept")
    plan.edit("## Phase 2 — expert views", "## Phase 2 — data order\nuntil: 1 experiment\n\n## Phase 3 — expert views")
    assert plan.phase == "data order"
    plan.add("discarded")
    plan.edit("mixup of both views.", "mixup of both views.\n- A cold start, then a warm-up.")
    assert plan.line == "3 of 4 (expert views), 1 of 3 experiments"


@pytest.mark.parametrize("ideas", ["", "\n- A cold start."])
def test_a_renamed_phase_goes_on_where_it_was(plan: Plan, ideas: str):
    plan.add("discarded", "discarded", "kept")
    plan.edit("— optimiser", "— optimisation")
    plan.edit("— expert views", "— the expert mechanism")
    plan.edit("both views.", "both views." + ideas)
    assert plan.line == "2 of 3 (the expert mechanism), 1 of 3 experiments"
    plan.add("kept")
    plan.edit("— the expert mechanism", "— experts")
    assert plan.line == "2 of 3 (experts), 2 of 3 experiments"


def test_another_phase_in_its_place_begins_at_nothing(plan: Plan):
    plan.add("discarded", "discarded")
    plan.edit("— optimiser\nuntil: 2 experiments\n\nLearning rate, warm-up, weight decay.",
              "— data\nuntil: 2 experiments\n\nTry crops.")  # fmt: skip
    assert plan.line == "1 of 3 (data), 0 of 2 experiments"


def test_a_phase_that_is_taken_out_leaves_the_others_alone(plan: Plan):
    plan.add("discarded", "discarded", "kept")
    plan.edit(plan.text[plan.text.index("## Phase 2") : plan.text.index("## Phase 3")], "")
    assert plan.line == "2 of 2 (architecture), 0 experiments"


def test_the_planner_is_due_at_the_start_of_a_phase_and_after_five_discards(plan: Plan):
    plan.edit("until: 2 experiments", "until: 30 experiments")
    due = []
    for verdict in ["discarded"] * 6 + ["kept"] + ["discarded"] * 5:
        due.append(record.State().planner_is_due())
        plan.add(verdict)
    assert [i for i, x in enumerate([*due, record.State().planner_is_due()]) if x] == [0, 5, 12]


# The same through ./run.sh, with a train.py that takes no time

PHASES = """# Program

## Settings
data: prints
memory: 3 GB

## Phase 1 — bold
until: 3 experiments
patience: 3
changes: many

## Phase 2 — careful
until: 9 experiments

Change one constant at a time.
"""


@pytest.fixture
def bold(fast: Project) -> Project:
    fast.write("program.md", PHASES)
    return fast


def variant(text: str, n: int) -> str:
    return f"{text}# {n}\n"


def test_a_chain_is_kept_whole(bold: Project):
    head = bold.git("rev-parse", "HEAD")
    bold.write("train.py", variant(CANDIDATES["discarded"], 1))
    _, first = bold.experiment("worse")
    assert first["verdict"] == "discarded" and "train.py keeps your edit, build on it: 1 of 3" in first["commit"]
    assert bold.read("train.py") == variant(CANDIDATES["discarded"], 1) and bold.git("rev-parse", "HEAD") == head
    assert "chain 1 of at most 3" in first["phase"]

    done, shown = bold.experiment("worse, unchanged")
    assert done.returncode == 2 and "already judged" in done.stderr
    bold.write("train.py", CRASH)
    _, second = bold.experiment("a crash on top")
    assert second["verdict"] == "failed" and second["next"].startswith("mend it where it stands")
    assert bold.read("train.py") == CRASH

    bold.write("train.py", variant(CANDIDATES["kept"], 3))
    _, third = bold.experiment("what both were for")
    assert third["verdict"] == "kept" and "the whole chain of 3" in third["commit"], third
    assert bold.git("show", "HEAD:train.py") + "\n" == variant(CANDIDATES["kept"], 3)
    assert bold.git("rev-parse", "HEAD^") == head and bold.git("status", "--porcelain", "train.py") == ""
    chains = [bold.trailers(f"refs/experiments/{n}")["Chain"].split(" on ") for n in bold.experiments()[-3:]]
    assert [c[0] for c in chains] == ["1 of 3", "2 of 3", "3 of 3"]
    assert [c[1].endswith(", goes on") for c in chains] == [True, True, False]
    assert "(chain, 2 of 3)" in bold.read("runs/experiments.tsv") and "(chain, 2 of 3)" in bold.run("log").stdout


def test_a_chain_that_loses_is_reverted_whole(bold: Project):
    bold.edit("until: 3 experiments", "until: 5 experiments", "program.md")
    for n in (1, 2, 3):
        bold.write("train.py", variant(bold.read("train.py") if n > 1 else CANDIDATES["discarded"], n))
        _, shown = bold.experiment(f"worse {n}")
    assert "train.py is the incumbent again, the chain has ended)" in shown["commit"]
    assert bold.read("train.py") == QUICK and "chain" not in shown["phase"]
    bold.write("train.py", variant(CANDIDATES["discarded"], 4))
    _, shown = bold.experiment("the next begins at one")
    assert "1 of 3 in this chain" in shown["commit"]


def test_a_chain_ends_with_its_phase_and_the_new_one_is_told(bold: Project):
    bold.edit("until: 3 experiments", "until: 1 experiment", "program.md")
    bold.write("train.py", CANDIDATES["discarded"])
    done, shown = bold.experiment("worse")
    assert "train.py is the incumbent again, the chain has ended with its phase)" in shown["commit"]
    assert bold.read("train.py") == QUICK and shown["phase"] == "2 of 2 (careful), 0 of 9 experiments"
    told = done.stdout.split("new phase:")[1]
    assert told.split()[0] == "careful" and "  Change one constant at a time.\n" in told
    assert "Agent, subagent_type planner" in shown["next"] and len(done.stdout.encode()) < 2048


def test_an_interrupted_chain_is_carried_out_by_the_next_run(bold: Project):
    """What finish() does is done again from the record: the file stays."""
    bold.write("train.py", CANDIDATES["discarded"])
    bold.experiment("worse")
    (bold.path / "runs/experiments.tsv").unlink()
    done, _ = bold.experiment("the same file")
    assert "completed experiment" in done.stderr and bold.read("train.py") == CANDIDATES["discarded"]


def test_an_edited_plan_is_told_with_the_next_result_also_when_edited_during_the_run(bold: Project):
    record_of = bold.experiments()[-1] + 1
    (bold.path / "runs/session").mkdir(exist_ok=True)
    bold.write("runs/session/program.md", PHASES)  # as the client's start does
    bold.write("train.py", variant(CANDIDATES["discarded"], 1))
    bold.hypothesis("worse")
    run = subprocess.Popen(["./run.sh"], cwd=bold.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (bold.path / "runs/running.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bold.edit("patience: 3", "patience: 2", "program.md")
    bold.edit("one constant at a time.", "one constant at a time. Not the\x1b[31m batch.", "program.md")
    out = run.communicate()[0]
    assert "plan:         program.md has changed:\n  -patience: 3\n  +patience: 2\n" in out, out
    assert "  +Change one constant at a time. Not the[31m batch.\n" in out
    assert "build on it: 1 of 3" in block(out)["commit"]  # what was decided by the plan of then
    assert "patience: 3" in bold.git("show", f"refs/experiments/{record_of}:experiment/program.md")
    bold.write("train.py", variant(CANDIDATES["discarded"], 2))
    done, _ = bold.experiment("worse still")
    assert "plan:" not in done.stdout and "the chain has ended" in done.stdout

    bold.write("program.md", bold.read("program.md") + "".join(f"- Idea {i}: {'x' * 90}\n" for i in range(40)))
    bold.write("train.py", variant(CANDIDATES["discarded"], 3))
    done, shown = bold.experiment("a long list")
    assert "[...] Read program.md for the rest" in done.stdout and len(done.stdout.encode()) < 2048 and shown["next"]


def test_a_plan_with_a_mistake_made_during_the_run(bold: Project):
    bold.write("train.py", variant(CANDIDATES["discarded"], 1))
    bold.hypothesis("worse")
    run = subprocess.Popen(["./run.sh"], cwd=bold.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (bold.path / "runs/running.json").exists() and run.poll() is None:
        time.sleep(0.05)
    bold.edit("until: 9 experiments", "until: never", "program.md")
    out = run.communicate()[0]
    assert run.returncode == 0 and block(out)["verdict"] == "discarded"
    bold.write("train.py", variant(CANDIDATES["discarded"], 2))
    done, _ = bold.experiment("worse still")
    assert done.returncode == 2 and "program.md line 13: until: never" in done.stderr


def test_requests_to_the_web_are_in_the_record(bold: Project):
    (bold.path / "runs/web").mkdir(parents=True)
    lines = ["2026-11-23T01:02:03\tWebFetch\t24\thttps://arxiv.org/abs/1?x", "2026-11-23T01:03:04\tWebSearch\t4\tclip"]
    for i, line in enumerate(lines):
        bold.write(f"runs/web/{i}.toolu_{i}", line + "\n")
    bold.write("train.py", CANDIDATES["discarded"])
    bold.experiment("read about it")
    ref = f"refs/experiments/{bold.experiments()[-1]}"
    assert bold.trailers(ref)["Web"] == "2 requests, 28 characters"
    assert bold.git("show", f"{ref}:experiment/web.log").splitlines() == lines
    assert not list((bold.path / "runs/web").iterdir())
