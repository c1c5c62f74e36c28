"""The statistics of studies against known truths: two-level data, coverage of reruns, grades, components."""

import numpy as np
import pytest

from opsd_kernels.train.studies import rerun, statistics
from opsd_kernels.train.studies.papers.variance import components
from opsd_kernels.train.studies.statistics import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Estimate,
    difference,
    equal_weights,
    estimate,
    graded_ahead,
    graded_at_most,
    graded_equal,
    replication,
    resamples,
    widening,
)
from opsd_kernels.train.studies.study import Claim, Study

BETWEEN, WITHIN = 0.1, 0.03  # standard deviations of base models, and of the runs from one
DRAWN = 0.01  # about two standard errors of a mean of 500 draws with deviation .1
STUDIES = 1000  # a share of .95 of them is known to .014, two standard errors
EXACT = 1e-12
WRITTEN = 0.01  # digits of the values in this file
SPREAD = 0.15  # a standard deviation of 200 values is known to a twentieth, and a quantile of it to more


def two_level(rng, bases, runs):
    """Draw runs of base models: their values, and the base model of each."""
    names = np.repeat(np.arange(bases), runs)
    return rng.normal(0, BETWEEN, bases)[names] + rng.normal(0, WITHIN, len(names)), names


def coverage(interval, draw, seed=0):
    """Return the shares of intervals that hold a rerun's mean, and the true mean of zero."""
    rng = np.random.default_rng(seed)
    held = []
    for _ in range(STUDIES):
        (values, names), (again, names_again) = draw(rng), draw(rng)
        found = interval(values, names)
        held.append([found.low <= mean <= found.high for mean in (equal_weights(names_again) @ again, 0.0)])
    return np.mean(held, 0)


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    monkeypatch.setattr(resamples, "__defaults__", (1000,))


@pytest.mark.parametrize("bases, runs", [(8, 1), (5, 1), (4, 3), (12, 2)])
def test_intervals_hold_the_estimates_of_reruns(bases, runs, fewer_resamples):
    rerun_held, truth_held = coverage(replication, lambda rng: two_level(rng, bases, runs))
    assert 0.93 < rerun_held < 0.98 and truth_held > rerun_held


def test_the_bootstrap_over_runs_of_few_base_models_does_not(fewer_resamples):
    """The design of the pages until now: five runs on three base models, resampled as if independent."""

    def old_design(rng):
        values, names = two_level(rng, 3, 2)
        return values[:5], names[:5]

    rerun_held, truth_held = coverage(lambda values, names: estimate(values), old_design)
    assert rerun_held < 0.65 and truth_held < 0.75


def test_a_confidence_interval_is_left_by_one_rerun_in_six(fewer_resamples, monkeypatch):
    """Hence the factor sqrt(2) of `widening`: without it the interval is one of the mean, at 95 %."""
    monkeypatch.setattr(statistics, "widening", lambda bases: widening(bases) / 2**0.5)
    rerun_held, truth_held = coverage(replication, lambda rng: two_level(rng, 8, 1))
    assert rerun_held < 0.9 and 0.93 < truth_held < 0.98


def test_resamples_draw_base_models_first():
    """Base `b` has one run and `a` three, which come and go together, with half of the weight on average."""
    bases = ["b", "a", "a", "a"]
    weights = resamples(bases, 20_000)
    assert weights.sum(1) == pytest.approx(1, abs=EXACT)
    assert weights.mean(0) == pytest.approx(equal_weights(bases), abs=DRAWN)
    assert equal_weights(bases) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=EXACT)
    # Of two draws both are `b`, both `a`, or one of each.
    shares = [np.mean(abs(weights[:, 0] - share) < EXACT) for share in (0, 0.5, 1)]
    assert shares == pytest.approx([1 / 4, 1 / 2, 1 / 4], abs=DRAWN)
    # Runs of one base model are drawn with replacement, too.
    assert 0 < np.mean((weights[:, 0] == 0.5) & (weights[:, 1] == 0)) < 0.5


def test_the_spread_of_a_mean_is_that_of_both_levels():
    values, names = two_level(np.random.default_rng(1), 200, 3)
    found = replication(values, names)
    error = (BETWEEN**2 / 200 + WITHIN**2 / 600) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 2**0.5 * error, rel=SPREAD)
    assert (found.count, found.bases) == (600, 200)


def test_few_base_models_widen_an_interval():
    assert [widening(bases) for bases in (2, 3, 5, 8)] == pytest.approx(
        [12.97, 3.80, 2.24, 1.82], abs=WRITTEN
    )
    assert widening(10_000) == pytest.approx(2**0.5, abs=WRITTEN) and widening(1) == 0
    assert replication([0.4, 0.6], [0, 0]) == Estimate(0.5, 0.5, 0.5, 2, 1)


def test_a_statistic_of_means_and_its_bounds():
    """The ratio of two means per run, whose upper bound is cut at its largest possible value."""
    values = [[1.0, 2.0], [2.0, 2.0], [1.5, 2.0], [1.9, 2.0]]
    found = replication(values, range(4), lambda means: means[:, 0] / means[:, 1], within=(0.0, 1.0))
    assert found.value == pytest.approx(0.8) and found.high == 1.0 and 0 <= found.low < 0.7


def test_differences_are_paired():
    """Runs with a scatter of .3 and pairwise differences of .01: the paired difference is certain."""
    theirs = [0.1, 0.4, 0.7, 0.2, 0.5]
    found = difference([value + 0.01 for value in theirs], theirs, range(5))
    assert found.low == pytest.approx(0.01) and found.high == pytest.approx(0.01)
    with pytest.raises(ValueError):
        difference(theirs, theirs[:4], range(5))


def test_a_mean_of_independent_values_has_a_confidence_interval():
    many = estimate(np.random.default_rng(3).normal(0.5, 0.1, 500))
    assert (many.low, many.high) == pytest.approx(
        (0.5 - 1.96 * 0.1 / 500**0.5, 0.5 + 1.96 * 0.1 / 500**0.5), abs=DRAWN
    )
    assert estimate([0.5]) == Estimate(0.5, 0.5, 0.5, 1) and estimate([0.5] * 4) == Estimate(0.5, 0.5, 0.5, 4)
    assert str(Estimate(0.5, -0.25, 1, 5)) == "0.500 [-0.250, 1.000]"


@pytest.mark.parametrize(
    "low, high, bases, ahead, equal",
    [
        (0.01, 0.04, 5, REPRODUCED, REPRODUCED),
        (0.06, 0.2, 5, REPRODUCED, NOT_REPRODUCED),
        (-0.01, 0.2, 5, INCONCLUSIVE, INCONCLUSIVE),
        (-0.2, -0.06, 5, NOT_REPRODUCED, NOT_REPRODUCED),
        (0.0, 0.05, 5, INCONCLUSIVE, REPRODUCED),
        # What a page prints as 0.000 is not above zero, and 0.050 is not above 0.05.
        (0.0004, 0.0504, 5, INCONCLUSIVE, REPRODUCED),
        (-0.0504, -0.0004, 5, INCONCLUSIVE, REPRODUCED),
        (0.0006, 0.0506, 5, REPRODUCED, INCONCLUSIVE),
        (0.0504, 0.2, 5, REPRODUCED, INCONCLUSIVE),
        (0.01, 0.02, 2, INCONCLUSIVE, INCONCLUSIVE),
        # Confidence intervals over values of one base model are no evidence on others.
        (0.01, 0.02, 0, INCONCLUSIVE, INCONCLUSIVE),
    ],
)
def test_grades_can_fail(low, high, bases, ahead, equal):
    found = Estimate((low + high) / 2, low, high, 20, bases)
    assert (graded_ahead(found), graded_equal(found, 0.05)) == (ahead, equal)


@pytest.mark.parametrize(
    "bounds, no_worse, at_most",
    [
        ((-0.01, 0.03), REPRODUCED, REPRODUCED),
        ((-0.03, 0.03), INCONCLUSIVE, REPRODUCED),
        ((-0.09, -0.03), NOT_REPRODUCED, REPRODUCED),
        ((0.2, 0.45), REPRODUCED, INCONCLUSIVE),
        ((0.3, 0.6), REPRODUCED, NOT_REPRODUCED),
    ],
)
def test_grades_against_a_bound(bounds, no_worse, at_most):
    found = Estimate(sum(bounds) / 2, *bounds, 120, 5)
    assert (graded_ahead(found, -0.02), graded_at_most(found, 0.25)) == (no_worse, at_most)


def test_components_are_those_of_the_data():
    found = components(two_level(np.random.default_rng(2), 400, 4)[0].reshape(400, 4), sampling=1e-4)
    assert (found.between, found.within) == pytest.approx((BETWEEN, WITHIN), rel=SPREAD)
    assert found.measured == pytest.approx(0.01) and found.error(8, 1) == pytest.approx(
        ((BETWEEN**2 + WITHIN**2) / 8) ** 0.5, rel=SPREAD
    )
    # Without a spread between base models the estimate is at its floor half of the time.
    rng = np.random.default_rng(4)
    floored = [components(rng.normal(0, WITHIN, (6, 2))).between == 0 for _ in range(200)]
    assert 0.3 < np.mean(floored) < 0.7


def made_up(values, low=0.0, high=0.2, grade=REPRODUCED, paper="p", measured="m"):
    claims = [Claim(str(i), measured, Estimate(v, low, high, 8, 8), grade) for i, v in enumerate(values)]
    return Study(paper, "t", "s", "q", [], claims, [], [])


def test_a_rerun_is_compared_as_pages_print_it():
    first = made_up([0.1, 0.1, 0.1, 0.1])
    second = made_up([0.2004, 0.2006, -0.0004, 0.1], grade=INCONCLUSIVE)
    second.claims[3] = first.claims[3]
    found = rerun.pairs(first, second)
    assert [pair.inside for pair in found] == [True, False, True, True]
    assert [pair.flipped for pair in found] == [True, True, True, False]
    assert rerun.summary(found) == (
        "3 of 4 estimates of the rerun lie inside the intervals, 3 of 4 grades flipped"
    )
    assert rerun.table(found).rows[1][2:4] == ["0.201", "**no**"]
    # A margin that a run measured itself stands after a semicolon.
    assert rerun.pairs(made_up([0.1], measured="m; within 0.1"), made_up([0.1], measured="m; within 0.2"))
    for other in (made_up([0.1] * 3), made_up([0.1] * 4, paper="other"), made_up([0.1] * 4, measured="n")):
        with pytest.raises(ValueError, match="against: expected a study of p with the same 4 claims"):
            rerun.pairs(first, other)
