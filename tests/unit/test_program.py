"""The reader of program.md: what it takes, and the line-numbered errors."""

from __future__ import annotations

import pytest

import program
from program import Limits
from repository import PROGRAM, ROOT

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
    stop = Limits(experiments=40, hours=9.5, clock="07:30", tokens=20_000_000, usd=15.5)
    assert plan.confirm_below == 1.5 and plan.stop == stop and plan.text == PLAN
    assert (plan.devices, plan.launch) == (2, ["srun", "--gres=gpu:1", "-p", "night"])
    first, second = plan.phases
    assert (first.number, first.name) == (1, "get the baseline right")
    assert first.until == Limits(experiments=12, discards=6)
    assert (second.name, second.web) == ("moonshots", ["arxiv.org", "github.com"])
    assert (second.changes, second.patience, second.until) == ("many", 3, Limits())


def test_the_shipped_plan_reads_and_has_five_phases():
    plan = program.read(ROOT / "program.md")
    assert len(plan.phases) == 5 and plan.data == "prints" and plan.budget == 120
    assert all(p.until != Limits() for p in plan.phases[:-1])


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
        ("## Phase 2 - moonshots", "## **Phase 2 - moonshots**", "line 24: want '## Phase N — name'"),
        ("data: prints", "max-budget: 60", "line 4: unknown key 'max-budget'"),
        ("data: prints", "_data_: prints", "line 4: unknown key '_data_'"),
        ("## Settings", "## Setting", "no '## Settings' section"),
        ("## Settings", "### Settings", "no '## Settings' section"),
        ("## Something else", "## Settings", "line 21: a second '## Settings'"),
    ],
)
def test_errors_name_the_line_and_what_is_wanted(old: str, new: str, message: str):
    assert PLAN.count(old) == 1
    with pytest.raises(program.ProgramError, match="^program.md") as error:
        program.parse(PLAN.replace(old, new))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("- budget", "  budget", 6, "budget"),
        ("- budget", "\tbudget", 6, "budget"),
        ("- budget", " - budget", 6, "budget"),
        ("- budget", "1. budget", 6, "budget"),
        ("- budget", "> budget", 6, "budget"),
        ("- budget", "**budget**", 6, "budget"),
        ("- budget: 300 s", "**budget: 300 s**", 6, "budget"),
        ("- budget", " _budget_", 6, "budget"),
        ("- budget", "`budget`", 6, "budget"),
        ("- budget: 300 s", "- `budget: 300 s`", 6, "budget"),
        ("- budget:", "budget =", 6, "budget"),
        ("- budget:", "budget：", 6, "budget"),
        ("- budget", "\xa0budget", 6, "budget"),
        ("- budget", " - Budget", 6, "budget"),
        ("cooldown: 5", "final budget: 300", 10, "final_budget"),
        ("cooldown: 5", "\n- Final-Budget: 300", 11, "final_budget"),
        ("cooldown: 5", "\nfinal-budget: 300", 11, "final_budget"),
        ("cooldown: 5", "\ncooldown: 5", 11, "cooldown"),
        ("cooldown: 5", "# cooldown: 5", 11, "devices"),
        ("cooldown: 5", "<!-- cooldown: 5 -->", 11, "devices"),
        ("data: prints", "These hold for all phases.\ndata: prints", 5, "data"),
        ("data: prints", "### Data\ndata: prints", 5, "data"),
        ("data: prints", "# the prints\ndata: prints", 5, "data"),
        ("data: prints", "| key | means |\n|---|---|\ndata: prints", 6, "data"),
        ("until: 12", " until: 12", 17, "until"),
        ("until: 12", "Be quick.\nuntil: 12", 18, "until"),
        ("Ideas: learning", "Until: 12 experiments\nIdeas: learning", 19, "until"),
    ],
)
def test_a_setting_that_would_be_ignored_is_an_error(old: str, new: str, line: int, key: str):
    assert PLAN.count(old) == 1
    told = f"^program.md line {line}: '{key}' is not read: move it up, .* write it as `{key}: ...`; if it is prose"
    with pytest.raises(program.ProgramError, match=told):
        program.parse(PLAN.replace(old, new))


@pytest.mark.parametrize(
    "prose",
    [
        "Changes: be brave, one or many.",
        "- Until: the loss no longer falls",
        "- **Web**: none but the domains above",
        "Patience is a virtue: wait.",
        "patience, changes: both as in the paper",
        "budget: is a key of the settings only",
        "# until: 4 experiments",
        "<!-- until: 4 experiments -->",
        "<!--\nuntil: 4 experiments\n## Phase 3 — left out\n-->",
        "```\nuntil = 4\n# Settings\n```",
        "  ~~~sh\nuntil: 4 experiments\n  ~~~",
    ],
)
def test_prose_is_not_taken_for_a_setting(prose: str):
    assert program.parse(PLAN.replace("Ideas: learning rate.", prose)).phases == program.parse(PLAN).phases


@pytest.mark.parametrize(
    "heading", ["## Settings:", "## Settings ##", " ## Settings", "# Settings", "##Settings", "## **settings**"]
)
@pytest.mark.parametrize("before", ["", "\ufeff", "\u200b"])
def test_harmless_marks_are_left_out(tmp_path, heading: str, before: str):
    text = before + PLAN[PLAN.index("## Settings") :].replace("## Settings\n", f"{heading}\n<!-- ours -->\n{before}")
    (tmp_path / "program.md").write_bytes(
        text.replace("## Phase 2", f"{before}# Phase 2").replace("## Phase 1", "##Phase 1").encode()
    )
    plan = program.read(tmp_path / "program.md")
    assert plan.phases == program.parse(PLAN).phases and plan.data == "prints" and plan.stop.experiments == 40
    assert plan.text.encode() == (tmp_path / "program.md").read_bytes()


def test_a_plan_without_phases():
    with pytest.raises(program.ProgramError, match="no '## Phase 1"):
        program.parse("## Settings\ndata: prints\n")


def test_what_is_not_said_has_a_default():
    plan = program.parse("## Settings\n\n## Phase 1 — first\n")
    assert (plan.data, plan.metric, plan.budget, plan.memory) == ("prints", "mean_rank", 120, "8g")
    assert plan.stop == plan.phases[0].until == Limits() and plan.launch == [] and plan.phases[0].changes == "one"


def test_a_file_that_cannot_be_read_is_an_error_of_one_line(tmp_path):
    (tmp_path / "program.md").write_bytes(PROGRAM.encode() + b"\xff")
    for path in (tmp_path / "program.md", tmp_path / "no" / "program.md", tmp_path):
        with pytest.raises(program.ProgramError, match="cannot be read: .*; put it back: git checkout") as error:
            program.read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("1 experiment", Limits(experiments=1)),
        ("40 experiments, 07:30", Limits(experiments=40, clock="07:30")),
        ("1 hour, 300k tokens", Limits(hours=1.0, tokens=300_000)),
        ("2 USD", Limits(usd=2.0)),
    ],
)
def test_limits(line: str, limits: Limits):
    assert program.limits(line) == limits
