"""Throw-away copies of this repository with tiny data, for tests with the real engine, git, client and trainings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import engine as engine_module

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--train", "600", "--val", "200", "--test", "100")
STEPS = 30  # of a test's training: about 3 s on two quiet cores
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # as run.sh sets it
PROGRAM = """# Program

## Settings
data: prints
budget: 120
memory: 3 GB
stop: 100 experiments

## Phase 1 — first
until: 40 experiments

## Phase 2 — second
"""
# A train.py that takes no time: guesses drawn with SEED, or words fitted to rough pixels, far better than chance or,
# with the sign turned, far worse.
QUICK = '''"""A train.py that takes no time."""
import os
import zlib
import datasets
import numpy as np
import torch

SIGN = 0


class Model:
    def __init__(self, weights, mean, seed):
        self.weights, self.mean, self.chance = weights, mean, torch.Generator().manual_seed(seed)

    def encode_image(self, images):
        return rough(images) - self.mean if SIGN else torch.randn(len(images), 16, generator=self.chance)

    def encode_text(self, captions):
        return SIGN * words(captions) @ self.weights if SIGN else torch.randn(len(captions), 16, generator=self.chance)


def rough(images):
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def words(captions):
    out = torch.zeros(len(captions), 256)
    for row, caption in zip(out, captions):
        for word in caption.lower().split():
            row[zlib.crc32(word.encode()) % 256] = 1
    return out


def load(out, device):
    return Model(*torch.load(f"{out}/model.pt"))


if __name__ == "__main__":
    table = datasets.load_from_disk("/data").with_format("numpy")
    pixels = torch.from_numpy(np.stack(table["image"])).reshape(len(table), 3, 96, 96)
    x, y = words(table["caption"]), rough(pixels)
    weights = torch.linalg.solve(x.T @ x + 5 * torch.eye(256), x.T @ (y - y.mean(0)))
    torch.save([weights, y.mean(0), int(os.environ["SEED"])], "/out/model.pt")
'''
CANDIDATES = {
    "kept": QUICK.replace("SIGN = 0", "SIGN = 1"),
    "discarded": QUICK.replace("SIGN = 0", "SIGN = -1"),
}
CRASH = "raise SystemExit('the next run')\n"


class Project:
    """A copy of the repository; every method works on its folder alone."""

    def __init__(self, path: Path):
        self.path = path
        self.given = ""  # Python that replaces parts of the harness in every run here: see given.py

    def copy(self, path: Path) -> Project:
        """Another one there. Data files are hard links: they are only read."""
        shutil.copytree(self.path, path, symlinks=True, ignore=shutil.ignore_patterns("data"))
        shutil.copytree(self.path / "data", path / "data", copy_function=os.link)
        made = Project(path)
        made.given = self.given
        return made

    def command(self, *words: str, given: str = "") -> list[str]:
        """./run.sh as a person would type it; where parts are given, what run.sh starts, with these parts."""
        script = "\n".join(filter(None, [self.given, given]))
        if not script:
            return ["./run.sh", *words]
        stand_in = str(ROOT / "tests" / "support" / "given.py")
        return ["python3", "-I", "-B", stand_in, str(self.path / "container" / "harness"), script, *words]

    def environment(self, env: dict | None = None, given: str = "") -> dict:
        """The caller's without the client's variables; where run.sh is not there to do it, with its PATH."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CLAUDE", "AR_"))}
        return {**clean, **({"PATH": PATH} if self.given or given else {}), **(env or {})}

    def run(self, *words: str, env: dict | None = None, timeout: int = 600, given: str = "", **how):
        """The finished process of ./run.sh WORDS, with its output."""
        return subprocess.run(
            self.command(*words, given=given),
            cwd=self.path,
            env=self.environment(env, given),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **how,
        )

    def start(self, *words: str, env: dict | None = None, given: str = "", **how) -> subprocess.Popen:
        """The same, in the background."""
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        command, environment = self.command(*words, given=given), self.environment(env, given)
        return subprocess.Popen(command, cwd=self.path, env=environment, stdin=subprocess.DEVNULL, **how)

    def git(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(["git", *args], cwd=self.path, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def edit(self, old: str, new: str, name: str = "train.py") -> None:
        """Of files that users edit: train.py, program.md and the like, never of the product's source."""
        text = self.read(name)
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        self.write(name, text.replace(old, new))

    def set(self, constant: str, value: str) -> None:
        """Change a module constant of train.py."""
        text, n = re.subn(rf"^{constant} = .*$", f"{constant} = {value}", self.read("train.py"), flags=re.M)
        assert n == 1, constant
        self.write("train.py", text)

    def hypothesis(self, text: str) -> None:
        pad = self.read("scratchpad.md")
        pad = re.sub(r"(## Next experiment\n).*?(?=\n## |\Z)", rf"\g<1>{text}\n", pad, flags=re.S)
        self.write("scratchpad.md", pad)

    def experiment(self, hypothesis: str, **how) -> tuple[subprocess.CompletedProcess, dict]:
        """Write the hypothesis, run, return the process and the result block as a dict."""
        self.hypothesis(hypothesis)
        done = self.run(**how)
        return done, block(done.stdout)

    def trailers(self, ref: str) -> dict:
        lines = self.git("show", "-s", "--format=%(trailers)", ref).splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def experiments(self) -> list[int]:
        listed = self.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/experiments")
        return sorted(int(n) for n in listed.split())

    def containers(self, mark: str = "", which: str = "-aq") -> str:
        """Ids of the containers of this worktree; mark: as engine.label makes it; which: "-q" for running ones only."""
        code = "import sys; sys.path.insert(0, sys.argv[1]); import engine; print(engine.label())"
        command = [sys.executable, "-I", "-B", "-c", code, str(self.path / "container" / "harness")]
        label = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        listed = [*engine_module.client(), "ps", which, "--filter", f"label={label}{mark}"]
        return subprocess.run(listed, capture_output=True, text=True).stdout


def block(text: str) -> dict:
    """The last result block in run.sh's output."""
    lines = re.split(r"^---$", text, flags=re.M)[-1].splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines if not line.startswith("|"))}


def git_at(folder: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True).stdout.strip()


def tracked() -> list[str]:
    """The files that git would carry."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [name for name in out.stdout.split("\0") if name and (ROOT / name).is_file()]


def product_code() -> dict[str, int]:
    """Lines of every file of product code: all that is not tests, prose, JSON, requirements, pictures."""
    no_code = (".md", ".json", ".txt", ".png")
    names = [f for f in tracked() if not f.startswith(("tests/", ".ci/", ".git")) and not f.endswith(no_code)]
    return {f: len((ROOT / f).read_text().splitlines()) for f in names if f != "LICENSE"}


def copy_of_the_repository(path: Path) -> Project:
    """The files that git would carry, committed as one commit, with a short training and a short plan."""
    path.mkdir(parents=True)
    for name in tracked():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, path / name)
    project = Project(path)
    project.set("STEPS", str(STEPS))
    project.write("program.md", PROGRAM)
    project.git("init", "-q", "-b", "main")
    project.git("config", "user.name", "A Researcher")
    project.git("config", "user.email", "researcher@example.org")
    project.git("add", "-A")
    project.git("commit", "-qm", "start")
    return project


def without_open_clip(folder: Path) -> str:
    """To be given: an empty open_clip in the sandboxes, which takes half of the time that they need to start."""
    image, find = engine_module.find_image(), "import importlib.util as u; print(u.find_spec('open_clip').origin)"
    command = [*engine_module.client(), "run", "--rm", *engine_module.ulimits(), image, "python", "-c", find]
    origin = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (empty := folder / "empty.py").write_text("")
    return f"""
real = measure.stage_mounts
measure.stage_mounts = lambda job: {{**real(job), {origin!r}: measure.Path({str(empty)!r})}}
"""


def quick(path: Path, measured: Project) -> Project:
    """A copy of `measured` whose incumbent is QUICK, measured anew, with work of the user's own under way."""
    project = measured.copy(path)
    project.given = without_open_clip(path.parent)
    project.write("train.py", QUICK)
    project.git("commit", "-qam", "a quick train.py")
    done = project.run()
    assert block(done.stdout)["verdict"] == "baseline", done.stdout + done.stderr
    project.write("notes.txt", "mine")
    project.write("LICENSE", project.read("LICENSE") + "staged\n")
    project.git("add", "LICENSE")
    return project
