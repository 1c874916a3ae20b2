"""Safe calls of git. Nothing that planted settings or variables could make git run is run."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from pathlib import Path
from subprocess import PIPE

from project import ROOT, RUNS, Refused

# Off: hooks, monitors, pagers, signature programs, fetches of missing objects, a file that may be missing. Messages are
# UTF-8, and what is written survives a power cut
QUIET = ("core.hooksPath=/dev/null", "core.fsmonitor=false", "commit.gpgSign=false", "log.showSignature=false",
         "protocol.allow=never", "gc.auto=0", "core.filesRefLockTimeout=5000", "diff.orderFile=/dev/null",
         "i18n.commitEncoding=UTF-8", "i18n.logOutputEncoding=UTF-8", "core.fsync=committed")  # fmt: skip
GIT = ("git", *(word for setting in QUIET for word in ("-c", setting)), "--no-pager")
FALLBACK_IDENTITY = ("-c", "user.name=autoresearch", "-c", "user.email=autoresearch@localhost")
INDEX = RUNS / "work" / "index"  # beside the user's own; the folder is emptied before and after every run
DETACHED = "detached"  # in the place of a branch
ABSENT = ""  # what a ref that does not exist yet is expected to hold, in SHA-256 repositories too
MAX_ERROR = 400  # characters of git's own words
held_locks: list[int] = []  # files that a git which writes keeps open: our locks last until it has ended


def call(*args: str, given: bytes = b"", index: Path | None = None, writes: bool = False):
    """One git command; returns the finished process, with bytes.

    given: its standard input. index: a file in place of the user's index. writes: in a session of its own, so that
    neither Ctrl-C nor a kill of our process group stops it half-way; a signal to us alone waits for its end.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    if index:
        environment["GIT_INDEX_FILE"] = str(index)
    where = {"cwd": ROOT, "env": environment, "start_new_session": writes, "pass_fds": held_locks if writes else ()}
    # not subprocess.run, which kills it when a signal handler raises
    with subprocess.Popen([*GIT, *args], stdin=PIPE, stdout=PIPE, stderr=PIPE, **where) as process:
        out, error = process.communicate(given)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def read(*args: str, check: bool = True, **how) -> str:
    """Standard output of a git command as text. Raises Refused when it fails, unless check is off."""
    done = call(*args, **how)
    if done.returncode and check:
        error = " | ".join(done.stderr.decode("utf-8", "replace").strip().splitlines())[:MAX_ERROR]
        remedy = "get this project with git clone" if "not a git repository" in error else "fix that, then try again"
        if "missing object" in error:
            remedy = "if no other copy has it, give that ref up: git update-ref -d REF"
        raise Refused(f"git {args[0]} failed: {error or f'it ended with {done.returncode}'}; {remedy}")
    return done.stdout.decode("utf-8", "replace")


def object_id(name: str) -> str:
    """The object that a revision such as HEAD:train.py names, '' when there is none."""
    return read("rev-parse", "-q", "--verify", name, check=False).strip()


def store(content: bytes) -> str:
    """The id of some bytes, stored in git as they are."""
    return read("hash-object", "-w", "--no-filters", "--stdin", given=content).strip()


def blob_of(file: Path | str) -> str:
    """The id of a file's bytes, stored likewise; '' where it is no ordinary file. A name is one in the repository."""
    path = ROOT / file
    return store(path.read_bytes()) if path.is_file() and not path.is_symlink() else ""


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
        end = out.find(b"\n", at)
        if end < 0:  # git ended at an object that a partial clone lacks
            break
        header, at = out[at:end].split(), end + 1
        if len(header) == 3 and header[1] == b"blob":
            found[name] = out[at : at + int(header[2])]
            at += int(header[2]) + 1
    return found


def diff(before: str, after: str) -> str:
    """What changed from one blob to another, of any bytes, whatever the user's settings; '' where one is missing."""
    options = ("--text", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "-U3")
    text = read("diff", *options, before, after, check=False)
    return "".join(c for c in text if c in "\n\t" or c.isprintable())  # what is invisible could fake a line


@functools.lru_cache(maxsize=None)  # it stays where it is as long as a process of ours runs
def folder(which: str = "--git-common-dir") -> Path:
    """The repository's own folder, or with --git-dir that of this worktree. Raises Refused."""
    within, _, path = read("rev-parse", "--show-prefix", "--path-format=absolute", which)[:-1].partition("\n")
    if within:  # HEAD:train.py would be another file
        raise Refused(f"{ROOT} is a part of another repository; give it one of its own (git init, git add, git commit)")
    return Path(path)  # its name may end in a blank


def main_worktree() -> Path:
    """The worktree that holds what all of them share. Raises Refused.

    Where the repository's own folder does not lie in it (a submodule, a separate git directory, a bare repository), git
    does not know it: then it is the first worktree in which this was asked, as a link in that folder says.
    """
    common = folder()
    if (common.parent / "program.md").is_file():
        return common.parent
    link = common / "autoresearch.main"
    if not link.is_dir():  # none yet, or that worktree is gone
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT)
    lock(link.resolve(), "data/ of all worktrees")
    return link.resolve()


def lock(worktree: Path, holds: str) -> None:
    """Else `git worktree remove` takes along what git ignores, without a word. A main one can be neither."""
    call("worktree", "lock", "--reason", f"{holds} would be lost", str(worktree))


def data_folder(name: str) -> Path:
    """data/<name> in the main worktree, so that all worktrees share it. Raises Refused."""
    return main_worktree() / "data" / name


def branch() -> str:
    # not --short, which calls main heads/main as soon as there is a tag of that name
    return read("symbolic-ref", "-q", "HEAD", check=False).strip()[len("refs/heads/") :] or DETACHED


def commit(parent: str, files: dict[str, str], message: str) -> str:
    """A commit on top of `parent` with these files, {path: blob}; a missing identity does not lose a night."""
    INDEX.parent.mkdir(exist_ok=True)
    read("read-tree", parent, index=INDEX)
    entries = [entry.partition("\t") for entry in read("ls-tree", parent, "--", *files).splitlines()]
    executable = {path for entry, _, path in entries if entry.startswith("100755")}
    lines = "".join(f"100{755 if path in executable else 644} {blob}\t{path}\n" for path, blob in files.items())
    read("update-index", "--add", "--index-info", given=lines.encode(), index=INDEX)
    tree = read("write-tree", index=INDEX).strip()
    known = all(call("var", f"GIT_{who}_IDENT").returncode == 0 for who in ("AUTHOR", "COMMITTER"))
    identity = () if known else FALLBACK_IDENTITY
    return read(*identity, "commit-tree", tree, "-p", parent, "-F", "-", given=message.encode()).strip()


def commit_under_way() -> bool:
    """Whether somebody's `git commit` runs in this worktree: while its editor is open it holds the index's lock."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            program, *words = (process / "cmdline").read_bytes().split(b"\0")
            cwd = (process / "cwd").resolve()
            if program.rpartition(b"/")[2] == b"git" and b"commit" in words and ROOT in (cwd, *cwd.parents):
                return True
    return False
