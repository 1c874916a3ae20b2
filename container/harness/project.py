"""Where this project is, and the few small things that every module of the harness needs. Standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs"  # logs, diffs and state of this worktree; git ignores it, the agent may read some of it
INSIDE = ROOT / "container" / "inside"  # what is mounted into containers
# Names of data sets, which are folders in data/. There, weights holds published ones, and a preparation works in the
# other two.
DATA_NAME = r"(?!(?i:weights)$|.*\.(?i:partial|download)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,40}"
DATA_NAME_HINT = "up to 41 letters, digits, dots, dashes and underscores, but not weights, *.partial or *.download"
DATA_FORMAT = 3  # of a data set's info.json
MEASURES = ("inside/judge.py", "inside/stage.py", "image/seccomp.json")  # in container/: results depend on these
IMAGE_MADE_OF = ("Containerfile", "requirements.txt")  # in container/image/, likewise


class Refused(Exception):
    """Nothing ran. The message is one line: what is wrong, where, and what to do next. Exit status 2."""


class Broken(Refused):
    """What a person has to mend: it is not the edit's fault."""


def say(text: str) -> None:
    """A line for whoever watches, in place of a live one; results alone go to standard output."""
    print("\x1b[K" * sys.stderr.isatty() + text, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Without control and other invisible characters, so that nothing can steer a terminal or fake a line."""
    return "".join(c for c in text if c.isprintable()).strip()


def number(value: float) -> str:
    """A metric as it is shown."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def sha256(file: Path) -> str:
    h = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file in one go: whoever reads it finds the old content or the new one. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        if file.exists():
            part.chmod(file.stat().st_mode)
        with part.open("rb") as f:
            os.fsync(f.fileno())  # so that it is there after a power cut too
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_json(file: Path, default, **kinds: type):
    """What a JSON file holds; the default where it is missing, damaged, or of another kind; kinds: of its values."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return default
    alike = isinstance(found, type(default)) and all(isinstance(found.get(key), kinds[key]) for key in kinds)
    return found if alike else default


def write_json(file: Path, value) -> None:
    """Raises OSError."""
    write_whole(file, json.dumps(value) + "\n")
