"""The tables of the keep rule in tests/README.md: whole searches, and simplifications in a row, simulated.

usage: PYTHONPATH=container/harness:tests/unit:tests/support tests/.venv/bin/python tests/bench/keep_rule_tables.py 4000
"""

from __future__ import annotations

import math
import random
import statistics
import sys

import test_keep_rule as simulator

import keep_rule

RULES = {"any lower number": ("any lower", math.inf), "before": ("ten alone", math.inf), "now": ("ours", 10)}


def searches(count: int) -> None:
    print("| noise | trainings | rule | end | best too good by | sigma / true |\n|---|---|---|---|---|---|")
    for kind in ("4 %", "8 %", "grows"):
        for runs in (50, 150):
            for name, (rule, keep_rule.HALF_LIFE) in RULES.items():
                end, bias, sigma = simulator.results(kind, runs, rule, count)
                found = f"{keep_rule.percent(-end):.1f} % | {100 * bias:.1f} % | {sigma:.2f}"
                print(f"| {kind} | {runs} | {name} | {found} |", flush=True)


def simplifications(count: int) -> None:
    print("| margin | bound to | lost in all (95 % below) | kept | a first one that loses 0, 0.5, 1, 2 sigma is kept |")
    for keep_rule.SAME in (0.25, 0.5, 0.75, 1):
        firsts = [
            statistics.fmean(simulator.first_simplification(random.Random(n), loss) for n in range(10 * count))
            for loss in (0, 0.5, 1, 2)
        ]
        for with_anchor, name in ((False, "the incumbent"), (True, "the anchor too")):
            rng = random.Random(2)
            lost, kept, _ = zip(*(simulator.simplifications(rng, with_anchor) for _ in range(count)))
            shares = ", ".join(f"{100 * share:.0f} %" for share in firsts)
            mean, most = statistics.fmean(lost), sorted(lost)[int(0.95 * count)]
            found = f"{mean:.1f} ({most:.1f}) sigma | {statistics.fmean(kept):.0f}"
            print(f"| {keep_rule.SAME} | {name} | {found} | {shares} |")


if __name__ == "__main__":
    keep_rule.variance = simulator.variance
    searches(int(sys.argv[1]))
    simplifications(300)
