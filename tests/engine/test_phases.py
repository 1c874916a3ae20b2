"""A plan that is edited while it is carried out, and a chain of experiments, through the real ./run.sh.

Every phase, chain and edit is in tests/unit/test_history.py and tests/unit/test_experiment.py, without an engine.
"""

from __future__ import annotations

import time

from repository import CANDIDATES, CRASH, Project, block

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


def test_a_chain_whose_plan_is_edited_meanwhile(fast: Project):
    head = fast.git("rev-parse", "HEAD")
    fast.write("program.md", PHASES)
    (fast.path / "runs/session").mkdir(exist_ok=True)
    fast.write("runs/session/program.md", PHASES)  # as the client's start does
    fast.write("train.py", CANDIDATES["discarded"])
    fast.hypothesis("worse")
    run = fast.start(given="keep_rule.HOPELESS = 99")
    deadline = time.monotonic() + 60
    while not (fast.path / "runs/running.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fast.edit("patience: 3", "patience: 2", "program.md")
    first = block(run.communicate()[0])
    assert first["verdict"] == "discarded" and "train.py keeps your edit, build on it: 1 of 3" in first["commit"]
    assert first["plan"] == "program.md has changed since you last read it: read it"
    assert "patience: 3" in fast.git("show", "refs/experiments/3:experiment/program.md")
    assert fast.read("train.py") == CANDIDATES["discarded"] and fast.git("rev-parse", "HEAD") == head

    fast.edit("patience: 2", "patience: 3", "program.md")
    fast.write("train.py", CRASH)
    done, second = fast.experiment("a crash on top")
    assert second["verdict"] == "failed" and second["next"].startswith("your edit failed: mend it where it stands"), (
        done.stderr
    )
    assert fast.read("train.py") == CRASH and "chain 2 of at most 3" in fast.run("status").stdout

    fast.write("train.py", CANDIDATES["kept"])
    done, third = fast.experiment("what both were for")
    assert third["verdict"] == "kept" and "the whole chain of 3" in third["commit"], done.stdout + done.stderr
    assert third["new phase"] == "careful: read its section in program.md" and len(done.stdout.encode()) < 2048
    assert fast.git("rev-parse", "HEAD^") == head and fast.read("train.py") == CANDIDATES["kept"]
