#!/usr/bin/env python3
"""Numbers to publish: ./run.sh audit and ./run.sh final. Host side, standard library only.

usage: audit.py WORK IMAGE final              train the best on training and validation pairs, longer; judge on test
       audit.py WORK IMAGE audit K [ablate]   baseline and best, K fresh seeds each, on pairs the loop never used

WORK receives result.json, the commit's message, the logs, and for `final` the archive of what training left. These
numbers are for people: the record keeps them without the mark that makes records comparable, so that neither the keep
rule nor the history that the agent reads ever sees them.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / ".claude" / "hooks")]
import engine  # noqa: E402
import experiment  # noqa: E402
import program  # noqa: E402
import record  # noqa: E402
from record import Refused, git, show  # noqa: E402

FINAL_BUDGETS = 4  # budgets that a final training gets when program.md says nothing
AROUND_S = 8  # of a training: start, embedding, judging; for the estimate that is shown
# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is cautious
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


class Trainings:
    """Runs of several train.py, one after another, all in the same way."""

    def __init__(self, work: Path, state: record.State, total: int, **how):
        self.work, self.state, self.total, self.how = work, state, total, how
        self.budget, self.done, self.took = how.pop("budget", state.plan.budget), 0, []

    def one(self, name: str, source: str) -> dict:
        """Train a train.py with a fresh seed and judge it; what experiment.one_run returns."""
        self.done += 1
        self.announce(name)
        work = self.work / f"run-{self.done}"
        work.mkdir(mode=0o755)
        (work / "train.py").write_text(source)
        seed = random.SystemRandom().randrange(1 << 30)
        result = experiment.one_run(
            work,
            self.state.data,
            self.budget,
            self.state.plan.memory,
            seed,
            work / "train.log",
            self.state.image,
            **self.how,
        )
        self.took.append(result["timing"]["total"])
        return {"side": name, **result}

    def announce(self, name: str) -> None:
        """For the status line, and for the person who waits."""
        each = statistics.mean(self.took) if self.took else self.budget + AROUND_S
        left = (self.total - self.done + 1) * each / 60
        now = {
            "pid": os.getppid(),
            "n": self.state.newest + 1,
            "budget": self.budget,
            "what": f"training {self.done} of {self.total}, {name}",
            "started": int(time.time()),
        }
        (record.ROOT / "runs" / "running.json").write_text(json.dumps(now))
        most = "" if self.took else "at most "
        engine.say(f"training {self.done} of {self.total} ({name}), {most}{left:.0f} min left")


def t95(df: float) -> float:
    return T95[min(len(T95), max(1, math.floor(df))) - 1]


def difference(before: list, after: list) -> dict:
    """Change in percent with its 95 % interval: Welch's t on log(metric), as ratios; two or more values each."""
    logs = [[math.log(v) for v in values] for values in (before, after)]
    shift = statistics.mean(logs[1]) - statistics.mean(logs[0])
    parts = [statistics.variance(x) / len(x) for x in logs]
    df = sum(parts) ** 2 / max(1e-30, sum(p**2 / (len(x) - 1) for p, x in zip(parts, logs)))
    half = t95(df) * math.sqrt(sum(parts))
    percent = [(math.exp(x) - 1) * 100 for x in (shift, shift - half, shift + half)]
    return dict(zip(("percent", "low", "high"), (round(p, 1) for p in percent)))


def summary(values: list) -> dict:
    return {
        "values": values,
        "mean": statistics.mean(values),
        "se": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0,
    }


def source_of(blob: str) -> str:
    return git("cat-file", "blob", blob)


def without(best: str, kept: record.Record, folder: Path) -> str | None:
    """The best train.py with one kept change taken out, by a three-way merge; None when it cannot be separated."""
    names = {"best": best, "with": source_of(kept.train), "without": source_of(f"refs/experiments/{kept.n}^:train.py")}
    for name, text in names.items():
        (folder / name).write_text(text)
    merged = subprocess.run(
        ["git", "merge-file", "-p", *(str(folder / name) for name in names)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return merged.stdout if merged.returncode == 0 and merged.stdout != best else None


def values_of(runs: list, metric: str, what: str) -> list:
    """The metric of every run. Raises Refused when one failed."""
    for r in runs:
        if r["outcome"] != "ok":
            raise Refused(f"{what} failed, so there is nothing to compare: {r['reason']}")
    return [r["metrics"][metric] for r in runs]


def baseline_of(state: record.State) -> record.Record:
    first = next((r for r in state.mine if r.verdict == "baseline"), None)
    if not first or not state.incumbent:
        raise Refused("there is no measured baseline; run ./run.sh first")
    if first.train == state.head_blob:
        raise Refused("the best is still the baseline; there is nothing to audit yet")
    return first


def pairs_for(state: record.State) -> str:
    """Which split an audit uses: fresh pairs where they can be drawn, otherwise the test split."""
    name = state.data.name
    if name != "prints":
        return "test"
    number = sum(r.verdict == "audit" for r in state.all)
    if engine.data(str(state.data.parent), name, "--add", f"audit={number}"):
        raise Refused("the fresh pairs could not be drawn (see above)")
    return "audit"


def audit(work: Path, state: record.State, k: int, ablate: bool) -> dict:
    """Baseline and best, and with `ablate` the best without each kept change, k fresh seeds each."""
    first, best, metric = baseline_of(state), source_of(state.head_blob), state.plan.metric
    kept = [r for r in state.own(state.mine) if r.verdict == "kept" and "By-Hand" not in r.trailers] if ablate else []
    cut = {r.n: without(best, r, work) for r in kept}
    total = k * (2 + sum(text is not None for text in cut.values()))
    split = pairs_for(state)
    trainings, runs = Trainings(work, state, total, split=split), []
    sides = {"baseline": source_of(first.train), "best": best}
    values = {}
    for name, source in sides.items():  # both in turn would be fairer to a machine that slows down; steps are fixed
        runs += [trainings.one(name, source) for _ in range(k)]
        values[name] = values_of(runs[-k:], metric, f"the {name}")
    rows = []
    for r in kept:
        row = {"experiment": r.n, "hypothesis": r.hypothesis}
        if cut[r.n] is None:
            rows.append(row | {"not_separable": True})
            continue
        runs += [trainings.one(f"best without {r.n}", cut[r.n]) for _ in range(k)]
        failed = next((x["reason"] for x in runs[-k:] if x["outcome"] != "ok"), None)
        taken = [] if failed else values_of(runs[-k:], metric, "")
        rows.append(row | ({"failed": failed} if failed else {"values": taken, **difference(values["best"], taken)}))
    found = {
        "metric": metric,
        "gallery": runs[0]["metrics"]["gallery"],
        "random": runs[0]["metrics"]["random"],
        "split": split,
        "seeds": k,
        "sides": {name: summary(v) for name, v in values.items()},
        "difference": difference(values["baseline"], values["best"]),
        "ablation": rows,
    }
    return {
        "verdict": "audit",
        "hypothesis": f"audit: baseline against best, {k} seeds each",
        "audit": found,
        "values": values["best"],
        "runs": runs,
    }


def final(work: Path, state: record.State) -> dict:
    """Train the best on all but the test pairs, for longer, and look at the test pairs once."""
    if not state.incumbent:
        raise Refused("there is no measured train.py; run ./run.sh first")
    made = (state.data / "trainval").is_dir()
    if not made and engine.data(str(state.data.parent), state.data.name, "--add", "trainval"):
        raise Refused("training and validation pairs could not be joined (see above)")
    budget = state.plan.final_budget or FINAL_BUDGETS * state.plan.budget
    trainings = Trainings(
        work, state, 1, split="test", table="trainval", budget=budget, scale=budget / state.plan.budget
    )
    run = trainings.one("best, final", source_of(state.head_blob))
    values = values_of([run], state.plan.metric, "the final training")
    return {
        "verdict": "final",
        "hypothesis": "final: best, trained on training and validation pairs",
        "final": {"split": "test", "metrics": run["metrics"], "budget": budget},
        "values": values,
        "runs": [run],
    }


def message(result: dict) -> str:
    """The commit's message. No `Comparable`: see the top of this file."""
    d = result.get("audit", {}).get("difference")
    trailers = {
        "Experiment": 0,
        "Verdict": result["verdict"],
        "Hypothesis": result["hypothesis"],
        record.SERIES[result["metric"]]: " ".join(f"{v:.4f}" for v in result["values"]),
        "Train": result["train"],
        "Split": result["split"],
    }
    if d:
        trailers["Change"] = f"{d['percent']:+.1f} % (95 %: {d['low']:+.1f} to {d['high']:+.1f})"
    if "test_look" in result:
        trailers["Test-Look"] = result["test_look"]
    return result["hypothesis"] + "\n\n" + "".join(f"{k}: {v}\n" for k, v in trailers.items())


def show_audit(a: dict) -> list:
    pairs = "fresh pairs" if a["split"] == "audit" else "test pairs"
    lines = [
        f"audit:       {a['metric']}, {a['gallery']} {pairs} (random {a['random']:.1f}), lower is better, "
        f"{a['seeds']} seeds each"
    ]
    lines += [
        f"{name + ':':12} {show(s['mean'])} ± {show(s['se'])}   ({', '.join(show(v) for v in s['values'])})"
        for name, s in a["sides"].items()
    ]
    d = a["difference"]
    lines.append(f"difference:  {d['percent']:+.1f} %   (95 % interval {d['low']:+.1f} to {d['high']:+.1f})")
    for row in a["ablation"]:
        end = (
            f"{row['percent']:+6.1f} %   ({row['low']:+.1f} to {row['high']:+.1f})"
            if "percent" in row
            else "fails: " + row["failed"][:60]
            if "failed" in row
            else "not separable"
        )
        lines.append(f"without {row['experiment']:>3}  {row['hypothesis'][:50]:50} {end}")
    return lines


def show_final(f: dict, look: int) -> list:
    m = f["metrics"]
    at = {side: " / ".join(f"{x:.1f}" for x in m[side]) for side in ("i2t", "t2i")}
    return [
        f"final:       test split, gallery {m['gallery']}, random {m['random']:.1f}, one training of at most "
        f"{f['budget']} s",
        f"mean_rank:   {show(m['mean_rank'])}   (percentile {m['mean_rank'] / m['gallery'] * 100:.1f})",
        f"median_rank: {show(m['median_rank'])}",
        f"recall:      i2t {at['i2t']}   t2i {at['t2i']}   (R@1 / 5 / 10, %)",
        f"test look:   {look}   (times anybody has looked at this split; quote it)",
    ]


def main(work: str, image: str, kind: str, k: str = "3", ablate: str = "") -> None:
    folder, state = Path(work), record.State(image)
    os.environ["AR_LAUNCH"] = " ".join(state.plan.launch)
    experiment.end_with_the_caller()
    result = final(folder, state) if kind == "final" else audit(folder, state, int(k), bool(ablate))
    result |= {
        "metric": state.plan.metric,
        "train": state.head_blob,
        "when": int(time.time()),
        "split": result[kind]["split"],
    }
    if result["split"] == "test":
        result["test_look"] = sum(bool(r.trailers.get("Test-Look")) for r in state.all) + 1
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "message").write_text(message(result))
    lines = show_audit(result["audit"]) if kind == "audit" else show_final(result["final"], result["test_look"])
    print("\n".join(["---", *lines]))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (engine.EngineError, Refused, program.ProgramError, OSError) as e:
        engine.say(f"run.sh: {e}")
        sys.exit(2)
