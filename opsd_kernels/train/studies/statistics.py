"""Compute means with intervals for a rerun, paired differences, and the grade of a claim by its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL, RESAMPLES = 0.95, 10_000
# Digits of an estimate on a page. What they do not show is not counted by a grade.
DIGITS = 3
# With fewer base models the spread between them is a guess.
LEAST_BASES = 3
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "direction reproduced", "not reproduced", "inconclusive"
GRADES = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)
Values = Sequence[float] | np.ndarray
# The base model of each run, by any names.
Bases = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A statistic of `count` runs, and an interval at 95 %.

    In a study `bases` counts the base models of the runs, and the interval is that of `replication`. With
    `bases` zero it is a confidence interval over `count` independent values.
    """

    value: float
    low: float
    high: float
    count: int
    bases: int = 0

    def __str__(self) -> str:
        return f"{self.value:.{DIGITS}f} [{self.low:.{DIGITS}f}, {self.high:.{DIGITS}f}]"


def estimate(values: Values) -> Estimate:
    """Estimate the mean of independent values, such as the problems of a probe. One value gives a point."""
    sample = np.asarray(values, dtype=float)
    value = float(np.mean(sample))
    if len(sample) < 2 or np.ptp(sample) == 0:
        return Estimate(value, value, value, len(sample))
    means = np.random.default_rng(0).choice(sample, (RESAMPLES, len(sample))).mean(1)
    low, high = percentiles(means)
    return Estimate(value, float(low), float(high), len(sample))


def equal_weights(bases: Bases) -> np.ndarray:
    """Shape (n,), sum 1: the weights of n runs such that every base model has the same."""
    _, place, sizes = np.unique(np.asarray(bases), return_inverse=True, return_counts=True)
    return 1 / (len(sizes) * sizes[place])


def resamples(bases: Bases, count: int = RESAMPLES) -> np.ndarray:
    """Shape (count, n), rows sum to 1: the weights of n runs in two-level bootstrap samples.

    `bases` names the base model of each run. A sample draws base models with replacement, and for every base
    model drawn as many of its runs, with replacement. Equal at every call, so that arms are compared on the
    same samples.
    """
    rng = np.random.default_rng(0)
    _, place, sizes = np.unique(np.asarray(bases), return_inverse=True, return_counts=True)
    drawn_RG = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), count)
    weights = np.zeros((count, len(place)))
    for base, size in enumerate(sizes):
        runs = rng.multinomial(drawn_RG[:, base] * size, np.full(size, 1 / size))
        weights[:, place == base] = runs / (size * len(sizes))
    return weights


def widening(bases: int) -> float:
    """Return the factor by which a percentile interval over few base models is too narrow for a rerun.

    sqrt(n / (n - 1)) mends the bootstrap's variance, which divides by n; Student's t by the normal quantile,
    with n - 1 degrees of freedom, that the spread is itself estimated; sqrt(2) that a rerun's estimate has
    errors of its own: one in six lies outside the confidence interval of the mean.
    """
    if bases < 2:
        return 0.0
    tail = (1 + LEVEL) / 2
    return float(np.sqrt(2 * bases / (bases - 1)) * stats.t.ppf(tail, bases - 1) / stats.norm.ppf(tail))


def replication(
    values: Values,
    bases: Bases,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Estimate a mean over base models, and where that of a rerun of equal size falls in 95 % of cases.

    The rerun has other base models and seeds. `values` has shape (n,) or (n, D), a row for each run;
    `bases` names the base model of each. `statistic` maps means of shape (R, D) to (R,), for one that is no
    mean; its interval ends at the bounds `within`. One base model gives a point.
    """
    sample, groups = np.asarray(values, dtype=float), len(np.unique(np.asarray(bases)))
    columns = sample.reshape(len(sample), -1)
    if statistic is None:
        statistic = _first_column
    value = float(statistic(equal_weights(bases)[None] @ columns)[0])
    drawn = statistic(resamples(bases) @ columns)
    return replication_of(value, drawn, len(sample), groups, within)


def replication_of(
    value: float,
    drawn: np.ndarray,
    count: int,
    bases: int,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Make the estimate of a statistic from its values `drawn` in samples by `resamples`."""
    low, high = replication_bounds(np.asarray(value), drawn, bases, within)
    return Estimate(value, float(low), float(high), count, bases)


def replication_bounds(
    values: np.ndarray, drawn: np.ndarray, bases: int, within: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds, each of the shape of `values`, between which a rerun's values fall.

    `drawn` has shape (R, *values.shape): the values in samples by `resamples`.
    """
    low, high = percentiles(drawn)
    factor = widening(bases)
    return (
        np.clip(values - factor * np.maximum(values - low, 0.0), *within),
        np.clip(values + factor * np.maximum(high - values, 0.0), *within),
    )


def percentiles(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval, two arrays of shape (...), of resampled values of shape (R, ...)."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _first_column(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def difference(mine: Sequence[float], theirs: Sequence[float], bases: Bases) -> Estimate:
    """Estimate the mean of mine - theirs, paired by run: the same seed and base model on both sides."""
    return replication([a - b for a, b in zip(mine, theirs, strict=True)], bases)


def exceeds(value: float, bound: float) -> bool:
    """Return whether a value lies above a bound by more than a page shows."""
    return round(value - bound, DIGITS) > 0


def graded_ahead(gain: Estimate, least: float = 0.0) -> str:
    """Grade the claim that a quantity is above `least`."""
    if gain.bases < LEAST_BASES:
        return INCONCLUSIVE
    return (
        REPRODUCED
        if exceeds(gain.low, least)
        else NOT_REPRODUCED
        if exceeds(least, gain.high)
        else INCONCLUSIVE
    )


def graded_at_most(share: Estimate, bound: float) -> str:
    """Grade the claim that a quantity is at most `bound`."""
    if share.bases < LEAST_BASES:
        return INCONCLUSIVE
    if not exceeds(share.high, bound):
        return REPRODUCED
    return NOT_REPRODUCED if exceeds(share.low, bound) else INCONCLUSIVE


def graded_equal(gap: Estimate, margin: float) -> str:
    """Grade the claim that a difference is at most `margin` either way."""
    if gap.bases < LEAST_BASES:
        return INCONCLUSIVE
    if not exceeds(-margin, gap.low) and not exceeds(gap.high, margin):
        return REPRODUCED
    return NOT_REPRODUCED if exceeds(gap.low, margin) or exceeds(-margin, gap.high) else INCONCLUSIVE


def spearman(a: Values, b: Values) -> float:
    """Return the rank correlation, with ties at their mean rank."""
    return float(stats.spearmanr(a, b).statistic)


def auc(scores: Values, right: Sequence[bool]) -> float:
    """Return the area under the ROC curve: the chance that a correct answer scores higher, ties half."""
    all_scores, mask = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    positive, negative = all_scores[mask], all_scores[~mask]
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
