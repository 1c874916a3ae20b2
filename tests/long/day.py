"""A scripted day: the real client, the real engine, real trainings on the built-in prints; only the ideas are a script.

    ./run.sh test --version                      once: makes tests/.venv and tests/.client
    export PYTHONPATH=tests:tests/support:container/harness
    tests/.venv/bin/python tests/long/day.py FOLDER [--steps 150] [--seeds 3]

Makes FOLDER/repo, a copy of this repository with the plan and the data that ship, and lets Claude Code work there from
`start` until the plan's `stop`, with a model that takes one idea after another from the list below (they are those of
program.md). Then come `audit --ablate`, `final` and `report`; where FOLDER/repo exists, only these. Writes day.md and
day.png beside this file. Half the shipped number of steps makes it a short day.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from conftest import engine_name

from changes import PROJECTORS, SOFT_TARGETS
from client import Conversation, Shown, call, say
from repository import ROOT, Project, block, git_at, tracked

HERE = Path(__file__).resolve().parent
HOURS = 6 * 3600  # s until the day is given up
CAST = "    with torch.autocast(a."
DROPOUT = [(CAST, "    a, b = F.dropout(a, 0.1), F.dropout(b, 0.1)\n" + CAST)]
FLOOR = [("0.5 * (1 + math.cos(math.pi * step / steps))", "(0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))")]


def constant(name: str, value: str) -> list:
    """Set a module constant, whatever it is now."""
    return [(re.compile(rf"^{name} = [^#\n]*?(?=\s*(#|$))", re.M), f"{name} = {value}")]


def within(name: str, old: str, new: str) -> list:
    """Change a part of the line of a module constant."""
    return [(re.compile(rf"^{name} = .*$", re.M), lambda line: line.replace(old, new))]


IDEAS: list[tuple[str, list]] = [
    ("learning rate 3e-3", constant("LR", "3e-3")),
    ("learning rate 5e-4", constant("LR", "5e-4")),
    ("relax the logit-scale clamp from 2 to 100", constant("LOGIT_SCALE_MAX", "100.0")),
    ("logit scale starts at 30", constant("LOGIT_SCALE_INIT", "math.log(30)")),
    ("learning rate 2e-3 now that the clamp is gone", constant("LR", "2e-3")),
    ("warm-up of 60 steps", constant("WARMUP", "60")),
    ("second moment over more steps: beta2 0.999", constant("BETAS", "(0.9, 0.999)")),
    ("weight decay 0.02", constant("WEIGHT_DECAY", "0.02")),
    ("loosen gradient clipping to 5", constant("GRAD_CLIP", "5.0")),
    ("batch 96", constant("BATCH", "96")),
    ("expert step off", constant("EXPERT_PROB", "0.0")),
    ("expert step always", constant("EXPERT_PROB", "1.0")),
    ("expert loss at half weight", constant("EXPERT_WEIGHT", "0.5")),
    ("expert loss at double weight", constant("EXPERT_WEIGHT", "2.0")),
    ("mixup with alpha 1", constant("MIX_ALPHA", "1.0")),
    ("equal phrases in a batch are no negatives of each other", SOFT_TARGETS),
    ("wider heatmaps: sigma half the box", constant("HEAT_SIGMA", "1 / 2")),
    ("narrower heatmaps: sigma a fifth of the box", constant("HEAT_SIGMA", "1 / 5")),
    (
        "contrast the expert view with the whole caption",
        [("model.text(data.phrases[region])", "model.text(data.captions[pick])")],
    ),
    ("five heads in the heatmap attention", constant("HEAT_HEADS", "5")),
    ("embedding of 256", constant("EMBED_DIM", "256")),
    ("embedding of 128", constant("EMBED_DIM", "128")),
    ("no causal mask in the text tower", within("TEXT", "CONTEXT}", 'CONTEXT, "no_causal_mask": True}')),
    ("average the image patches instead of a class token", within("VISION", "16}", '16, "pool_type": "avg"}')),
    ("three text layers", within("TEXT", '"layers": 2', '"layers": 3')),
    ("a wider text tower, 128", within("TEXT", '"width": 96', '"width": 128')),
    ("three image layers", within("VISION", '"layers": 4', '"layers": 3')),
    ("heads of 16 in the image tower", within("VISION", '"head_width": 32', '"head_width": 16')),
    ("two-layer projectors", PROJECTORS),
    ("label smoothing 0.1", constant("LABEL_SMOOTHING", "0.1")),
    ("dropout 0.1 on the embeddings", DROPOUT),
    ("cosine down to a tenth instead of zero", FLOOR),
    ("learning rate 7e-4 with what was kept", constant("LR", "7e-4")),
    ("learning rate 1.5e-3 with what was kept", constant("LR", "1.5e-3")),
    ("a fifth more steps", [(re.compile(r"^STEPS = (\d+)", re.M), lambda s: f"STEPS = {int(int(s[8:]) * 1.2)}")]),
    ("weight decay 0.3", constant("WEIGHT_DECAY", "0.3")),
]


def edits(source: str, idea: list) -> list[tuple[str, str]]:
    """Old and new text of every edit; [] when train.py has moved on and the idea does not apply any more."""
    found = []
    for old, new in idea:
        match = old.search(source) if isinstance(old, re.Pattern) else re.search(re.escape(old), source)
        if not match:
            return []
        found.append((match[0], new(match[0]) if callable(new) else new))
    return [] if any(a == b for a, b in found) else found


class Day:
    """A model that follows CLAUDE.md with the ideas above, until they are used up."""

    def __init__(self):
        self.rows: list[dict] = []
        self.step = self.steps()

    def __call__(self, shown: Shown):
        self.shown = shown
        return next(self.step, None) or say("The ideas are used up.")

    def steps(self):
        for name, idea in IDEAS:
            yield [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")]
            text = next(r.content for r in self.shown.results if r.given["file_path"] == "train.py")
            source = "\n".join(re.sub(r"^\s*\d+\t", "", line) for line in text.splitlines())
            changes = edits(source, idea)
            if not changes:
                print(f"     not applicable any more: {name}", flush=True)
                continue
            notes = "\n".join(f"- {r['hypothesis']}: {r['verdict']}" for r in self.rows[-8:])
            pad = f"# Scratchpad\n\n## Next experiment\n{name}\n\n## Notes\n{notes}\n"
            yield [
                *(call("Edit", file_path="train.py", old_string=a, new_string=b) for a, b in changes),
                call("Write", file_path="scratchpad.md", content=pad),
            ]
            assert not any(r.is_error for r in self.shown.results), self.shown.results
            yield call("Bash", command="./run.sh")
            self.rows.append(block(self.shown.results[0].content))
            row = self.rows[-1]
            what = row.get("change") or row.get("reason") or self.shown.results[0].content[-200:]
            print(f"{row.get('experiment', '?'):>4} {row.get('verdict', '?'):<10} {what:<50.50} {name}", flush=True)
            yield say(f"{name}: {row.get('verdict')}.")


def copy(folder: Path, steps: int, stop: int) -> Project:
    """A copy of the repository with the shipped plan; its first commit is the day's baseline."""
    project = Project(folder / "repo")
    for name in tracked():
        (project.path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, project.path / name)
    project.set("STEPS", str(steps))
    project.edit("stop: 100 experiments, 12 hours", f"stop: {stop} experiments", "program.md")
    for words in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "the shipped train.py"]):
        project.git("-c", "user.name=A Researcher", "-c", "user.email=researcher@example.org", *words)
    if (ROOT / "data" / "prints").is_dir():
        shutil.copytree(ROOT / "data" / "prints", project.path / "data" / "prints")
    return project


def person(project: Project, *words: str) -> str:
    """A person's verb, its progress shown and its output returned."""
    print("$ ./run.sh", *words, flush=True)
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run(["./run.sh", *words], cwd=project.path, **quiet)
    print(done.stdout, flush=True)
    assert done.returncode == 0, f"./run.sh {' '.join(words)}: exit {done.returncode}"
    return done.stdout


def write_table(project: Project, said: dict[str, str], options: argparse.Namespace) -> None:
    commit = git_at(ROOT, "rev-parse", "--short", "HEAD")
    table = [line.split("\t") for line in project.read("runs/experiments.tsv").splitlines()]
    last = table[-1][0]
    stamps = [int(project.git("show", "-s", "--format=%ct", f"refs/experiments/{n}")) for n in ("1", last)]
    lines = [
        "# A scripted day",
        "",
        f"`tests/long/day.py` at {commit}, {time.strftime('%Y-%m-%d')}, {engine_name()}, {os.cpu_count()} cores, "
        f"{options.steps} steps a training instead of the shipped number, {(stamps[1] - stamps[0]) / 60:.0f} minutes "
        "from the baseline to the last experiment.",
        "",
        "![progress](day.png)",
        "",
        *("| " + " | ".join(row) + " |" for row in (table[0], ["---"] * len(table[0]), *table[1:])),
    ]
    for words, text in said.items():
        lines += ["", f"`./run.sh {words}`", "", "```", text.strip(), "```"]
    (HERE / "day.md").write_text("\n".join(lines) + "\n")
    shutil.copy2(project.path / "progress.png", HERE / "day.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ideas", type=int, default=len(IDEAS), help="only the first ones (%(default)s)")
    options = parser.parse_args()
    del IDEAS[options.ideas :]
    folder = options.folder.resolve()
    if (folder / "repo").exists():
        project = Project(folder / "repo")
    else:
        project, day = copy(folder, options.steps, len(IDEAS)), Day()
        person(project, "setup")
        talk = Conversation(project.path, folder / "home", day).run("start", timeout=HOURS)
        print(f"{len(day.rows)} experiments, {len(talk.model.requests)} requests to the model", flush=True)
    words = (f"audit {options.seeds} --ablate", "final", "report")
    said = {w: person(project, *w.split()) for w in words}
    write_table(project, {w: said[w] for w in words[:2]}, options)


if __name__ == "__main__":
    main()
