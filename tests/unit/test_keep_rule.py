"""The keep rule: its edges, its estimate of the noise, and what it does to a whole search (about half the bias)."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from keep_rule import MAX_INCUMBENT_RUNS, REMEASURE_AFTER, decide, gain, geometric_mean, percent, pooled_sigma

NOISE = 0.03  # standard deviation of log(metric) of one run, in the simulation
SEARCHES, RUNS = 1500, 150


def times(sigmas: float, s: float = 0.04, base: float = 100.0) -> float:
    """A metric that is better than base by so many sigmas."""
    return base * math.exp(-sigmas * s)


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        ([-5.0], "discarded"),
        ([0.0], "discarded"),
        ([0.24], "discarded"),
        ([0.26], "again"),
        ([1.99], "again"),
        ([2.01], "kept"),
        ([9.0], "kept"),
        ([1.0, -0.6], "discarded"),
        ([1.0, -0.4], "kept"),
        ([0.3, 5.0], "kept"),
    ],
)
def test_the_edges_of_the_rule(candidate: list[float], verdict: str):
    assert decide([times(c) for c in candidate], [times(0.0)], 0.04, 2.0) == verdict


def test_the_incumbent_is_the_mean_of_all_its_runs():
    assert decide([times(0.3)], [times(0.0), times(1.0)], 0.04, 2.0) == "discarded"
    assert decide([times(0.3)], [times(0.0), times(-1.0)], 0.04, 2.0) == "again"


def test_confirm_below_zero_is_the_simple_rule():
    assert decide([times(0.26)], [times(0.0)], 0.04, 0.0) == "kept"


def test_a_gain_is_relative():
    assert geometric_mean([50.0, 200.0]) == pytest.approx(100)
    assert gain([80.0], [100.0]) == pytest.approx(math.log(1.25)) == -gain([100.0], [80.0])
    assert percent(gain([80.0], [100.0])) == pytest.approx(-20) and percent(gain([125.0], [100.0])) == pytest.approx(25)


def test_sigma_starts_at_the_prior_and_follows_the_data():
    assert pooled_sigma([]) == pooled_sigma([[100.0], [90.0]]) == 0.04
    assert pooled_sigma([[100.0, 100.0]]) == pytest.approx(math.sqrt(2 * 0.04**2 / 3))
    rng = random.Random(0)
    runs = [[100 * math.exp(rng.gauss(0, 0.1)) for _ in range(2)] for _ in range(500)]
    assert pooled_sigma(runs) == pytest.approx(0.1, rel=0.1)


def test_a_candidate_that_diverged_does_not_end_all_keeping():
    assert pooled_sigma([[100.0, 4000.0]]) < 0.11


def search(rng: random.Random, keep, runs: int, remeasure: bool) -> tuple[float, float]:
    """One search of so many trainings: (true change of log(metric), how much too good the reported best is).

    One large bug fix, then a success rate that falls; most ideas do nothing or hurt.
    """
    true, spent, row = 0.0, 2, 0
    incumbent = [rng.gauss(0, NOISE) for _ in range(2)]
    while spent < runs:
        chance = 0.3 * math.exp(-spent / 50) + 0.03
        effect = (
            -0.3 if spent == 12 else -rng.expovariate(1 / 0.04) if rng.random() < chance else rng.expovariate(1 / 0.05)
        )
        seen = []
        for _ in range(2):
            seen.append(true + effect + rng.gauss(0, NOISE))
            spent += 1
            verdict = keep(seen, incumbent)
            if verdict != "again":
                break
        row = 0 if verdict == "kept" else row + 1
        if verdict == "kept":
            true, incumbent = true + effect, seen
        elif remeasure and row % REMEASURE_AFTER == 0 and len(incumbent) < MAX_INCUMBENT_RUNS:
            incumbent = [*incumbent, true + rng.gauss(0, NOISE)]
            spent += 1
    return true, true - statistics.fmean(incumbent)


def test_about_half_the_bias_of_any_lower_number():
    def ours(seen, incumbent):
        return decide([100 * math.exp(x) for x in seen], [100 * math.exp(x) for x in incumbent], NOISE, 2.0)

    def any_lower(seen, incumbent):
        return "kept" if seen[0] < statistics.fmean(incumbent) else "discarded"

    results = {}
    for name, keep in (("ours", ours), ("any lower", any_lower)):
        rng = random.Random(1)
        outcomes = [search(rng, keep, RUNS, name == "ours") for _ in range(SEARCHES)]
        results[name] = [statistics.fmean(x) for x in zip(*outcomes)]
    bias, bias_of_any = results["ours"][1], results["any lower"][1]
    assert 0 < bias < 0.6 * bias_of_any, results
    assert results["ours"][0] < 0.9 * results["any lower"][0], results  # and it finds at least nine tenths as much
