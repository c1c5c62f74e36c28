"""The study of the law: its grades on synthetic runs with a known law, and the whole quick study."""

import numpy as np
import pytest

from opsd_kernels.train.studies import command
from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.papers import law
from opsd_kernels.train.studies.papers.law_measured import Measured, over_contexts
from opsd_kernels.train.studies.papers.law_settings import SECRET_OP
from opsd_kernels.train.studies.probe import fit, load_laws
from opsd_kernels.train.studies.statistics import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, spearman
from opsd_kernels.train.studies.study import load

NOISE, SLOPE_NOISE = 0.015, 0.05  # of a mean of five made-up runs, and of a line through their means
GAPS = dict(
    zip(
        [arm.name for arm in SECRET_OP.contexts], [0.65, 0.12, 0.4, 0.1, 0.25, -0.08, -0.16, 0.3], strict=True
    )
)


def made_up(hidden, improvement, seeds=5, noise=0.01):
    """Make runs whose improvement is a function of the gap plus noise."""
    rng = np.random.default_rng(hidden)
    trained, probes = {}, {}
    for arm in SECRET_OP.contexts:
        gains = [improvement(GAPS[arm.name]) + noise * rng.standard_normal() for _ in range(seeds)]
        runs = [{"held_out_accuracy_before": 0.22, "held_out_accuracy_after": 0.22 + gain} for gain in gains]
        trained[arm.name] = Trained(arm, 5e-4, runs, list(range(seeds)))
        probes[arm.name] = [
            {
                "gap": {"value": GAPS[arm.name]},
                "plain_gap": {"value": GAPS[arm.name] + 0.15},
                "consensus_gap": {"value": GAPS[arm.name] ** 2},
            }
        ] * seeds
    return Measured(hidden, trained, probes)


def graded(improvement, at_smallest=None):
    by_size = {law.MAIN: improvement, law.SMALLER: improvement, law.SMALLEST: at_smallest or improvement}
    measured = {hidden: made_up(hidden, function) for hidden, function in by_size.items()}
    fits, plain = (
        {hidden: fit(one.points(gap)) for hidden, one in measured.items()} for gap in ("gap", "plain_gap")
    )
    return law.claims(measured, fits, plain)


def test_a_law_that_holds():
    claims = graded(lambda gap: 0.8 * gap + 0.01)
    assert [claim.grade for claim in claims] == [REPRODUCED] * 7
    r2, saved, order, turned, lost, misled, start = [claim.estimate for claim in claims]
    assert (
        r2.value > 0.99
        and order.value > 0.9
        and abs(turned.value) < 0.05
        and start.value == pytest.approx(0.01, abs=NOISE)
    )
    assert [lost.value, misled.value] == pytest.approx(
        [-0.8 * GAPS[name] - 0.01 for name in ("wrong", "corrupted")], abs=NOISE
    ) and lost.count == 5
    assert "plain gap: -0.1" in claims[-1].remark  # .8 of the second try's .15 below


def test_a_law_that_does_not_hold():
    rng = np.random.default_rng(0)
    drawn = {gap: rng.uniform(0, 0.5) for gap in GAPS.values()}
    r2, saved, _, turned, lost, _, start = [claim.grade for claim in graded(drawn.__getitem__)]
    assert (r2, lost) == (NOT_REPRODUCED, NOT_REPRODUCED) and saved != REPRODUCED and start != REPRODUCED


def test_a_slope_that_changes_with_size():
    claims = graded(lambda gap: 0.8 * gap, lambda gap: 0.4 * gap)
    assert claims[0].grade == REPRODUCED and claims[3].grade == NOT_REPRODUCED
    assert claims[3].estimate.value == pytest.approx(0.4, abs=SLOPE_NOISE)


def test_an_order_that_is_reversed():
    claims = graded(lambda gap: 0.1 - 0.5 * gap)
    assert claims[2].grade == NOT_REPRODUCED and claims[0].grade == REPRODUCED  # a line, falling


def test_interval_over_contexts_is_of_contexts():
    main = made_up(law.MAIN, lambda gap: 0.8 * gap)
    outlier = made_up(law.MAIN, lambda gap: 0.9 if gap == GAPS["siblings"] else 0.8 * gap)
    narrow, wide = (
        over_contexts(lambda gaps, gains: law.line(gaps, gains)[2], some) for some in (main, outlier)
    )
    assert narrow.high - narrow.low < 0.03 < 0.3 < wide.high - wide.low
    assert (narrow.count, narrow.bases) == (8, 5)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    gaps, gains = rng.integers(0, 5, (4, 11)), rng.random((4, 11))  # with ties
    assert law.rank_correlation(gaps, gains) == pytest.approx(
        [spearman(a, b) for a, b in zip(gaps, gains, strict=True)]
    )


def test_the_better_measure_is_graded_where_it_was_not_chosen():
    """The improvement follows the square of the gap, which is what the made-up consensus gap is."""
    better, closer = law.claims_elsewhere(made_up(law.MAIN, lambda gap: 2 * gap**2))
    assert (better.grade, closer.grade) == (REPRODUCED, REPRODUCED)
    assert better.estimate.value > 0.99 and float(better.remark.split()[-1]) < 0.95
    worse, _ = law.claims_elsewhere(made_up(law.MAIN, lambda gap: abs(gap - 0.2)))
    assert worse.grade != REPRODUCED


@pytest.mark.slow
def test_the_whole_study(small, tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_CACHE", small["cache_dir"])
    made = command.reproduce("law", tmp_path, quick=True, workers=0, command=["reproduce", "law", "--quick"])
    assert [claim.grade for claim in made.claims].count(INCONCLUSIVE) >= 1  # one seed has no scatter
    assert (
        load(tmp_path / "law.json").claims == made.claims and (tmp_path / "law.png").stat().st_size > 10_000
    )
    page = (tmp_path / "law.md").read_text()
    assert "| `siblings` |" in page and "hidden 64" in page
    assert "`law_python`" in page and "Both measures, `plan`" in page
    fitted = load_laws(tmp_path / "fits" / "law.json")
    assert [one.measure for one in fitted] == ["gap", "consensus_gap"]
    assert [point.context for point in fitted[0].points] == [
        "answer",
        "wrong",
        "corrupted",
        "siblings",
    ] and fitted[0].settings["steps"] == 3
