"""A long night: ./run.sh night with real experiments that take seconds, and a fault at every second one.

usage: export PYTHONPATH=tests:tests/support:container/harness
       tests/.venv/bin/python tests/long/night.py OUT [N]     N experiments, 200 where nothing is said

Makes OUT/repo, a copy of this repository with small data and a train.py that takes no time, and lets a scripted model
work there through the real client: most ideas are worse, some better, some crash. At seeded random places comes one of
support/faults.py, the client is killed in the middle of a training, or the model is silent until the keeper ends its
client. Appends a row for tests/long/trust.py to OUT/figures.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from conftest import engine_name

from client import CLIENT, Model, Shown, Turn, call, environment, prepare_home, say
from faults import ALL, Silence
from record import JUDGED
from repository import QUICK, ROOT, TINY, Project, block, copy_of_the_repository, git_at

SEED = 4
FAULTS_EVERY = 2  # experiments, in the mean
# Given to the night: shorter waits, in seconds (see given.py)
SHORT = "night.FIRST_WAIT, night.LONGEST_WAIT, night.POLL, night.BARREN = 1, 8, 0.5, 20\n"
HOURS = 6 * 3600  # s until it is given up
START = 120.0  # the noise that an idea raises or lowers
NOISY = QUICK.replace("SIGN = 0", f"SIGN = 1\nNOISE = {START}").replace(
    "rough(images) - self.mean if SIGN",
    "rough(images) - self.mean + NOISE / 100 * torch.randn(len(images), 48, generator=self.chance) if SIGN",
)


class Agent:
    """Follows CLAUDE.md, one idea after the other; `told` has what it was shown of each."""

    def __init__(self, project: Project):
        self.project, self.rng = project, random.Random(SEED)
        self.ideas, self.told, self.faults = 0, {}, Counter()
        self.held, self.wrongs, self.step = Shown(), [], iter(())

    def __call__(self, shown: Shown):
        """The next turn, or a fault in its place: then what was shown is kept for the turn after it."""
        if shown.first and not self.wrongs:
            self.held, self.step = Shown(), self.steps()
        self.held = Shown(self.held.results + shown.results, self.held.texts + shown.texts)
        if not self.wrongs and self.rng.random() < 1 / FAULTS_EVERY / 4:  # an experiment takes four requests
            name = self.rng.choice([*ALL, "killed", "silent"])
            self.faults[name] += 1
            if name == "killed":
                threading.Thread(target=self.kill, args=(self.rng.uniform(0, 8),), daemon=True).start()
            else:
                self.wrongs = list(ALL[name][0]) if name in ALL else [Silence(40)]
        if self.wrongs:
            turn = self.wrongs.pop(0)
            return Turn(list(turn.blocks), why=turn.why) if type(turn) is Turn else turn
        self.shown, self.held = self.held, Shown()
        return next(self.step)

    def steps(self):
        while True:
            yield [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")]
            source = "".join(r.content for r in self.shown.results if r.given.get("file_path") == "train.py")
            found = re.search(r"^\s*\d+\t(NOISE = ([0-9.]+)) *$", source, re.M)
            if not found:
                continue  # the file was not shown
            self.ideas += 1
            better, crash = self.rng.random() < 0.15, self.rng.random() < 0.05
            noise = float(found[2]) * (self.rng.uniform(0.3, 0.6) if better else self.rng.uniform(1.5, 4))
            idea = f"idea {self.ideas}: noise {noise:.3f}" + " / 0" * crash
            yield [
                call(
                    "Edit",
                    file_path="train.py",
                    old_string=found[1],
                    new_string=idea.split(": ")[1].replace("noise", "NOISE ="),
                ),
                call("Write", file_path="scratchpad.md", content=f"## Next experiment\n{idea}\n\n## Notes\n"),
            ]
            yield call("Bash", command="./run.sh")
            for result in self.shown.results:
                if "verdict" in block(result.content):
                    self.told[block(result.content)["hypothesis"]] = block(result.content)["verdict"]
            yield say("noted")

    def kill(self, seconds: float) -> None:
        time.sleep(seconds)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                there = os.readlink(f"/proc/{pid}/cwd") == str(self.project.path)
                if there and b"-p\0start" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
            except OSError:
                continue


def make(folder: Path, count: int) -> Project:
    project = copy_of_the_repository(folder)
    project.write("program.md", re.sub("stop: .*", f"stop: {count} experiments", project.read("program.md")))
    project.write("train.py", NOISY)
    project.git("commit", "-qam", "a quick train.py")
    for words in (("data", "prints", *TINY), ()):
        done = project.run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    return project


def complaints(project: Project, agent: Agent, count: int, status: int) -> list[str]:
    """Every experiment is recorded once, as the model was told it; the kept ones are the branch; nothing is left."""
    numbers = project.experiments()
    rows = [project.trailers(f"refs/experiments/{n}") for n in numbers]
    judged = [r for r in rows if r["Verdict"] in JUDGED]
    ideas = Counter(r["Hypothesis"] for r in judged)
    wrong = [] if status == 0 else [f"the night ended with status {status}"]
    wrong += [f"recorded {n} times: {idea}" for idea, n in ideas.items() if n > 1]
    wrong += [f"{count} experiments were wanted, {len(judged)} are recorded"] * (len(judged) != count)
    wrong += ["a number is missing"] * (numbers != list(range(1, len(numbers) + 1)))
    known = {r["Hypothesis"]: r["Verdict"] for r in judged}
    wrong += [f"told {v}, recorded {known.get(i)}: {i}" for i, v in agent.told.items() if known.get(i) != v]
    kept = [r["Train"] for r in judged if r["Verdict"] == "kept"]
    branch = project.git("log", "--reverse", "--format=%H", "--", "train.py").split()[2:]
    if [project.git("rev-parse", f"{c}:train.py") for c in branch] != kept:
        wrong.append("the branch is not what was kept")
    listed = project.read("runs/experiments.tsv").splitlines()[1:]
    wrong += ["runs/experiments.tsv is not the record"] * ([int(x.split("\t")[0]) for x in listed] != numbers)
    left = [str(f) for f in (project.path / "runs").glob("work*")] + [*(project.path / ".git").rglob("*.lock")]
    left = [f for f in map(str, left) if "autoresearch" not in f] + project.containers().split()
    return wrong + [f"left behind: {left}"] * bool(left)


def main(out: str, count: str = "200") -> int:
    folder, begin = Path(out).resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    project = make(folder / "repo", int(count))
    agent = Agent(project)
    model = Model(agent)
    path = f"{CLIENT.parent}:{os.environ['PATH']}"
    env = environment(
        prepare_home(folder / "home", project.path), model, {"PATH": path, "CLAUDE_CODE_MAX_RETRIES": "1"}
    )
    night = time.monotonic()
    status = subprocess.run(project.command("night", given=SHORT), cwd=project.path, env=env, timeout=HOURS).returncode
    seconds = time.monotonic() - night
    if model.error:
        raise model.error
    model.close()
    wrong = complaints(project, agent, int(count), status)
    state = json.loads(project.read("runs/night.json"))
    verdicts = Counter(project.trailers(f"refs/experiments/{n}")["Verdict"] for n in project.experiments())
    row = {
        "sweep": "a night: experiments, each recorded once",
        "tried": int(count),
        "wrong": len(wrong),
        "engine": engine_name(),
        "seconds": round(time.monotonic() - begin),
        "commit": git_at(ROOT, "describe", "--always", "--dirty"),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "faults": sum(agent.faults.values()),
        "kinds": len(agent.faults),
        "conversations": state["conversations"],
        "kept": verdicts["kept"],
        "failed": verdicts["failed"],
        "seconds an experiment": round(seconds / int(count), 1),
    }
    print(*wrong, json.dumps(dict(agent.faults)), json.dumps(row), sep="\n")
    with (folder / "figures.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
