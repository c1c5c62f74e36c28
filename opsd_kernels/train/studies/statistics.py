"""Compute means with bootstrap intervals, paired differences, and the grade of a claim by its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL, RESAMPLES = 0.95, 10_000
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "direction reproduced", "not reproduced", "inconclusive"
GRADES = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A statistic of `count` runs and its percentile bootstrap interval at 95 %."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Values, statistic: Callable[..., Any] = np.mean) -> Estimate:
    """Estimate a statistic over runs that differ in their seeds. With one run the interval is a point.

    A percentile interval over five runs covers about 85 %, not 95, since it only resamples those runs: a
    bound near zero is no evidence.
    """
    sample = np.asarray(values, dtype=float)
    value = float(statistic(sample))
    if len(sample) < 2 or np.ptp(sample) == 0:
        return Estimate(value, value, value, len(sample))
    found = stats.bootstrap(
        (sample,),
        statistic,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Estimate(
        value, float(found.confidence_interval.low), float(found.confidence_interval.high), len(sample)
    )


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Estimate the mean of mine - theirs, paired by run: the same seed and base model on both sides."""
    return estimate([a - b for a, b in zip(mine, theirs, strict=True)])


def graded_ahead(gain: Estimate) -> str:
    """Grade the claim that a difference is above zero."""
    if gain.count < 3:
        return INCONCLUSIVE
    return REPRODUCED if gain.low > 0 else NOT_REPRODUCED if gain.high < 0 else INCONCLUSIVE


def graded_equal(gap: Estimate, margin: float) -> str:
    """Grade the claim that a difference is at most `margin` either way."""
    if gap.count < 3:
        return INCONCLUSIVE
    if -margin <= gap.low and gap.high <= margin:
        return REPRODUCED
    return NOT_REPRODUCED if gap.low > margin or gap.high < -margin else INCONCLUSIVE


def spearman(a: Values, b: Values) -> float:
    """Return the rank correlation, with ties at their mean rank."""
    return float(stats.spearmanr(a, b).statistic)


def auc(scores: Values, right: Sequence[bool]) -> float:
    """Return the area under the ROC curve: the chance that a correct answer scores higher, ties half."""
    all_scores, mask = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    positive, negative = all_scores[mask], all_scores[~mask]
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
