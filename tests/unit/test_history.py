"""What follows from the record: phases that end, a plan that is edited, chains, what is due, the incumbent."""

from __future__ import annotations

import pytest

from in_process import DISCARDED, Small
from keep_rule import pooled_sigma
from recorded import INCUMBENT, Recorded

CHAIN_PLAN = """# Program

## Settings
data: prints

## Phase 1 — bold
until: 5 experiments
patience: 3

## Phase 2 — careful
until: 9 experiments
"""


@pytest.fixture
def plan(monkeypatch) -> Recorded:
    return Recorded(monkeypatch)


def phase(plan: Recorded) -> str:
    found = plan.history.phase
    return found.name if found else ""


def line(plan: Recorded) -> str:
    return plan.history.phase_line()


def test_phases_end_by_their_until(plan):
    assert line(plan) == "1 of 3 (optimiser), 0 of 2 experiments"
    plan.add("discarded", "failed")
    assert phase(plan) == "expert views"
    plan.add("discarded", "kept", "discarded")
    assert phase(plan) == "architecture"
    plan.add("discarded")
    assert line(plan) == "3 of 3 (architecture), 1 experiments"
    plan.edit("## Phase 3 — architecture\n", "## Phase 3 — architecture\nuntil: 1 experiment\n")
    assert phase(plan) == "" and line(plan) == "all phases of program.md are done"


def test_only_candidates_that_were_judged_or_failed_count(plan):
    plan.add("baseline", "remeasured", "unmeasured")
    plan.add("kept", by_hand=True)
    plan.add("audit", "final", comparable="")
    assert plan.history.counted == [] and line(plan) == "1 of 3 (optimiser), 0 of 2 experiments"


def test_another_budget_is_another_comparison_but_the_same_work(plan):
    plan.add("discarded", "failed")
    plan.comparable = "y"
    plan.add("baseline", "discarded")
    history = plan.history
    assert ([r.number for r in history.counted], [r.number for r in history.tried_here]) == ([4], [1, 2, 4])


def test_worktrees_share_the_record_but_stop_and_chains_are_a_branchs_own(plan):
    plan.add("discarded")
    plan.branch = "second"
    plan.add("discarded")
    history = plan.history
    assert [r.number for r in history.counted] == [1, 2] and [r.number for r in history.tried_here] == [2]
    assert [r.number for r in history.own(history.records)] == [2]


def test_going_back_and_skipping(plan):
    plan.add(*["discarded"] * 4)
    assert phase(plan) == "architecture"  # two discards in a row ended the second
    plan.edit("until: 2 experiments", "until: 5 experiments")
    assert line(plan) == "1 of 3 (optimiser), 2 of 5 experiments"
    plan.edit("until: 5 experiments", "until: 0 experiments")
    assert phase(plan) == "architecture"


def test_inserting_moving_and_adding_ideas(plan):
    plan.add("discarded", "discarded", "kept")
    plan.edit("## Phase 2 — expert views", "## Phase 2 — data order\nuntil: 1 experiment\n\n## Phase 3 — expert views")
    assert phase(plan) == "data order"
    plan.add("discarded")
    plan.edit("mixup of both views.", "mixup of both views.\n- A cold start, then a warm-up.")
    assert line(plan) == "3 of 4 (expert views), 1 of 3 experiments"


def test_a_renamed_phase_begins_anew(plan):
    """On purpose: the record tells phases by name, and does not guess which one was meant."""
    plan.add("discarded", "discarded", "kept")
    plan.edit("— expert views", "— the expert mechanism")
    assert line(plan) == "2 of 3 (the expert mechanism), 0 of 3 experiments"
    plan.edit("— the expert mechanism", "— expert views")
    assert line(plan) == "2 of 3 (expert views), 1 of 3 experiments"


def test_a_phase_that_is_taken_out_leaves_the_others_alone(plan):
    plan.add("discarded", "discarded", "kept")
    plan.edit(plan.text[plan.text.index("## Phase 2") : plan.text.index("## Phase 3")], "")
    assert line(plan) == "2 of 2 (architecture), 0 experiments"


def test_the_planner_is_due_at_the_start_of_a_phase_and_after_five_discards(plan):
    plan.edit("until: 2 experiments", "until: 30 experiments")
    due = []
    for verdict in ["discarded"] * 6 + ["kept"] + ["discarded"] * 5:
        due.append(plan.history.planner_due())
        plan.add(verdict)
    assert [i for i, x in enumerate([*due, plan.history.planner_due()]) if x] == [0, 5, 12]


def test_a_control_counts_as_an_experiment_but_not_as_a_discard(plan):
    plan.edit("until: 2 experiments", "until: 9 experiments, 6 discards")
    control = {"hypothesis": "control: without the expert"}
    plan.add("discarded")
    plan.add("control", "failed", **control)  # nor does one that crashed
    plan.add(*["discarded"] * 3)
    assert not plan.history.planner_due()
    plan.add("discarded")
    assert plan.history.planner_due() and phase(plan) == "optimiser"
    plan.add("control", **control)
    assert not plan.history.planner_due() and phase(plan) == "optimiser"
    assert line(plan) == "1 of 3 (optimiser), 8 of 9 experiments, 5 of 6 discards in a row"
    plan.add("control", **control)
    assert phase(plan) == "expert views"


# Chains


@pytest.fixture
def bold(monkeypatch) -> Recorded:
    return Recorded(monkeypatch, CHAIN_PLAN)


def test_a_chain_goes_on_up_to_its_patience(bold):
    chains = [bold.add(verdict).chain for verdict in ("discarded", "failed", "discarded")]
    assert [str(c) for c in chains] == [
        f"1 of 3 on {INCUMBENT[:9]}, goes on",
        f"2 of 3 on {INCUMBENT[:9]}, goes on",
        f"3 of 3 on {INCUMBENT[:9]}",
    ]
    assert bold.history.link == 0 and bold.add("discarded").chain.link == 1


def test_a_chain_ends_with_a_keep_a_new_incumbent_and_its_phase(bold):
    bold.add("discarded")
    assert line(bold) == "1 of 2 (bold), 1 of 5 experiments, chain 1 of at most 3"
    assert not bold.add("kept").chain.continues
    bold.add("discarded")
    assert bold.history.link == 1
    bold.incumbent = "3" * 40  # a person committed another train.py
    assert bold.history.link == 0
    bold.add("discarded")
    last = bold.add("discarded")  # the fifth
    assert last.chain.link == 2 and not last.chain.continues and phase(bold) == "careful"
    assert bold.add("discarded").chain is None


def test_nothing_is_built_on_a_control_or_on_what_lost_by_far(bold):
    assert bold.add("discarded", sigmas=-4.1).chain is None and bold.add("control").chain is None
    assert bold.history.link == 0 and bold.add("discarded", sigmas=-3.9).chain.continues
    assert str(bold.add("control").chain) == f"2 of 3 on {INCUMBENT[:9]}" and bold.history.link == 0
    bold.text = bold.text.replace("until: 5", "until: 9")
    bold.add("discarded")
    assert not bold.add("discarded", sigmas=-4.1).chain.continues and bold.history.link == 0


def test_a_dropped_chain_is_over(bold):
    bold.add("discarded")
    bold.add("dropped", ranks=())
    assert bold.history.link == 0 and line(bold) == "1 of 2 (bold), 1 of 5 experiments"
    assert bold.add("discarded").chain.link == 1


def test_a_lower_patience_ends_a_chain_with_its_next_link(bold):
    bold.add("discarded")
    bold.edit("patience: 3", "patience: 1")
    assert str(bold.add("discarded").chain) == f"2 of 2 on {INCUMBENT[:9]}"


# The incumbent


def test_the_incumbent_is_what_was_measured_for_heads_train_py(plan):
    assert plan.history.incumbent == [] and plan.history.best_line() == "not measured yet"
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 110.0))
    plan.add("remeasured", train=INCUMBENT, ranks=(90.0,))
    plan.add("discarded", ranks=(150.0,))
    history = plan.history
    assert history.incumbent == [100.0, 110.0, 90.0]
    assert history.sigma == pooled_sigma([[100.0, 110.0, 90.0], [150.0]]) > 0.04
    plan.add("discarded", ranks=(100.0, 250.0), reason="cut short at 42 of 60 steps")  # says nothing of whole ones
    assert plan.history.sigma == history.sigma
    assert history.best_line().startswith("99.7 ± 4.5 (-5.0 % since the baseline 104.9; noise ")
    plan.incumbent = f"{3:040d}"
    assert plan.history.incumbent == [150.0]


def test_after_ten_discards_the_incumbent_is_measured_again_up_to_four_runs(plan):
    plan.edit("until: 2 experiments", "until: 100 experiments")
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 100.0))
    due = []
    for _ in range(45):
        plan.add("discarded")
        due.append(plan.history.incumbent_due())
        if due[-1]:
            plan.add("remeasured", train=INCUMBENT)
            assert not plan.history.incumbent_due()
    assert [i for i, x in enumerate(due, 1) if x] == [10, 20]  # and then it has four


def test_an_incumbent_that_ran_once_runs_again_after_four_discards_or_before_a_simplification(plan):
    plan.edit("until: 2 experiments", "until: 100 experiments")
    plan.add("kept", train=INCUMBENT)
    assert plan.history.incumbent_due(simplify=True) and not plan.history.incumbent_due()
    plan.add("discarded", "discarded", "control", "discarded")
    assert not plan.history.incumbent_due()
    plan.add("discarded")
    assert plan.history.incumbent_due()
    plan.add("unmeasured", "discarded")  # once: one that fails now must not keep the others from running
    assert not plan.history.incumbent_due()
    plan.add("remeasured", train=INCUMBENT)
    assert not plan.history.incumbent_due(simplify=True)


def test_the_anchor_is_the_last_incumbent_that_won(plan):
    plan.add("baseline", train=INCUMBENT)
    assert plan.history.anchor == INCUMBENT
    for blob in ("3" * 40, "4" * 40):
        plan.add("kept", train=blob, anchor=plan.history.anchor)
        plan.incumbent = blob
        assert plan.history.anchor == INCUMBENT
    del plan.records[:-1]  # a clone without the record
    assert plan.history.anchor == plan.incumbent


@pytest.mark.parametrize("verdict", ["kept", "unmeasured"])
def test_it_is_tried_once_and_a_keep_counts_anew(plan, verdict):
    plan.edit("until: 2 experiments", "until: 100 experiments")
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 100.0))
    plan.add(*["discarded"] * 10)
    assert plan.history.incumbent_due()
    plan.add(verdict)
    assert not plan.history.incumbent_due()


def test_another_branch_that_is_better_is_named(plan):
    plan.add("baseline", train=INCUMBENT, ranks=(100.0, 100.0))
    plan.branch = "second"
    plan.add("kept", ranks=(120.0,))
    plan.add("kept", by_hand=True, train="4" * 40, ranks=())  # perhaps never measured
    plan.branch = "main"
    assert plan.history.better_elsewhere() == ""
    plan.branch = "second"
    plan.add("kept", ranks=(80.0,))
    assert plan.history.better_elsewhere() == ""
    plan.branch = "main"
    assert plan.history.better_elsewhere() == (
        "experiment 4 on branch second has 80.0; a person takes it over with ./run.sh keep 4"
    )


def test_without_an_image_it_is_compared_as_the_newest_of_this_branch_was(plan):
    plan.add("baseline")
    plan.branch, plan.comparable = "second", "y"
    plan.add("baseline")
    assert plan.history.comparable == "y"
    plan.branch = "main"
    assert plan.history.comparable == "x"
    plan.branch = "third"
    assert plan.history.comparable == "y"  # of none of its own: the newest of all


@pytest.mark.parametrize("text", ["{", "[4]", "{}", ""])
def test_a_damaged_file_of_what_was_compared_is_none(small: Small, text: str):
    small.write(".git/autoresearch.compared", text)
    assert "best:     mean_rank 100.0" in small.run("status").stdout
    small.write("train.py", DISCARDED)
    assert small.experiment("worse")[1]["verdict"] == "discarded"
    assert '"prints ' in small.read(".git/autoresearch.compared")


@pytest.mark.parametrize("kind", ["worktree", "clean", "stage", "image"])
def test_hooks_compare_with_what_a_run_would(small: Small, tmp_path, kind: str):
    """So that a loop whose phases are all done may start anew with another budget, a new stage.py, another image."""
    small.git("commit", "-qm", "a plan")
    here = small.worktree(tmp_path / "second", "second") if kind == "worktree" else small
    if kind == "clean":
        small.git("clean", "-qfdx", "-e", "data")
    changed = {"stage": "container/inside/stage.py", "image": "container/image/requirements.txt"}.get(kind)
    if changed:
        here.write(changed, here.read(changed) + "\n# new\n")
    else:
        here.edit("budget: 120", "budget: 60", "program.md")
    image = "another" if kind == "image" else "image"
    load = "history.History.load"
    told = here.python(f"import history; print({load}().incumbent, {load}(image={image!r}).incumbent)")
    assert told == "[] []"
