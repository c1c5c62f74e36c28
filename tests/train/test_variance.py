"""`opsd reproduce variance`: its tables on made-up runs with known components, and the whole quick study."""

import numpy as np
import pytest

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.studies import command
from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.papers import mopd, variance
from opsd_kernels.train.studies.papers.variance import GAIN, Grid
from opsd_kernels.train.studies.statistics import NOT_REPRODUCED, REPRODUCED
from opsd_kernels.train.studies.study import load

RATES = (1e-3, 2e-3)
MEAN, SPREAD = 0.07, 0.35  # of 40 base models: four standard errors, and three of a standard deviation


def made_up(between, within, bases=40, runs=2):
    """Make runs around .5 and .2, the two arms."""
    rng = np.random.default_rng(0)

    def run(value):
        before = {f"{name}_before": 0.3 for name in ("held_out_accuracy", "self_teacher_accuracy")}
        return {**before, "untrained_skill_before": 0.9, "held_out_accuracy_after": value}

    arms, by_arm = {}, {}
    for arm, mean in zip(variance.ARMS, (0.5, 0.2), strict=True):
        values = (
            mean + between * rng.standard_normal((bases, 1)) + within * rng.standard_normal((bases, runs))
        )
        by_arm[arm.name] = [[run(value) for value in row] for row in values]
        tried = {RATES[0]: [0.4, 0.3], RATES[1]: [0.3, 0.45]}
        arms[arm.name] = Trained(
            arm, RATES[1], [row[0] for row in by_arm[arm.name]], list(range(bases)), tried
        )
    moved = {what: [run(0.4), run(0.1)] for what in ("made", "trained")}
    return Grid(arms, by_arm, [moved])


def test_tables_hold_the_components_of_the_runs():
    grid = made_up(0.1, 0.02)
    table = variance.components_table(grid, TrainConfig(**mopd.BASE))
    rows = {row[0]: row[1:] for row in table.rows}
    assert set(rows) == {mopd.TWO, mopd.SHUFFLED, GAIN}
    for name, mean, between in ((mopd.TWO, 0.5, 0.1), (mopd.SHUFFLED, 0.2, 0.1), (GAIN, 0.3, 0.1 * 2**0.5)):
        found = [float(number) for number in rows[name][:3]]
        assert found[0] == pytest.approx(mean, abs=MEAN) and found[1] == pytest.approx(between, rel=SPREAD)
    assert (
        float(rows[mopd.TWO][2]) == pytest.approx(0.02, rel=SPREAD) and rows[mopd.TWO][4].rstrip("%") > "80"
    )
    # sqrt(.5 * .5 / 512) is more than all of the runs' spread here.
    assert rows[mopd.TWO][3] == rows[mopd.TWO][2]
    assert len(variance.bases_table(grid).rows) == 40
    errors = {tuple(row[:2]): float(row[3].split(",")[0]) for row in variance.errors_table(grid).rows}
    assert errors["3", "5"] > errors["5", "1"] > errors["12", "1"], "base models count, not runs"
    assert [row[1] for row in variance.arithmetic_table(grid).rows] == ["as run", "the run alone", "both"]
    assert variance.arithmetic_table(grid).rows[2][-2:] == ["0.400", "0.100"]


def test_claims_compare_the_two_levels():
    assert variance.claim(made_up(0.1, 0.02), mopd.TWO).grade == REPRODUCED
    assert variance.claim(made_up(0.0, 0.1), mopd.TWO).grade == NOT_REPRODUCED


def test_the_interval_of_a_share_holds_it():
    rng, held = np.random.default_rng(1), []
    for _ in range(2000):
        values = 0.1 * rng.standard_normal((6, 1)) + 0.05 * rng.standard_normal((6, 2))
        found = variance.share(values)
        held.append(found.low <= 0.8 <= found.high)
    assert 0.94 < np.mean(held) < 0.96


def test_rates_of_single_runs_and_of_their_mean():
    for row in variance.rates_table(made_up(0.1, 0.02)).rows:
        assert row[1:] == ["0.400, 0.300", "0.300, 0.450", "0.001, 0.002", "0.002"]


@pytest.mark.slow
def test_the_study_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "cache"))
    made = command.reproduce("variance", tmp_path, True, 0, ["reproduce", "variance", "--quick"])
    assert load(tmp_path / "variance.json") == made
    arithmetic = made.tables[-1].rows
    assert [row[0] for row in arithmetic] == ["0"] * 3
    again = command.reproduce("variance", tmp_path, True, 0, [], against=tmp_path / "variance.json")
    assert again.claims == made.claims
