"""The reader of program.md: what it takes, and the line-numbered errors."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / ".claude" / "hooks"))
import program

PLAN = """# A plan

## Settings
data: prints
metric: median_rank
- budget: 300 s
memory: 12 GB
confirm_below: 1.5
stop: 40 experiments, 9.5 hours, 07:30, 20M tokens, 15.5 USD
cooldown: 5
devices: 2
launch: srun --gres=gpu:1 -p night

Note: prose may use colons after an empty line.

## Phase 1 — get the baseline right
until: 12 experiments, 6 discards

Ideas: learning rate.

## Something else
until: this is prose

## Phase 2 - moonshots
web: arxiv.org, github.com
changes: many
patience: 3
We try big things: all of them.
"""


def test_a_whole_plan():
    plan = program.parse(PLAN)
    assert (plan.data, plan.metric, plan.budget, plan.memory, plan.cooldown) == ("prints", "median_rank", 300, "12g", 5)
    assert plan.confirm_below == 1.5 and plan.stop == {
        "experiments": 40,
        "hours": 9.5,
        "clock": "07:30",
        "tokens": 20_000_000,
        "usd": 15.5,
    }
    assert (plan.devices, plan.launch) == (2, ["srun", "--gres=gpu:1", "-p", "night"])
    first, second = plan.phases
    assert (first.number, first.name, first.until) == (1, "get the baseline right", {"experiments": 12, "discards": 6})
    assert (second.name, second.web, second.changes, second.patience) == (
        "moonshots",
        ["arxiv.org", "github.com"],
        "many",
        3,
    )
    assert second.until == {}
    assert first.text == "until: 12 experiments, 6 discards\n\nIdeas: learning rate."
    assert second.text.startswith("web: arxiv") and second.text.endswith("all of them.")


def test_the_shipped_plan_reads_and_has_five_phases():
    plan = program.read(ROOT / "program.md")
    assert len(plan.phases) == 5 and plan.data == "prints" and plan.budget == 120
    assert all(p.until for p in plan.phases[:-1])


def test_fenced_code_is_prose():
    plan = program.parse(PLAN.replace("We try", "\n```\n## Phase 9 — shown as an example\nuntil: never\n```\nWe try"))
    assert len(plan.phases) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data: prints", "datum: prints", "line 4: unknown key 'datum'"),
        ("data: prints", "data: ../etc", "line 4: data: ../etc: want the name of a folder"),
        ("data: prints", "data:", "line 4: data: (empty)"),
        ("metric: median_rank", "metric: recall", "line 5: metric: recall: want mean_rank or median_rank"),
        ("300 s", "0", "line 6: budget: 0: want a whole number from 1"),
        ("300 s", "5 minutes", "line 6: budget: 5 minutes"),
        ("12 GB", "12 apples", "line 7: memory: 12 apples: want a size"),
        ("12 GB", "0 GB", "line 7: memory: 0 GB: want a size of at least 500 MB"),
        ("12 GB", "12 MB", "line 7: memory: 12 MB: want a size of at least 500 MB"),
        ("1.5\n", "-1\n", "line 8: confirm_below: -1: want a number"),
        ("40 experiments, 9.5 hours", "soon", "line 9: stop: soon"),
        ("07:30", "25:00", "line 9: stop"),
        ("07:30", "07:30, 08:30", "line 9: stop"),
        ("devices: 2", "devices: 0", "line 11: devices: 0: want how many"),
        ("srun --gres", "srun; rm", "line 12: launch"),
        ("40 experiments, 9.5 hours, 07:30", "4 hours, 5 hours", "line 9: stop"),
        ("12 experiments, 6 discards", "12 hours", "line 17: until: 12 hours: want '12 experiments', '6 discards'"),
        ("12 experiments, 6 discards", "1.5 experiments", "line 17: until: 1.5 experiments"),
        ("cooldown: 5", "cooldown: 5\ndata: prints", "line 11: a second 'data'"),
        ("## Phase 2 - moonshots", "## Phase two", "line 24: want '## Phase N — name'"),
        ("## Phase 2 - moonshots", "## Phase 2 — get the baseline right", "line 24: a second phase named"),
        ("arxiv.org, github.com", "https://arxiv.org", "line 25: web: https://arxiv.org: want domain names"),
        ("arxiv.org, github.com", "127.0.0.1", "line 25: web"),
        ("changes: many", "changes: some", "line 26: changes: some: want one or many"),
        ("## Settings", "## Setting", "no '## Settings' section"),
        ("## Something else", "## Settings", "line 21: a second '## Settings'"),
    ],
)
def test_errors_name_the_line_and_what_is_wanted(old: str, new: str, message: str):
    assert PLAN.count(old) == 1
    with pytest.raises(program.ProgramError, match="^program.md") as error:
        program.parse(PLAN.replace(old, new))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_plan_without_phases():
    with pytest.raises(program.ProgramError, match="no '## Phase 1"):
        program.parse("## Settings\ndata: prints\n")
