"""The keep rule: its edges, its estimate of the noise, and what it does to a whole search (about half the bias)."""

from __future__ import annotations

import math
import random
import statistics

import pytest

import keep_rule
from keep_rule import (
    HALF_LIFE,
    MARGIN,
    MAX_INCUMBENT_RUNS,
    REMEASURE_AFTER,
    REMEASURE_SINGLE_AFTER,
    decide,
    gain,
    geometric_mean,
    percent,
    pooled_sigma,
)


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
    prior = 2 * 0.5 ** (1 / HALF_LIFE)  # in runs
    assert pooled_sigma([[100.0, 100.0]]) == pytest.approx(math.sqrt(prior * 0.04**2 / (prior + 1)))
    found = [pooled_sigma(pairs(0.1, 60, seed)) for seed in range(50)]
    assert statistics.fmean(found) == pytest.approx(0.1, rel=0.1)


def pairs(s: float, count: int, seed: int = 0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[100 * math.exp(rng.gauss(0, s)) for _ in range(2)] for _ in range(count)]


def test_sigma_forgets_what_was_long_ago():
    """Noise grows as the metric falls: the baseline's two quiet runs must not count for ever."""
    assert (
        pooled_sigma([*pairs(0.01, 10), *pairs(0.1, 30)])
        > 0.08
        > 0.06
        > pooled_sigma([*pairs(0.1, 10), *pairs(0.01, 30)])
    )


def test_a_simplification_that_loses_nothing_is_kept_after_two_runs():
    def kept(*candidate: float, incumbent: float = 0.0, anchor: float = 0.0) -> str:
        return decide([times(c) for c in candidate], [times(incumbent)], 0.04, 2.0, [times(anchor)])

    assert kept(0.0) == kept(0.24) == kept(-2.4) == kept(1.0) == "again"
    assert kept(-2.6) == "discarded" and kept(2.1) == "kept"  # as any other would be
    assert kept(0.1, -0.1) == kept(-2.0, 1.1) == "kept" and kept(-0.6, -0.5) == "discarded"
    assert kept(-0.1, -0.1, anchor=0.5) == "discarded"  # one of many that each lose a little
    assert kept(-0.1, -0.1, incumbent=0.5) == "discarded" and kept(-0.6, -0.5, incumbent=-0.7, anchor=-0.7) == "kept"


def test_a_candidate_that_diverged_does_not_end_all_keeping():
    assert pooled_sigma([[100.0, 4000.0]]) < 0.11


def noise(rng: random.Random, kind: str, true: float) -> float:
    """Of log(metric): 4 %; 8 % with stragglers; or growing from 2 to 12 % as the metric falls."""
    straggler = rng.expovariate(1 / 0.3) if kind == "8 %" and rng.random() < 0.08 else 0
    return rng.gauss(0, sigma_of(kind, true)) + straggler


def sigma_of(kind: str, true: float) -> float:
    return {"4 %": 0.04, "8 %": 0.08}.get(kind) or 0.02 + 0.1 * min(1, max(0, -true / 2))


def idea(rng: random.Random, kind: str, n: int) -> float:
    """The true effect of the nth idea: one large bug fix, then a success rate that falls; most do nothing or hurt."""
    if n == 10:
        return -0.3
    gains = rng.random() < 0.3 * math.exp(-n / 40) + 0.03
    return -rng.expovariate(1 / 0.04) * (3 if kind == "grows" else 1) if gains else rng.expovariate(1 / 0.05)


def search(rng: random.Random, kind: str, runs: int, rule: str) -> tuple[float, float, float]:
    """One search of so many trainings: (true change of log(metric), how much too good the best is, sigma / true)."""
    true, spent, row, ideas = 0.0, 2, 0, 0
    incumbent = [noise(rng, kind, 0) for _ in range(2)]
    groups = [incumbent]  # of those that ran more than once
    sigma = in_logs(groups)
    while spent < runs:
        ideas += 1
        candidate, seen, verdict = true + idea(rng, kind, ideas), [], "again"
        while verdict == "again":
            seen.append(candidate + noise(rng, kind, candidate))
            spent += 1
            gained = statistics.fmean(incumbent) - statistics.fmean(seen)
            any_lower = "kept" if gained > 0 else "discarded"
            verdict = any_lower if rule == "any lower" else decided(gained / sigma, len(seen))
        groups += [seen] * (len(seen) > 1)
        row = 0 if verdict == "kept" else row + 1
        if verdict == "kept":
            true, incumbent = candidate, seen
        elif rule != "any lower" and len(incumbent) < MAX_INCUMBENT_RUNS and due(row, incumbent, rule):
            groups += [incumbent] * (len(incumbent) == 1)
            incumbent.append(true + noise(rng, kind, true))
            spent += 1
        sigma = in_logs(groups) if len(seen) + len(incumbent) > 2 else sigma
    return true, true - statistics.fmean(incumbent), sigma / sigma_of(kind, true)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The variance of statistics takes thirty times as long, for it is exact."""
    monkeypatch.setattr(keep_rule, "variance", variance)


def variance(values) -> float:
    values = list(values)
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1)


def in_logs(groups: list[list[float]]) -> float:
    return pooled_sigma([math.exp(x) for x in group] for group in groups)


def decided(sigmas: float, runs: int) -> str:
    return decide([math.exp(-sigmas)] * runs, [1.0], 1.0, 2.0)


def due(row: int, incumbent: list[float], rule: str) -> bool:
    single = len(incumbent) == 1 and row == REMEASURE_SINGLE_AFTER and rule == "ours"
    return row % REMEASURE_AFTER == 0 or single


def results(kind: str, runs: int, rule: str, searches: int = 1000) -> list[float]:
    rng = random.Random(1)
    return [statistics.fmean(x) for x in zip(*(search(rng, kind, runs, rule) for _ in range(searches)))]


def test_about_half_the_bias_of_any_lower_number():
    (ours, bias, sigma), (any_lower, bias_of_any, _) = (results("4 %", 150, rule) for rule in ("ours", "any lower"))
    assert 0 < bias < 0.6 * bias_of_any
    assert ours < 0.9 * any_lower  # and it finds at least nine tenths as much
    assert 0.9 < sigma < 1.3


def test_a_second_run_of_the_incumbent_makes_the_best_less_too_good_and_sigma_truer():
    """Where it matters most: the noise grows, and the search is short. tests/README.md has the whole table."""
    (now, bias, sigma), (before, bias_before, _) = (results("grows", 50, rule) for rule in ("ours", "ten alone"))
    assert bias < bias_before - 0.005 and now < before + 0.03
    assert 0.75 < sigma < 1.1


def simplifications(rng: random.Random, with_anchor: bool, keeps: int = 100, tries: int = 300) -> tuple[float, ...]:
    """(true loss in sigmas after so many keeps, or tries; how many were kept; of those that lose nothing, the share).

    Half of them lose nothing, the others half a sigma on average; the first incumbent was lucky by half a sigma.
    """
    anchor = incumbent = [math.exp(rng.gauss(-0.5, 1)) for _ in range(2)]
    lost, kept, honest, honest_kept = 0.0, 0, 0, 0
    for _ in range(tries):
        effect = 0.0 if rng.random() < 0.5 else rng.expovariate(2)
        seen, verdict = [], "again"
        while verdict == "again":
            seen.append(math.exp(lost + effect + rng.gauss(0, 1)))
            verdict = decide(seen, incumbent, 1.0, 2.0, anchor if with_anchor else incumbent)
        honest += effect == 0
        if verdict == "kept":
            lost, incumbent, kept, honest_kept = lost + effect, seen, kept + 1, honest_kept + (effect == 0)
            anchor = seen if gain(seen, anchor) >= MARGIN else anchor
        if kept == keeps:
            break
    return lost, kept, honest_kept / honest


def first_simplification(rng: random.Random, loss: float) -> bool:
    """Whether one that truly loses so many sigmas is kept."""
    incumbent, seen = [math.exp(rng.gauss(-0.5, 1)) for _ in range(2)], [math.exp(loss + rng.gauss(0, 1))]
    verdict = decide(seen, incumbent, 1.0, 2.0, incumbent)
    if verdict == "again":
        verdict = decide([*seen, math.exp(loss + rng.gauss(0, 1))], incumbent, 1.0, 2.0, incumbent)
    return verdict == "kept"


def test_a_hundred_simplifications_do_not_drift():
    def loss(with_anchor: bool) -> float:
        rng = random.Random(3)
        return statistics.fmean(simplifications(rng, with_anchor)[0] for _ in range(60))

    assert loss(True) < 1.1 < 1.5 < loss(False)  # in sigmas


def test_most_honest_simplifications_are_kept_and_few_that_lose():
    kept = {loss: statistics.fmean(first_simplification(random.Random(n), loss) for n in range(500)) for loss in (0, 2)}
    assert kept[0] > 0.4 and kept[2] < 0.05, kept
