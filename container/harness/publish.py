"""Numbers to publish: ./run.sh audit and ./run.sh final.

    audit [K] [--ablate]   baseline and best, K fresh seeds each, on pairs the loop never used
    final                  the best, trained on training and validation pairs, longer, evaluated once on the test split

They are for people: their records carry no mark of comparability, so that neither the keep rule nor the history that
the agent reads ever sees them, and what they leave is in final/NNNN, which the agent cannot read.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import dataset
import engine
import experiment
import git
import locks
import measure
import record
from display import cut, lines, recall
from history import History
from project import ROOT, Refused, number, read_json, say, write_json
from record import Attempt, Record

FINAL = ROOT / "final"
FINAL_BUDGETS = 4  # budgets that a final training gets when program.md says nothing
FINISHED = "finished.json"  # in a training's folder
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

    history: History
    work: Path
    device: int  # number of its lock
    total: int = 1
    how: dict = field(default_factory=dict)
    runs: list[dict] = field(default_factory=list)  # of all, for result.json

    def run(self, side: str, source: bytes) -> measure.Run:
        """One training with a fresh seed, or what the same audit, which was killed, had of it. Raises Refused."""
        budget = self.how.get("budget", self.history.program.budget)
        activity = f"training {len(self.runs) + 1} of {self.total}, {side}"
        locks.announce(self.history.next_number, activity, budget)
        seconds = [run["timing"]["total"] for run in self.runs] or [budget + AROUND_S]
        minutes = (self.total - len(self.runs)) * statistics.mean(seconds) / 60
        say(f"{activity}: {'' if self.runs else 'at most '}{minutes:.0f} min left")
        folder = self.work / f"run-{len(self.runs) + 1}"
        what = [audits(self.history), self.history.comparable, self.how, self.total, hashlib.sha256(source).hexdigest()]
        finished = read_json(folder / FINISHED, {})
        if finished.get("what") == what:
            run = measure.Run(**finished["run"])
        else:
            shutil.rmtree(folder if self.runs else self.work, ignore_errors=True)  # of another audit
            run = measure.run(experiment.job(self.history, folder, source, self.device, **self.how))
        if run.outcome == "lost":
            raise Refused(f"{side}: {run.reason.rpartition(':')[0]}; the same command again goes on from here")
        if run.outcome == "ok":
            write_json(folder / FINISHED, {"what": what, "run": asdict(run)})
        self.runs.append({"side": side, **asdict(run)})
        return run

    def side(self, name: str, source: bytes, seeds: int) -> Attempt:
        """So many trainings of one train.py."""
        made = Attempt(metric=self.history.program.metric, runs=[self.run(name, source) for _ in range(seeds)])
        if short := made.cut_short():
            say(f"run.sh: warning: {name}: {short}")
        return made

    def needed(self, name: str, train: str, seeds: int) -> Attempt:
        """Likewise, of a train.py that git has. Raises Refused when one failed."""
        side = self.side(name, git.content(train), seeds)
        if failure := side.failure():
            raise Refused(f"the {name} failed, so there is nothing to compare: {failure}")
        return side


def audit(*words: str) -> None:
    """Raises Refused."""
    numbers = [word for word in words if word != "--ablate"]
    if len(numbers) > 1 or not all(word.isdecimal() and int(word) in SEEDS for word in numbers):
        raise Refused(AUDIT_USAGE)
    seeds = int(numbers[0]) if numbers else DEFAULT_SEEDS
    with prepared() as trainings:
        save(trainings, *run_audit(trainings, seeds, "--ablate" in words))


def final() -> None:
    """Raises Refused."""
    with prepared() as trainings:
        save(trainings, *run_final(trainings))


@contextlib.contextmanager
def prepared() -> Iterator[Trainings]:
    """With the locks, and with a folder to work in that the agent cannot read. Raises Refused."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(experiment.workspace())
        try:
            stack.enter_context(locks.held(git.folder() / "autoresearch.audit"))
        except BlockingIOError:
            both = "both draw pairs into the same folder, so wait for it"
            raise Refused(f"an audit or a final runs in another worktree; {both}") from None
        history = History.load(image=engine.find_image())
        if not history.incumbent:
            raise Refused("there is no measured train.py; run ./run.sh first")
        device = stack.enter_context(experiment.device_for(history))
        yield Trainings(history, FINAL / "work", device)


def run_audit(trainings: Trainings, seeds: int, ablate: bool) -> tuple[Attempt, dict]:
    """Baseline and best, and with `ablate` the best without each kept change; returns what publication() does."""
    history = trainings.history
    first = next((r for r in history.compared if r.verdict == "baseline"), None)
    if not first or first.train == history.incumbent_train:
        raise Refused("the best is still the baseline; there is nothing to audit yet")
    source = git.content(history.incumbent_train)
    kept = [r for r in history.own(history.compared) if r.verdict == "kept" and not r.by_hand] if ablate else []
    reduced = {r.number: without(source, r) for r in kept}
    trainings.total = seeds * (2 + sum(source is not None for source in reduced.values()))
    trainings.how = {"split": draw_pairs(history)}
    baseline = trainings.needed("baseline", first.train, seeds)
    best = trainings.needed("best", history.incumbent_train, seeds)
    change, judged = difference(baseline.values(), best.values()), best.runs[0].metrics
    found = {"metric": best.metric, "seeds": seeds, "gallery": judged["gallery"], "random": judged["random"]}
    found["sides"] = {"baseline": summary(baseline.values()), "best": summary(best.values())}
    found["difference"] = change
    found["ablation"] = [ablation(trainings, r, reduced[r.number], seeds, best) for r in kept]
    best.change = f"{change['percent']:+.1f} % (95 %: {change['low']:+.1f} to {change['high']:+.1f})"
    return publication("audit", f"audit: baseline against best, {seeds} seeds each", trainings, best, found)


def ablation(trainings: Trainings, kept: Record, source: bytes | None, seeds: int, best: Attempt) -> dict:
    """What the best loses without one kept change."""
    row = {"experiment": kept.number, "hypothesis": kept.hypothesis}
    if source is None:
        return {**row, "not_separable": True}
    side = trainings.side(f"best without {kept.number}", source, seeds)
    if side.failure():
        return {**row, "failed": side.failure()}
    return {**row, "values": side.values(), **difference(best.values(), side.values())}


def publication(verb: str, title: str, trainings: Trainings, best: Attempt, found: dict) -> tuple[Attempt, dict]:
    """What is recorded of the best, and what else its result.json holds."""
    history, split = trainings.history, trainings.how["split"]
    told = replace(best, kind=verb, verdict=verb, hypothesis=title, train=history.incumbent_train, split=split)
    told.experiment, told.when = history.next_number, int(time.time())
    if split == "test":
        told.test_evaluation = 1 + sum(r.test_evaluation > 0 for r in history.records)
    return told, {"values": best.values(), "runs": trainings.runs, verb: {"split": split, **found}}


def without(best: bytes, kept: Record) -> bytes | None:
    """The best train.py with one kept change taken out, by a three-way merge; None when it cannot be separated."""
    sources = (best, git.content(kept.train), git.content(f"{record.REFS}{kept.number}^:train.py"))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("best", "with", "without")]
        for file, source in zip(files, sources):
            file.write_bytes(source)
        merged = git.call("merge-file", "-p", *map(str, files))
    return merged.stdout if merged.returncode == 0 and merged.stdout != best else None


def audits(history: History) -> int:
    """How many there were. Each draws pairs of its own by it."""
    return sum(r.verdict == "audit" for r in history.records)


def draw_pairs(history: History) -> str:
    """The split an audit uses: fresh pairs where they can be drawn, otherwise the test split. Raises Refused."""
    if history.program.data != "prints":
        return "test"
    if dataset.prepare("prints", "--add", f"audit={audits(history)}"):
        raise Refused("the fresh pairs could not be drawn (see above)")
    return "audit"


def run_final(trainings: Trainings) -> tuple[Attempt, dict]:
    """Train the best on all but the test pairs, for longer, and evaluate it on the test pairs once."""
    settings = trainings.history.program
    joined = (git.data_folder(settings.data) / "trainval").is_dir()
    if not joined and dataset.prepare(settings.data, "--add", "trainval"):
        raise Refused("training and validation pairs could not be joined (see above)")
    budget = settings.final_budget or FINAL_BUDGETS * settings.budget
    trainings.how = {"split": "test", "table": "trainval", "budget": budget, "scale": budget / settings.budget}
    best = trainings.needed("final training", trainings.history.incumbent_train, 1)
    found = {"metrics": best.runs[0].metrics, "fit": best.runs[0].fit, "budget": budget}
    return publication("final", "final: best, trained on training and validation pairs", trainings, best, found)


def save(trainings: Trainings, attempt: Attempt, more: dict) -> None:
    """Record, then show, then keep what is left: whoever has seen the numbers finds the evaluation counted."""
    record.add(attempt, trainings.history.head, {}, **more)
    record.carry_out(attempt.experiment)
    is_audit = attempt.verdict == "audit"
    shown = show_audit(more["audit"]) if is_audit else show_final(more["final"], attempt.test_evaluation)
    print("\n".join(["---", *shown]))
    work, folder = trainings.work, FINAL / f"{attempt.experiment:04d}"
    (work / "result.json").write_bytes(attempt.json(**more))
    checkpoint = "" if is_audit else " and the checkpoint (run-1/out.tar)"
    for file in (*work.glob("run-*/*.npy"), *(work.glob("run-*/out.tar") if is_audit else ())):
        file.unlink()
    work.rename(folder)
    if not is_audit:
        git.lock(ROOT, f"the checkpoint in {folder.relative_to(ROOT)}")
    print(f"record:      experiment {attempt.experiment}; logs{checkpoint} in {folder.relative_to(ROOT)}")


# Statistics, and how they are shown


def summary(values: list[float]) -> dict:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"values": values, "mean": statistics.mean(values), "se": error}


def difference(before: list[float], after: list[float]) -> dict:
    """Change in percent with its 95 % interval: Welch's t on log(metric), as ratios; two or more values each."""
    logs = [[math.log(v) for v in values] for values in (before, after)]
    shift = statistics.mean(logs[1]) - statistics.mean(logs[0])
    parts = [statistics.variance(x) / len(x) for x in logs]
    freedom = sum(parts) ** 2 / max(1e-30, sum(p**2 / (len(x) - 1) for p, x in zip(parts, logs)))
    half = T95[min(len(T95), max(1, math.floor(freedom))) - 1] * math.sqrt(sum(parts))
    low, middle, high = (round((math.exp(x) - 1) * 100, 1) for x in (shift - half, shift, shift + half))
    return {"percent": middle, "low": low, "high": high}


def show_audit(a: dict) -> list[str]:
    pairs, d = "fresh pairs" if a["split"] == "audit" else "test pairs", a["difference"]
    what = f"{a['metric']}, {a['gallery']} {pairs} (random {a['random']:.1f}), lower is better, {a['seeds']} seeds each"
    rows = [("audit", what)]
    for side, s in a["sides"].items():
        rows.append((side, f"{number(s['mean'])} ± {number(s['se'])}   ({', '.join(map(number, s['values']))})"))
    rows.append(("difference", f"{d['percent']:+.1f} %   (95 % interval {d['low']:+.1f} to {d['high']:+.1f})"))
    ablation = []
    for row in a["ablation"]:
        if "percent" in row:
            end = f"{row['percent']:+6.1f} %   ({row['low']:+.1f} to {row['high']:+.1f})"
        else:
            end = f"fails: {row['failed'][:60]}" if "failed" in row else "not separable"
        ablation.append(f"without {row['experiment']:>3}  {cut(row['hypothesis'], 50):50} {end}")
    return [*lines(rows, width=12), *ablation, CITATION]


def show_final(f: dict, evaluations: int) -> list[str]:
    m, fit = f["metrics"], f["fit"]
    size = f"gallery {m['gallery']}, random {m['random']:.1f}"
    rows = [
        ("final", f"test split, {size}, one training of at most {f['budget']} s"),
        ("mean_rank", f"{number(m['mean_rank'])}   (percentile {m['mean_rank'] / m['gallery'] * 100:.1f})"),
        ("median_rank", number(m["median_rank"])),
        ("fit", f"mean_rank {number(fit['mean_rank'])}, by {fit['gallery']} training pairs" if fit else ""),
        ("recall", recall([m])),
        ("evaluation", f"{evaluations} of this test split, by anybody; quote it"),
    ]
    return lines(rows, width=12)
