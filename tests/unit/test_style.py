"""The shape of the code: lint, sizes, no leftovers. Size is a feature (README, design choices)."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT, product_code, tracked

PRODUCT_LINES = 7570
LINES = {"run.sh": 40, "train.py": 300, ".claude/hooks/guard.py": 200}  # of these files
FUNCTION_LINES, EXPERIMENT_LINES = 50, 40  # of any function of product code, of experiment.run
ONE_PATH_EDIT = (".claude/hooks/guard.py", ".claude/hooks/loop.py", "prepare_data.py")  # started from elsewhere
HOST = ("container/harness/", ".claude/hooks/")
PYTHON = [f for f in tracked() if f.endswith(".py")]
PRODUCT = [f for f in PYTHON if f in product_code()]


def ruff(*words: str) -> None:
    command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", ROOT / "tests/ruff.toml", *PYTHON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_format():
    ruff("format", "--check")


def test_lint():
    ruff("check")


def test_shellcheck():
    scripts = [f for f in tracked() if f.endswith(".sh") or f == ".ci/run"]
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here; ./run.sh test installs it")
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert scripts and done.returncode == 0, done.stdout


def test_sizes():
    sizes = product_code()
    assert {f: sizes[f] for f, most in LINES.items() if sizes[f] > most} == {}
    assert sum(sizes.values()) <= PRODUCT_LINES, dict(sorted(sizes.items(), key=lambda x: -x[1]))


def functions(name: str) -> dict[str, int]:
    """Lines of every function and method of a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, kinds)]
    return {node.name: node.end_lineno - node.lineno + 1 for node in nodes}


def test_no_function_is_long():
    long = {f"{f}: {name}": n for f in PRODUCT for name, n in functions(f).items() if n > FUNCTION_LINES}
    assert not long
    assert functions("container/harness/experiment.py")["run"] <= EXPERIMENT_LINES


def imports(name: str) -> set[str]:
    """The top-level modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_host_needs_only_the_standard_library():
    host = [f for f in PRODUCT if f.startswith(HOST)]
    allowed = {Path(f).stem for f in host} | set(sys.stdlib_module_names)
    assert len(host) > 15 and {f: imports(f) - allowed for f in host if imports(f) - allowed} == {}


def test_the_harness_is_one_package_without_path_edits():
    host = [f for f in PRODUCT if not f.startswith("container/inside/")]
    edits = {f: (ROOT / f).read_text().count("sys.path") for f in host}
    assert {f: n for f, n in edits.items() if n} == dict.fromkeys(ONE_PATH_EDIT, 1)
    assert not [f for f in host if "E402" in (ROOT / f).read_text() and f not in ONE_PATH_EDIT]


THIS_FILE = "tests/unit/test_style.py"


def test_old_pythons_can_read_the_host_side():
    for f in PRODUCT:
        if f.startswith(HOST):
            ast.parse((ROOT / f).read_text(), feature_version=(3, 9))
            assert "from __future__ import annotations" in (ROOT / f).read_text(), f


def test_nothing_names_this_machine_or_a_registry():
    here = re.compile(rf"(?<!\w){re.escape(str(ROOT.parent))}/")  # which may be the end of a longer path
    for f in tracked():
        if Path(f).suffix not in (".png", ".npy") and f != THIS_FILE:
            text = (ROOT / f).read_text(errors="replace")
            assert ROOT.parent == Path("/tmp") or not here.search(text), f  # /tmp is a path inside containers too
            assert not re.search(r"//[a-z0-9.-]*(pypi|pythonhosted|npmjs|debian)[a-z0-9.-]*\.(org|com|net)", text), f


def test_settings_are_json_and_the_seccomp_profile_denies_by_default():
    json.loads((ROOT / ".claude/settings.json").read_text())
    profile = json.loads((ROOT / "container/image/seccomp.json").read_text())
    allowed = {n for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for n in rule["names"]}
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    dangerous = (
        "ptrace",
        "unshare",
        "setns",
        "mount",
        "keyctl",
        "bpf",
        "io_uring_setup",
        "process_vm_writev",
        "clone3",
    )
    assert not allowed & set(dangerous)
