"""What the harness costs: seconds around a training, bytes the agent reads, milliseconds of the guard, lines of code.

usage: PYTHONPATH=tests/support:container/harness tests/.venv/bin/python tests/bench/harness.py [RUNS]

Runs the shipped train.py with a short training on the whole built-in data. Seconds of training are those that PID 1 in
the sandbox measures from the end of its imports to the end of train.py; everything else of run.sh's wall clock is ours.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from repository import ROOT, copy_of_the_repository, git_at, product_code

GUARD_CALLS = 40


def experiments(project, runs: int) -> dict:
    """Median seconds of each part of a single-run experiment, warm, and the largest output in bytes."""
    parts: dict[str, list[float]] = {}
    sizes = []
    while len(parts.get("wall", [])) < runs:
        project.set("LR", f"1e-9{len(sizes):02d}")
        started = time.monotonic()
        done, shown = project.experiment(f"hardly learn {len(sizes)}")
        wall = time.monotonic() - started
        sizes.append(len(done.stdout.encode()))
        result = json.loads(project.git("show", f"refs/experiments/{shown['experiment']}:experiment/result.json"))
        project.git("checkout", "-q", "HEAD", "train.py")
        if len(result["runs"]) > 1:
            continue  # seen twice: not comparable
        timing = result["runs"][0]["timing"]
        for key, value in {
            **timing,
            "wall": wall,
            "around": wall - timing["train"],
            "git and host": wall - timing["total"],
        }.items():
            parts.setdefault(key, []).append(value)
    return {**{k: round(statistics.median(v), 2) for k, v in parts.items()}, "largest output, bytes": max(sizes)}


def guard(project) -> float:
    """Median milliseconds of one guard call, as the hook starts it."""
    settings = json.loads(project.read(".claude/settings.json"))
    command = settings["hooks"]["PreToolUse"][0]["hooks"][0]["command"]
    call = json.dumps({"tool_name": "Read", "tool_input": {"file_path": "train.py"}, "cwd": str(project.path)})
    times = []
    for _ in range(GUARD_CALLS):
        started = time.monotonic()
        subprocess.run(
            ["sh", "-c", command],
            input=call,
            text=True,
            capture_output=True,
            check=True,
            env={**os.environ, "CLAUDE_PROJECT_DIR": str(project.path)},
        )
        times.append((time.monotonic() - started) * 1000)
    return round(statistics.median(times), 1)


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = copy_of_the_repository(Path(folder) / "repo")
        assert project.run("data", "prints").returncode == 0
        started = time.monotonic()
        assert project.run("setup").returncode == 0
        print(f"setup, image there, data there: {time.monotonic() - started:.0f} s with the baseline")
        started = time.monotonic()
        assert project.run("setup").returncode == 0
        print(f"setup again: {time.monotonic() - started:.1f} s")
        print(f"guard: {guard(project)} ms a call")
        found = experiments(project, runs)
        for key, value in found.items():
            print(f"{key}: {value}")
        print(f"around a training, as a share of a budget of 300 s: {found['around'] / 300:.1%}")
    code, load = sum(product_code().values()), os.getloadavg()[0]
    print(f"lines of product code: {code}; load {load:.1f}, {os.cpu_count()} cores")


if __name__ == "__main__":
    print("commit", git_at(ROOT, "rev-parse", "--short", "HEAD"))
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
