"""The keep rule: how noise is estimated, and what it takes to be kept. tests/unit/test_keep_rule.py simulates it.

Everything is in relative terms: a gain is a difference of log(metric), and sigma is the standard deviation of
log(metric) of one run, so that 0.04 is about 4 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import geometric_mean, variance

PRIOR_SIGMA, PRIOR_RUNS = 0.04, 2  # the noise before anything was run twice, and how many runs that is worth
HALF_LIFE = 10  # pairs of runs after which an older pair counts half: the noise grows as the metric falls
OUTLIER = 4  # sigmas so far: runs that lie further apart count as this much
MARGIN = 0.25  # sigmas by which a candidate must win, whether seen once or twice
SAME = 0.5  # sigmas by which the mean of two runs may be worse where nothing is lost
EARLY = 2.5  # sigmas: a simplification that is worse by more in its first run does not get a second one
LESS_TIME, FEWER_LINES = 0.10, 0.05  # shares of the incumbent's, of which a simplification must save one
HOPELESS = 4  # sigmas: on what loses by more no chain is built; half of a day's keeps did not win that much
REMEASURE_AFTER = 10  # discards in a row after which the incumbent is run again: it may have been lucky
REMEASURE_SINGLE_AFTER = 4  # likewise where it ran only once
MAX_INCUMBENT_RUNS = 4


def pooled_sigma(groups: Iterable[list[float]]) -> float:
    """Noise of one run, pooled over everything that ran more than once; `groups` has a list of values per train.py,
    the oldest first.

    Outliers are cut off: one candidate that diverged in its second run would otherwise make sigma ten times as large,
    and nothing would be kept any more.
    """
    total, weight = PRIOR_RUNS * PRIOR_SIGMA**2, PRIOR_RUNS
    for values in groups:
        if len(values) > 1:
            freedom = len(values) - 1
            new = freedom * min(variance(math.log(v) for v in values), OUTLIER**2 * total / weight)
            fades = 0.5 ** (freedom / HALF_LIFE)
            total, weight = total * fades + new, weight * fades + freedom
    return math.sqrt(total / weight)


def gain(candidate: list[float], incumbent: list[float]) -> float:
    """How much lower the candidate's mean of log(metric) is: 0.1 is about 10 % better."""
    return math.log(geometric_mean(incumbent) / geometric_mean(candidate))


def percent(gain: float) -> float:
    """The change of the metric; negative is better."""
    return (math.exp(-gain) - 1) * 100


def decide(
    candidate: list[float],
    incumbent: list[float],
    sigma: float,
    confirm_below: float,
    anchor: list[float] | None = None,
) -> str:
    """'kept', 'discarded', or 'again' for a small gain that was seen once.

    Discard below 0.25 sigma; keep at once at `confirm_below` sigmas; in between run it once more and keep it when the
    mean of the two still wins by 0.25 sigma.
    anchor: given with a simplification that saves something, the last incumbent that won by the rule above. It is kept
    too when the mean of two runs is hardly worse than the incumbent's and the anchor's: were it the incumbent's alone,
    the losses of many would add up.
    """
    sigmas = gain(candidate, incumbent) / sigma
    if sigmas >= MARGIN:
        return "kept" if sigmas >= confirm_below or len(candidate) > 1 else "again"
    if not anchor:
        return "discarded"
    worse = -min(sigmas, gain(candidate, anchor) / sigma)
    if len(candidate) > 1:
        return "kept" if worse <= SAME else "discarded"
    return "again" if worse <= EARLY else "discarded"
