"""The harness without an engine: runs in a forked child of the test, 0.3 s each, in a small real git repository.

The child loads the harness's own modules with that repository as its root. Replaced are the engine and measure.run
alone: a train.py here says in its text what it is worth (`VALUE = 100`). Every call of git and every file that the
harness writes is counted, so that the child can be killed at any of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measure import Run
from project import DATA_FORMAT, sha256
from repository import PATH, PROGRAM, ROOT, Project, block
from sweep import Before, consistent, next_run, numbers

HARNESS = ROOT / "container" / "harness"
MODULES = [file.stem for file in HARNESS.glob("*.py") if file.stem != "__main__"]
MADE_OF = ("inside/judge.py", "inside/stage.py", *(f"image/{f.name}" for f in (ROOT / "container/image").iterdir()))
LIMIT_S = 60  # of a run here
STALE_LOCK_S = 0.2  # instead of the harness's two seconds
GIT_WRITES = ("hash-object -w", "update-ref", "update-index", "read-tree", "write-tree", "commit-tree")
FILE_WRITES = ("write_bytes", "write_text")
FILE_CALLS = (*FILE_WRITES, "replace", "rename", "unlink")
DATA = {  # the files of the made-up data, and their sizes in bytes
    "train/data-00000-of-00001.arrow": 5000,
    "val/captions/data-00000-of-00001.arrow": 3000,
    "val.key.npy": 1728,
    "test.key.npy": 928,
}
TIMING = {"total": 3.2, "train": 1.5}  # seconds
WHAT_IT_TRAINS_ON = (  # as prepare_data.py says it
    "8000 training pairs, 96 x 96 px, 2 to 4 regions each (median 3), captions of 23 words (median; most 49)"
)
# mean ranks of made-up train.py
VALUES = {"incumbent": 100, "kept": 50, "discarded": 150, "small gain": 97, "small loss": 105}

MADE_UP = """
recall = {{"i2t": [1.0, 5.0, 10.0], "t2i": [1.0, 5.0, 10.0]}}
with open("runs/in", "w") as out:
    for n in range(2, {count} + 2):
        metrics = {{"mean_rank": 150 + n / 99, "median_rank": 70.0, "gallery": 200, "random": 100.5, **recall}}
        runs = [measure.Run("ok", n, "", metrics, {{}}, {{}})]
        made = record.Attempt("discarded", f"idea {{n}}", train=f"{{n:040d}}", experiment=n, runs=runs, phase="first",
                              comparable="{comparable}", branch="main", change="+50.0 % (9.0 sigma worse)")
        for header, text in ((f"commit {{record.REFS}}{{n}}\\ncommitter T <t@example.org> {{n}} +0000", made.message()),
                             ("from refs/heads/main\\nM 100644 inline experiment/result.json", made.json().decode())):
            print(f"{{header}}\\ndata {{len(text.encode())}}\\n{{text}}", file=out)
"""


def train_py(value: float, note: str = "") -> str:
    return f'"""A train.py that is not run, and would take its random numbers from SEED."""\nVALUE = {value}\n{note}'


def variant(text: str, n: int) -> str:
    return f"{text}# {n}\n"


KEPT, DISCARDED, INCUMBENT_TEXT = (train_py(VALUES[verdict]) for verdict in ("kept", "discarded", "incumbent"))
LOSER = train_py(VALUES["small loss"])  # that may be built upon


for name in MODULES:
    importlib.import_module(name)  # and with it what it needs of the standard library, for all children


@dataclass
class Point:
    """Something happens at one call: its number from 1, or words that it contains.

    Its side: "before", "after", "inside" end the run there; "full" makes the call fail as on a full disk; "meanwhile"
    does first what a user does, which is the shell command `script`.
    """

    at: int | str = 0
    side: str = ""
    script: str = ""


class Child:
    """A run under way."""

    def __init__(self, project: Small, body: Callable[[], int]):
        self.output = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                status = self.become(project, body)
            except BaseException:
                traceback.print_exc()
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(status)

    def become(self, project: Small, body: Callable[[], int]) -> int:
        signal.alarm(LIMIT_S)
        os.setsid()
        os.umask(0o022)
        for number, file in enumerate(self.output, 1):
            os.dup2(file.fileno(), number)
        sys.stdin = open(os.devnull)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.chdir(project.path)
        return body()

    def finish(self) -> subprocess.CompletedProcess:
        _, status = os.waitpid(self.pid, 0)
        for file in self.output:
            file.seek(0)
        out, err = (file.read().decode() for file in self.output)
        return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), out, err)


class Small(Project):
    """A throw-away repository with what the harness reads, and made-up data."""

    @classmethod
    def create(cls, path: Path) -> Small:
        """A baseline is measured; work of the user's own is under way."""
        project = cls(path)
        for name in MADE_OF:
            (path / "container" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / "container" / name, path / "container" / name)
        for name in ("scratchpad.md", "LICENSE", ".gitignore"):
            shutil.copy2(ROOT / name, path / name)
        project.write("program.md", PROGRAM)
        project.write("train.py", train_py(VALUES["incumbent"]))
        project.make_data("prints")
        project.git("init", "-q", "-b", "main")
        shutil.rmtree(path / ".git/hooks")
        project.git("config", "user.name", "A Researcher")
        project.git("config", "user.email", "researcher@example.org")
        project.git("add", "-A")
        project.git("commit", "-qm", "start")
        done = project.run()
        assert block(done.stdout)["verdict"] == "baseline", done.stdout + done.stderr
        project.write("notes.txt", "mine")
        project.write("LICENSE", project.read("LICENSE") + "staged\n")
        project.git("add", "LICENSE")
        return project

    @property
    def calls_file(self) -> Path:
        """What the last run called that came to its end."""
        return self.path.with_name(f"{self.path.name}.calls")

    def make_data(self, name: str) -> None:
        """As far as the host reads it."""
        folder, files = self.path / "data" / name, {}
        for file, size in DATA.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(f"{name}/{file}".encode().ljust(size, b"\0"))
            files[file] = [size, sha256(folder / file)]
        training = [WHAT_IT_TRAINS_ON, *["A heron at dusk, " * 7] * 3]
        info = {"format": DATA_FORMAT, "hash": files["val.key.npy"][1], "training": training, "files": files}
        (folder / "info.json").write_text(json.dumps(info))

    def copy(self, path: Path) -> Small:
        shutil.copytree(self.path, path, symlinks=True)
        made = Small(path)
        made.given = self.given
        return made

    def worktree(self, path: Path, branch: str) -> Small:
        self.git("worktree", "add", "-q", "-b", branch, str(path))
        return Small(path)

    def add_made_up(self, count: int) -> None:
        """So many discarded experiments, through one `git fast-import`."""
        comparable = self.trailers("refs/experiments/1")["Comparable"]
        self.python(MADE_UP.format(count=count, comparable=comparable))
        subprocess.run(
            ["git", "fast-import", "--quiet"], cwd=self.path, check=True, stdin=(self.path / "runs/in").open()
        )

    def start(self, *words: str, env: dict | None = None, given: str = "", point: Point | None = None) -> Child:
        def body() -> int:
            modules = harness(self.path)
            os.environ.update({"PATH": PATH, **(env or {})})
            (calls := Calls(self.path, point or Point())).watch(modules)
            exec(f"{self.given}\n{given}", modules)
            status = main()(list(words))
            with contextlib.suppress(OSError), open(self.calls_file, "w") as file:  # the disk may be full
                json.dump(calls.done, file)
            return status

        return Child(self, body)

    def run(self, *words: str, **how) -> subprocess.CompletedProcess:
        return self.start(*words, **how).finish()

    def refused(self, message: str, *words: str, **how) -> None:
        """One line, exit 2, and no experiment left behind."""
        before = self.experiments()
        done = self.run(*words, **how)
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr, done.stdout + done.stderr
        assert done.stderr.startswith("run.sh: ") and done.stderr.count("\n") == 1, done.stderr
        assert self.experiments() == before

    def python(self, code: str) -> str:
        """What Python prints that has the harness's modules at hand, here."""

        def body() -> int:
            exec(code, harness(self.path))
            return 0

        done = Child(self, body).finish()
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def blob(self, name: str) -> bytes:
        return subprocess.run(["git", "cat-file", "blob", name], cwd=self.path, capture_output=True, check=True).stdout

    def containers(self, mark: str = "") -> str:
        return ""


def harness(root: Path) -> dict:
    """The harness's modules, loaded anew with that root; in a child only."""
    for name in list(os.environ):
        if name.startswith(("CLAUDE", "AR_", "GIT_")):
            del os.environ[name]
    for name in MODULES:
        sys.modules.pop(name, None)
    project = importlib.import_module("project")
    project.ROOT, project.RUNS = root, root / "runs"
    modules = {name: importlib.import_module(name) for name in MODULES}
    engine, experiment, measure = (modules[name] for name in ("engine", "experiment", "measure"))
    engine.find_image, engine.gpus, engine.sweep = lambda: "sha256:made-up", lambda: [], lambda background=False: None
    experiment.refresh_report = lambda: None
    modules["record"].STALE_LOCK_S = STALE_LOCK_S
    measure.run = lambda job: measured(measure, job)
    return modules


def main() -> Callable[[list[str]], int]:
    """That of the harness whose modules are loaded."""
    spec = importlib.util.spec_from_file_location("harness_main", HARNESS / "__main__.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.main


def measured(measure, job):
    """A made-up measure.Run of a train.py: the same value every time, and a little more in its second run."""
    source = (job.work / "train.py").read_bytes()
    value = re.search(rb"^VALUE = ([\d.]+)\r?$", source, re.M)
    seconds = re.search(rb"^SECONDS = ([\d.]+)$", source, re.M)
    with job.log.open("a") as log:
        log.write(f"step 1/1\nSEED {job.seed} budget {job.budget} sha256 {hashlib.sha256(source).hexdigest()}\n")
        log.writelines(f"{line}\n" for line in re.findall(r"^# prints (.*)$", source.decode("utf-8", "replace"), re.M))
    if not value:
        reason = f"crash after 1.5 s: {source.decode().strip()[:60]}"
        return measure.Run("failed", job.seed, reason, timing=TIMING)
    for array in ("ranks", "examples"):
        with open(job.work / f"{array}.npy", "w") as file:
            file.write(f"{array} of {job.work.name}, {float(value[1])}")
    run = made_up_run(float(value[1]) * (1 if job.work.name == "run-1" else 1.001), job.seed, measure.Run)
    run.timing["train"] = float(seconds[1]) if seconds else TIMING["train"]
    run.train["cut_short"] = measure.cut_short(job.log)
    return run


def made_up_run(rank: float, seed: int = 7, kind: type = Run) -> Run:
    """kind: measure.Run, as it was loaded."""
    recall = {side: [1.0, 5.0, 10.0 + seed * 1e-12] for side in ("i2t", "t2i")}  # no two seeds give the very same
    metrics = {"mean_rank": rank, "median_rank": rank / 2, "gallery": 200, "random": 100.5, **recall}
    return kind("ok", seed, "", metrics, {"status": "ok", "claims": {}, "device": "cpu"}, dict(TIMING))


class Calls:
    """Counts what a run does to git and to files of its own, and makes something happen at one point of it."""

    def __init__(self, root: Path, point: Point):
        self.root, self.point, self.done = root, point, []

    def watch(self, modules: dict) -> None:
        git, measure = modules["git"], modules["measure"]
        real_call, real_run = git.call, measure.run
        git.call = lambda *args, **how: self.call(f"git {' '.join(args)}", lambda: real_call(*args, **how))
        measure.run = lambda job: self.call(f"measure {job.work.name}", lambda: real_run(job))
        for name in FILE_CALLS:
            setattr(Path, name, self.file_call(name, getattr(Path, name)))

    def file_call(self, name: str, real: Callable) -> Callable:
        def wrapped(file: Path, *args, **how):
            if self.root not in file.absolute().parents:
                return real(file, *args, **how)
            words = f"{name} {file.absolute().relative_to(self.root)}"
            half = (lambda: real(file, args[0][: len(args[0]) // 2])) if name in FILE_WRITES else None
            return self.call(words, lambda: real(file, *args, **how), half)

        return wrapped

    def call(self, words: str, real: Callable, half: Callable | None = None):
        """half: leaves the first half of what is to be written."""
        self.done.append(re.sub(r"[0-9a-f]{40}|(?<=\.)\d+(?=\.new)", "*", words).replace("\n", " "))
        side, at = self.point.side, self.point.at
        if not (at == len(self.done) or isinstance(at, str) and at and at in words):
            return real()
        self.point.at = 0  # once
        if side == "meanwhile":
            subprocess.run(["bash", "-ec", self.point.script], cwd=self.root, check=True, stdout=2)
            return real()
        if side == "before":
            self.die()
        if half and side == "inside":
            half()
            self.die()
        if half and side == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), words)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if side in ("inside", "full"):  # the first byte that git writes to a file ends it, and its locks stay behind
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            result = real()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if side != "full":
            self.die()
        return result

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def writes(call: str) -> bool:
    return call.startswith(FILE_WRITES) or call.startswith("git ") and any(word in call for word in GIT_WRITES)


@dataclass
class Scenario:
    """A run that is killed in many ways."""

    project: Small
    before: Before
    verdict: str
    words: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, project: Small, candidate: str, verdict: str, *words: str) -> Scenario:
        """project: as it is before that run. Makes the run once, in a copy, to know what it calls and measures."""
        head, last = project.git("rev-parse", "HEAD"), project.experiments()[-1]
        incumbent = project.git("show", "HEAD:train.py") + "\n"
        before = Before(head, last, incumbent, candidate, project.read("train.py"))
        dry = project.copy(project.path.with_name(f"{project.path.name}-dry"))
        done = dry.run(*words)
        assert done.returncode == 0 and dry.trailers(f"refs/experiments/{last + 1}")["Verdict"] == verdict, done
        assert consistent(dry, before, recovered=True) == []
        before.values = "" if words else numbers(dry, last + 1)
        calls = tuple(json.loads(dry.calls_file.read_text()))
        shutil.rmtree(dry.path)
        return cls(project, before, verdict, words, calls)

    def points(self) -> list[Point]:
        """Before and after every call; inside those that write, and with no room left for what they write."""
        return [Point(n, side) for n, call in enumerate(self.calls, 1) for side in ("before", "after", "inside", "full")
                if side in ("before", "after") or writes(call)]  # fmt: skip

    def kill(self, point: Point, folder: Path) -> list[str]:
        """What is wrong afterwards, and after two further runs."""
        project = self.project.copy(folder)
        done = project.run(*self.words, point=point)
        wrong = [] if done.returncode == -signal.SIGKILL or point.side == "full" else [f"was not killed: {done}"]
        # where git found the object there already, it had nothing to write
        verdict = block(done.stdout).get("verdict") if not self.words else self.verdict
        if point.side == "full" and not (done.returncode == 2 or (done.returncode, verdict) == (0, self.verdict)):
            wrong.append(f"ended with {done.returncode}: {done.stdout}{done.stderr}")
        if "Traceback" in done.stderr:
            wrong.append(done.stderr)
        try:
            wrong += consistent(project, self.before, recovered=False) + next_run(project, self.before)
        except AssertionError as e:  # the user's own git failed
            wrong.append(f"git: {e}")
        shutil.rmtree(project.path)
        return [f"{point} {self.calls[point.at - 1]}", *wrong] if wrong else []
