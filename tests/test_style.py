"""The shape of the code: lint, sizes, no leftovers. Size is a feature (README, design choices)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, tracked, tracked_code

HARNESS_LINES, RUN_LINES, GUARD_LINES, TRAIN_LINES = 5080, 250, 200, 300


def test_ruff():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--config",
            ROOT / "tests/ruff.toml",
            *[f for f in tracked() if f.endswith(".py")],
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_shellcheck():
    scripts = [f for f in tracked() if f.endswith(".sh") or f == ".ci/run"]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stdout


def test_sizes():
    sizes = tracked_code()
    assert sizes["run.sh"] <= RUN_LINES and sizes[".claude/hooks/guard.py"] <= GUARD_LINES
    assert sizes["train.py"] <= TRAIN_LINES and sum(sizes.values()) - sizes["train.py"] <= HARNESS_LINES, sizes


def test_the_host_needs_only_the_standard_library():
    host = [
        f
        for f in tracked()
        if f.startswith((".claude/hooks/", "container/"))
        and f.endswith(".py")
        and Path(f).name not in ("prints.py", "stage.py", "judge.py", "draw.py", "ukiyoe.py")
    ]
    ours = {Path(f).stem for f in host}
    for f in host:
        found = set(re.findall(r"^(?:import|from) (\w+)", (ROOT / f).read_text(), re.M))
        assert found <= ours | set(sys.stdlib_module_names), f


def test_nothing_names_this_machine_or_a_registry():
    for f in tracked():
        if Path(f).suffix not in (".png", ".npy") and f != "tests/test_style.py":
            text = (ROOT / f).read_text(errors="replace")
            assert str(ROOT.parent) + "/" not in text, f
            assert not re.search(r"//[a-z0-9.-]*(pypi|pythonhosted|npmjs|debian)[a-z0-9.-]*\.(org|com|net)", text), f


def test_settings_are_json_and_the_seccomp_profile_denies_by_default():
    json.loads((ROOT / ".claude/settings.json").read_text())
    profile = json.loads((ROOT / "container/seccomp.json").read_text())
    allowed = {n for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for n in rule["names"]}
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert not allowed & {
        "ptrace",
        "unshare",
        "setns",
        "mount",
        "keyctl",
        "bpf",
        "io_uring_setup",
        "process_vm_writev",
        "clone3",
    }
