"""The full sweeps: everything that is tried of the sandbox, the lock, the cheats and the kill points, and its table.

usage: tests/.venv/bin/python tests/long/trust.py FIGURES [PYTEST ARGUMENTS]   run them, then write tests/long/trust.md
       tests/.venv/bin/python tests/long/trust.py FIGURES --table              only write the table again

FIGURES is a file of JSON lines to which the tests themselves append what they counted. To have more engines in the
table, run tests/engine/test_sandbox.py with `--full --figures FIGURES` as another user (rootless podman) or with
AR_ENGINE=docker, then write the table again. Takes about two hours on two cores. The row of a night comes from
tests/long/night.py, which leaves it in a file of its own: append that to FIGURES.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["engine/test_sandbox", "client/test_lock", "engine/test_planted", "engine/test_cheats", "unit/test_record"]
TESTS += ["engine/test_lost", "unit/test_guard", "unit/test_side_by_side"]
OWN = (
    "sweep",
    "tried",
    "wrong",
    "engine",
    "seconds",
    "commit",
    "when",
)  # columns; what else a row says stands in its note
HEAD = """# The three promises, tried

Made by `tests/long/trust.py` from what the tests counted: nothing gets out (sandbox, lock, planted), nothing gets faked
(cheats), nothing gets lost (kill points, accidents, data, worktrees side by side, a night of faults). *Wrong* is a
probe that got through, a call wrongly allowed, a cheat rewarded, an inconsistency after a kill, an experiment lost or
doubled; of *cheats without their defence*, one that did not pay, so that its trial proves nothing. `./run.sh test`
tries a seeded sample of each.

| what | engine | tried | wrong | seconds | commit | date | note |
|---|---|---|---|---|---|---|---|
"""


def table(figures: Path) -> str:
    """The newest row of each sweep and engine, in the order in which they first came."""
    rows: dict = {}
    for line in figures.read_text().splitlines():
        row = json.loads(line)
        rows[row["sweep"], row["engine"]] = row
    text = HEAD
    for row in rows.values():
        note = ", ".join(f"{k} {v}" for k, v in row.items() if k not in OWN)
        cells = [row[k] for k in ("sweep", "engine", "tried", "wrong", "seconds", "commit", "when")]
        text += "| " + " | ".join(map(str, [*cells, note])) + " |\n"
    return text


def main(figures: str, *arguments: str) -> int:
    status = 0
    if arguments != ("--table",):
        tests = [f"tests/{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "--full", f"--figures={figures}", *(arguments or tests)]
        status = subprocess.run(command, cwd=ROOT).returncode
    (ROOT / "tests/long/trust.md").write_text(table(Path(figures)))
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
