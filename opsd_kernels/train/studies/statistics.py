"""Means with bootstrap intervals, paired differences, and the grade that an interval gives a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL, RESAMPLES = 0.95, 10_000
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "direction reproduced", "not reproduced", "inconclusive"
GRADES = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE)


@dataclass(frozen=True)
class Estimate:
    """A statistic of `count` runs and its percentile bootstrap interval at 95 %."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float], statistic: Callable[..., float] = np.mean) -> Estimate:
    """Of runs that are alike but for their seeds. With one run the interval is a point: nothing is known about its scatter.

    A percentile interval over five runs covers about 85 %, not 95 (it is made of the runs at hand): read a bound near zero as no evidence.
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
    """Mean of mine - theirs, run by run: the same seed and base model on both sides."""
    return estimate([a - b for a, b in zip(mine, theirs, strict=True)])


def graded_ahead(gain: Estimate) -> str:
    """The claim that a difference is above zero."""
    if gain.count < 3:
        return INCONCLUSIVE
    return REPRODUCED if gain.low > 0 else NOT_REPRODUCED if gain.high < 0 else INCONCLUSIVE


def graded_equal(gap: Estimate, margin: float) -> str:
    """The claim that a difference is at most `margin` either way."""
    if gap.count < 3:
        return INCONCLUSIVE
    if -margin <= gap.low and gap.high <= margin:
        return REPRODUCED
    return NOT_REPRODUCED if gap.low > margin or gap.high < -margin else INCONCLUSIVE


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank."""
    return float(stats.spearmanr(a, b).statistic)


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Probability that a right answer has the higher score, ties counted half: the area under the ROC curve."""
    scores, right = np.asarray(scores, dtype=float), np.asarray(right, dtype=bool)
    positive, negative = scores[right], scores[~right]
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
