"""Numbers to publish: ./run.sh audit and ./run.sh final.

    audit [K] [--ablate]   baseline and best, K fresh seeds each, on pairs the loop never used
    final                  the best, trained on training and validation pairs, longer, evaluated once on the test split

They are for people: their records carry no mark of comparability, so that neither the keep rule nor the history that
the agent reads ever sees them, and what they leave is in final/NNNN, which the agent cannot read.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dataset
import engine
import experiment
import git
import locks
import measure
import record
from history import History
from project import ROOT, RUNS, Refused, number, say

FINAL = ROOT / "final"
FINAL_BUDGETS = 4  # budgets that a final training gets when program.md says nothing
AROUND_S = 8  # seconds around a training: start, embedding, judging; for the estimate that is shown
DEFAULT_SEEDS, SEEDS = 3, range(2, 100)
# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is cautious
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)
AUDIT_USAGE = f"usage: ./run.sh audit [K] [--ablate], with K from {SEEDS[0]} to {SEEDS[-1]}"
# How to quote an audit; printed beneath it
CITATION = "quote as: mean ± standard error over K seeds on N unseen pairs (random R), change with its 95 % interval"


@dataclass
class Trainings:
    """Several train.py, trained one after another in the same way (`how`: fields of measure.Job)."""

    work: Path
    history: History
    device: locks.Device
    total: int
    how: dict
    runs: list[dict] = field(default_factory=list)

    def run(self, side: str, source: bytes) -> dict:
        """One training with a fresh seed. Raises Refused when nothing ran."""
        budget = self.how.get("budget", self.history.program.budget)
        activity = f"training {len(self.runs) + 1} of {self.total}, {side}"
        locks.announce(self.history.newest + 1, activity, budget)
        seconds = [run["timing"]["total"] for run in self.runs] or [budget + AROUND_S]
        minutes = (self.total - len(self.runs)) * statistics.mean(seconds) / 60
        say(f"{activity}: {'' if self.runs else 'at most '}{minutes:.0f} min left")
        work = self.work / f"run-{len(self.runs) + 1}"
        job = experiment.job(self.history, work, source, self.device, **self.how)
        self.runs.append({"side": side, **asdict(measure.run(job))})
        return self.runs[-1]

    def values(self, side: str) -> list[float]:
        """The metric of every training of this side. Raises Refused when one failed."""
        runs = [run for run in self.runs if run["side"] == side]
        failed = next((run for run in runs if run["outcome"] != "ok"), None)
        if failed:
            raise Refused(f"the {side} failed, so there is nothing to compare: {failed['reason']}")
        return [run["metrics"][self.history.program.metric] for run in runs]


def audit(*words: str) -> None:
    """Raises Refused."""
    numbers = [word for word in words if word != "--ablate"]
    if len(numbers) > 1 or not all(word.isdigit() and int(word) in SEEDS for word in numbers):
        raise Refused(AUDIT_USAGE)
    seeds = int(numbers[0]) if numbers else DEFAULT_SEEDS
    with published() as (history, work, device):
        result = run_audit(history, work, device, seeds, "--ablate" in words)
        save(history, work, result, show_audit(result["audit"]))


def final() -> None:
    """Raises Refused."""
    with published() as (history, work, device):
        result = run_final(history, work, device)
        save(history, work, result, show_final(result["final"], result["test_evaluation"]))


@contextlib.contextmanager
def published() -> Iterator[tuple[History, Path, locks.Device]]:
    """The locks, and a folder to work in that the agent cannot read."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.worktree())
        try:
            stack.enter_context(locks.held(git.folder() / "autoresearch.audit", wait=False))
        except BlockingIOError:
            raise Refused(
                "an audit or a final runs in another worktree; both draw pairs into the same folder, so wait for it"
            ) from None
        stack.enter_context(experiment.workspace())
        record.finish_interrupted()
        history = History.load(image=engine.find_image())
        if not history.incumbent:
            raise Refused("there is no measured train.py; run ./run.sh first")
        numbers = engine.slots(history.program)
        device = stack.enter_context(locks.device(numbers, lambda: locks.announce(0, "waits for a device", 0)))
        work = FINAL / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o755, parents=True)
        yield history, work, device


def run_audit(history: History, work: Path, device: locks.Device, seeds: int, ablate: bool) -> dict:
    """Baseline and best, and with `ablate` the best without each kept change."""
    baseline = next((r for r in history.compared if r.verdict == "baseline"), None)
    if not baseline or baseline.train == history.incumbent_train:
        raise Refused("the best is still the baseline; there is nothing to audit yet")
    best = git.content(history.incumbent_train)
    kept = [r for r in history.own(history.compared) if r.verdict == "kept" and not r.by_hand] if ablate else []
    reduced = {r.number: without(best, r, work) for r in kept}
    total = seeds * (2 + sum(source is not None for source in reduced.values()))
    trainings = Trainings(work, history, device, total, {"split": draw_pairs(history)})
    values = {}
    for side, source in (("baseline", git.content(baseline.train)), ("best", best)):
        for _ in range(seeds):
            trainings.run(side, source)
        values[side] = trainings.values(side)
    rows = []
    for r in kept:
        measured = ablation(trainings, r.number, reduced[r.number], seeds, values["best"])
        rows.append({"experiment": r.number, "hypothesis": r.hypothesis, **measured})
    found = {
        "metric": history.program.metric,
        "gallery": trainings.runs[0]["metrics"]["gallery"],
        "random": trainings.runs[0]["metrics"]["random"],
        "seeds": seeds,
        "sides": {side: summary(v) for side, v in values.items()},
        "difference": difference(values["baseline"], values["best"]),
        "ablation": rows,
    }
    return result_of("audit", f"audit: baseline against best, {seeds} seeds each", trainings, found, values["best"])


def result_of(verb: str, title: str, trainings: Trainings, found: dict, values: list[float]) -> dict:
    """What experiment/result.json holds; test_evaluation: how often anybody has evaluated on the test split by now."""
    history, split = trainings.history, trainings.how["split"]
    evaluations = sum(r.test_evaluation > 0 for r in history.records) + 1
    return {
        "verdict": verb,
        "hypothesis": title,
        "metric": history.program.metric,
        "values": values,
        "train": history.incumbent_train,
        "split": split,
        "test_evaluation": evaluations if split == "test" else "",
        "when": int(time.time()),
        "runs": trainings.runs,
        verb: {"split": split, **found},
    }


def ablation(trainings: Trainings, n: int, source: bytes | None, seeds: int, best: list[float]) -> dict:
    """What the best loses without one kept change."""
    if source is None:
        return {"not_separable": True}
    side = f"best without {n}"
    runs = [trainings.run(side, source) for _ in range(seeds)]
    failed = next((run["reason"] for run in runs if run["outcome"] != "ok"), None)
    if failed:
        return {"failed": failed}
    values = trainings.values(side)
    return {"values": values, **difference(best, values)}


def without(best: bytes, kept: record.Record, folder: Path) -> bytes | None:
    """The best train.py with one kept change taken out, by a three-way merge; None when it cannot be separated."""
    parent = git.content(f"{record.REFS}{kept.number}^:train.py")
    files = {"best": best, "with": git.content(kept.train), "without": parent}
    for name, source in files.items():
        (folder / name).write_bytes(source)
    command = ["git", "merge-file", "-p", *(str(folder / name) for name in files)]
    merged = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return merged.stdout if merged.returncode == 0 and merged.stdout != best else None


def draw_pairs(history: History) -> str:
    """The split an audit uses: fresh pairs where they can be drawn, otherwise the test split. Raises Refused."""
    if history.program.data != "prints":
        return "test"
    count = sum(r.verdict == "audit" for r in history.records)
    if dataset.prepare("prints", "--add", f"audit={count}"):
        raise Refused("the fresh pairs could not be drawn (see above)")
    return "audit"


def run_final(history: History, work: Path, device: locks.Device) -> dict:
    """Train the best on all but the test pairs, for longer, and evaluate it on the test pairs once."""
    settings = history.program
    joined = (dataset.folder(settings.data) / "trainval").is_dir()
    if not joined and dataset.prepare(settings.data, "--add", "trainval"):
        raise Refused("training and validation pairs could not be joined (see above)")
    budget = settings.final_budget or FINAL_BUDGETS * settings.budget
    how = {"split": "test", "table": "trainval", "budget": budget, "scale": budget / settings.budget}
    trainings = Trainings(work, history, device, 1, how)
    run = trainings.run("final training", git.content(history.incumbent_train))
    values, found = trainings.values("final training"), {"metrics": run["metrics"], "budget": budget}
    return result_of("final", "final: best, trained on training and validation pairs", trainings, found, values)


def save(history: History, work: Path, result: dict, shown: list[str]) -> None:
    """Record, then show, then keep what was made: whoever has seen the numbers finds the evaluation counted."""
    head, verb = git.object_id("HEAD"), result["verdict"]
    (work / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    files = {"experiment/result.json": git.blob_of(work / "result.json")}
    tree = git.tree_with(head, files, RUNS / "index.new")
    n, _ = record.add(history.newest + 1, lambda n: git.commit(tree, head, message(result, n)))
    record.PENDING.unlink(missing_ok=True)  # there is nothing to carry out
    print("\n".join(["---", *shown]))
    for name in ("best", "with", "without"):
        (work / name).unlink(missing_ok=True)
    for file in (*work.glob("run-*/*s.npy"), *(work.glob("run-*/out.tar") if verb == "audit" else ())):
        file.unlink()
    work.rename(FINAL / f"{n:04d}")
    checkpoint = " and the checkpoint (run-1/out.tar)" if verb == "final" else ""
    print(f"record:      experiment {n}; logs{checkpoint} in final/{n:04d}")


def message(result: dict, n: int) -> str:
    trailers = {"Experiment": n, "Verdict": result["verdict"], "Hypothesis": result["hypothesis"]}
    trailers[f"{record.METRICS[result['metric']]}-Runs"] = " ".join(f"{v:.4f}" for v in result["values"])
    trailers.update({"Train": result["train"], "Split": result["split"], "Test-Look": result["test_evaluation"]})
    if "audit" in result:
        d = result["audit"]["difference"]
        trailers["Change"] = f"{d['percent']:+.1f} % (95 %: {d['low']:+.1f} to {d['high']:+.1f})"
    return record.message(result["hypothesis"], trailers)


# Statistics, and how they are shown


def summary(values: list[float]) -> dict:
    return {
        "values": values,
        "mean": statistics.mean(values),
        "se": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0,
    }


def difference(before: list[float], after: list[float]) -> dict:
    """Change in percent with its 95 % interval: Welch's t on log(metric), as ratios; two or more values each."""
    logs = [[math.log(v) for v in values] for values in (before, after)]
    shift = statistics.mean(logs[1]) - statistics.mean(logs[0])
    parts = [statistics.variance(x) / len(x) for x in logs]
    freedom = sum(parts) ** 2 / max(1e-30, sum(p**2 / (len(x) - 1) for p, x in zip(parts, logs)))
    half = t95(freedom) * math.sqrt(sum(parts))
    low, middle, high = (round((math.exp(x) - 1) * 100, 1) for x in (shift - half, shift, shift + half))
    return {"percent": middle, "low": low, "high": high}


def t95(freedom: float) -> float:
    return T95[min(len(T95), max(1, math.floor(freedom))) - 1]


def show_audit(a: dict) -> list[str]:
    pairs = "fresh pairs" if a["split"] == "audit" else "test pairs"
    what = f"{a['metric']}, {a['gallery']} {pairs} (random {a['random']:.1f}), lower is better, {a['seeds']} seeds each"
    lines = [f"audit:       {what}"]
    for side, s in a["sides"].items():
        values = ", ".join(number(v) for v in s["values"])
        lines.append(f"{side + ':':12} {number(s['mean'])} ± {number(s['se'])}   ({values})")
    d = a["difference"]
    lines.append(f"difference:  {d['percent']:+.1f} %   (95 % interval {d['low']:+.1f} to {d['high']:+.1f})")
    for row in a["ablation"]:
        if "percent" in row:
            end = f"{row['percent']:+6.1f} %   ({row['low']:+.1f} to {row['high']:+.1f})"
        else:
            end = f"fails: {row['failed'][:60]}" if "failed" in row else "not separable"
        lines.append(f"without {row['experiment']:>3}  {row['hypothesis'][:50]:50} {end}")
    return [*lines, CITATION]


def show_final(f: dict, evaluations: int) -> list[str]:
    m = f["metrics"]
    recall = "   ".join(f"{side} {' / '.join(f'{x:.1f}' for x in m[side])}" for side in ("i2t", "t2i"))
    where = f"test split, gallery {m['gallery']}, random {m['random']:.1f}, one training of at most {f['budget']} s"
    return [
        f"final:       {where}",
        f"mean_rank:   {number(m['mean_rank'])}   (percentile {m['mean_rank'] / m['gallery'] * 100:.1f})",
        f"median_rank: {number(m['median_rank'])}",
        f"recall:      {recall}   (R@1 / 5 / 10, %)",
        f"evaluation:  {evaluations} of this test split, by anybody; quote it",
    ]
