"""Safe calls of git. Nothing that planted settings or variables could make git run is run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from project import ROOT, Refused

# hooks, monitors, pagers, signature programs, fetches of missing objects
QUIET = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "commit.gpgSign=false", "log.showSignature=false",
         "protocol.allow=never", "gc.auto=0")  # fmt: skip
GIT = ("git", *(word for setting in QUIET for word in ("-c", setting)), "--no-pager")
FALLBACK_IDENTITY = ("-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost")
ABSENT = "0" * 40  # what a ref that does not exist yet is expected to hold
held_locks: list[int] = []  # files that a git which writes keeps open: our locks last until it has ended


def _environment(**more: str) -> dict:
    return {**{k: v for k, v in os.environ.items() if not k.startswith("GIT_")}, **more}


def call(*args: str, given: bytes | None = None, index: Path | None = None, writes: bool = False):
    """One git command; returns the finished process, with bytes.

    given: its standard input. index: a file in place of the user's index. writes: in a session of its own, so that
    neither Ctrl-C nor a kill of our process group stops it half-way.
    """
    stdin = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    return subprocess.run(
        [*GIT, *args],
        cwd=ROOT,
        env=_environment(**({"GIT_INDEX_FILE": str(index)} if index else {})),
        capture_output=True,
        start_new_session=writes,
        pass_fds=held_locks if writes else (),
        **stdin,
    )


def read(*args: str, check: bool = True, **how) -> str:
    """Standard output of a git command as text. Raises Refused when it fails, unless check is off."""
    done = call(*args, **how)
    if done.returncode and check:
        error = done.stderr.decode("utf-8", "replace").strip()[:200] or f"it ended with {done.returncode}"
        raise Refused(f"git {args[0]} failed: {error}; fix that and run it again, which completes what is recorded")
    return done.stdout.decode("utf-8", "replace")


def write(*args: str, check: bool = True, **how) -> str:
    """The same for a command that changes a ref or the user's index."""
    return read(*args, check=check, writes=True, **how)


def object_id(name: str) -> str:
    """The object that a revision such as HEAD:train.py names, '' when there is none."""
    return read("rev-parse", "-q", "--verify", name, check=False).strip()


def blob_of(file: Path | str) -> str:
    """The id of a file's bytes as they are, stored in git."""
    return read("hash-object", "-w", "--no-filters", "--", str(file)).strip()


def store(content: bytes) -> str:
    """The id of some bytes, stored in git as a blob."""
    return read("hash-object", "-w", "--no-filters", "--stdin", given=content).strip()


def content(name: str) -> bytes:
    """The bytes of a blob. Raises Refused."""
    found = contents([name])
    if name not in found:
        raise Refused(f"git has no file {name}; git fsck tells whether the repository is damaged")
    return found[name]


def contents(names: list[str]) -> dict[str, bytes]:
    """{name: bytes} of those blobs that exist, from one git process."""
    out = call("cat-file", "--batch", given="".join(f"{n}\n" for n in names).encode()).stdout
    found, at = {}, 0
    for name in names:
        end = out.index(b"\n", at)
        header, at = out[at:end].split(), end + 1
        if len(header) == 3 and header[1] == b"blob":
            found[name] = out[at : at + int(header[2])]
            at += int(header[2]) + 1
    return found


def folder(which: str = "--git-common-dir") -> Path:
    """The repository's own folder, or with --git-dir that of this worktree. Raises Refused."""
    return Path(read("rev-parse", "--path-format=absolute", which).strip())


def branch() -> str:
    return read("symbolic-ref", "--short", "-q", "HEAD", check=False).strip() or "detached"


def commit(tree: str, parent: str, message: str) -> str:
    """A commit object on top of `parent`; a missing identity does not lose a night."""
    identity = () if call("var", "GIT_COMMITTER_IDENT").returncode == 0 else FALLBACK_IDENTITY
    return read(*identity, "commit-tree", tree, "-p", parent, "-F", "-", given=message.encode()).strip()


def tree_with(base: str, files: dict[str, str], index: Path) -> str:
    """The tree of `base` with these files, {path: blob}; `index` is a scratch file."""
    for left in (index, index.with_name(f"{index.name}.lock")):  # by a git that was killed
        left.unlink(missing_ok=True)
    read("read-tree", base, index=index)
    lines = "".join(f"100644 {blob}\t{path}\n" for path, blob in files.items())
    read("update-index", "--add", "--index-info", given=lines.encode(), index=index)
    return read("write-tree", index=index).strip()
