"""./run.sh test: install what the tests need, showing each command first, then run pytest.

usage: run.py              everything a contributor and CI need: unit, engine, client
       run.py unit         only what needs no engine, no client and no image
       run.py --full       the long sweeps too, every point of them
       run.py PYTEST...    a part: tests/engine/test_run.py -k crash; or options for all: --durations=20
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(TESTS.parent / "container" / "harness"))

import engine  # noqa: E402
import install  # noqa: E402
from project import Refused, say  # noqa: E402

UNIT_REQUIREMENTS = ("pytest==9.2.0", "pytest-xdist==3.8.0", "ruff==0.17.6")
REQUIREMENTS = (*UNIT_REQUIREMENTS, "playwright==1.65.2")  # playwright drives the system's chromium
TOOLS = ("npm", "tmux", "shellcheck", "chromium", "slurmctld", "slurmd", "srun")
ALL = [str(TESTS / tier) for tier in ("unit", "engine", "client")]
# Two processes share the files between them: much of a test is waiting for an engine or a client. What measures time
# or kills at a moment (--full) has the machine for itself.
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile"]
THREE_AT_ONCE = ["-n", "3", "--dist", "loadfile"]  # the unit tier, where a few tests wait for a second or two
ALONE = str(TESTS / "engine" / "test_slurm.py")  # five trainings at a time, ended by others
# Where the unit tests' repositories lie if there is room: git flushes every object that it writes there
MEMORY, MEMORY_NEEDED = Path("/dev/shm"), 1 << 30  # bytes; they need a third of it
NO_TESTS = 5  # exit status of pytest where options selected none


def need_tools(unit: bool) -> None:
    """Programs of the system's package manager."""
    missing = [] if importlib.util.find_spec("ensurepip") else ["python3-venv"]
    if not shutil.which("shellcheck"):
        missing.append("shellcheck")
    if not unit:
        missing += [{"srun": "slurm-client"}.get(tool, tool) for tool in TOOLS if not shutil.which(tool)]
    if missing:
        install.install_packages(f"for the tests, {' '.join(missing)}", *dict.fromkeys(missing))


def need_python(requirements: tuple[str, ...]) -> str:
    """The tests' own Python, with these packages."""
    folder, installed = TESTS / ".venv", TESTS / ".venv" / "requirements"
    if not installed.exists() or not set(requirements) <= set(installed.read_text().split()):
        say(f"tests: a virtual environment with {' '.join(requirements)}")
        install.run(sys.executable, "-m", "venv", "--clear", folder)
        install.run(folder / "bin/python", "-m", "pip", "install", "-q", *requirements)
        installed.write_text(" ".join(requirements) + "\n")
    return str(folder / "bin/python")


def need_client() -> None:
    """Claude Code, in the version that the tests drive."""
    claude, version = TESTS / ".client/node_modules/.bin/claude", install.CLIENT_VERSION
    if not claude.exists() or engine.run([str(claude), "--version"]).stdout.split(" ")[0] != version:
        say(f"tests: Claude Code {version}")
        quiet = ["--silent", "--no-audit", "--no-fund"]
        install.run("npm", "install", *quiet, "--prefix", TESTS / ".client", f"@anthropic-ai/claude-code@{version}")


def main(words: list[str]) -> None:
    unit = words[:1] == ["unit"]
    need_tools(unit)
    if not unit:
        install.need_image()
        need_client()
    python = need_python(UNIT_REQUIREMENTS if unit else REQUIREMENTS)
    os.chdir(TESTS.parent)
    words = words[unit:]
    whole = not any(Path(word.partition("::")[0]).exists() for word in words)  # options at most
    pytest = [python, "-m", "pytest", *words]
    if unit:
        sys.exit(run_unit(pytest) if whole else subprocess.run(pytest).returncode)
    if not whole or "--full" in words:
        os.execv(python, [*pytest, *(ALL if whole else [])])
    parts = [run_unit(pytest), subprocess.run([*pytest, *TWO_AT_ONCE, *ALL[1:], f"--ignore={ALONE}"]).returncode]
    parts.append(subprocess.run([*pytest, ALONE]).returncode)
    sys.exit(next((status for status in parts if status not in (0, NO_TESTS)), 0 if 0 in parts else NO_TESTS))


def run_unit(pytest: list[str]) -> int:
    """The exit status of pytest for the unit tier."""
    command = [*pytest, *THREE_AT_ONCE, ALL[0]]
    with contextlib.ExitStack() as stack:
        memory = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
        given = any(word.startswith("--basetemp") for word in pytest)
        if memory and not given and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED:
            command += ["--basetemp", stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)) + "/tests"]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as error:
        say(f"run.sh: {error}")
        sys.exit(2)
