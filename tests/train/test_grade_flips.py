"""benchmarks/grade_flips.py: the rules of the committed claims, and chances that are known."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from opsd_kernels.train.studies.pages import FOLDER, flat
from opsd_kernels.train.studies.statistics import INCONCLUSIVE, REPRODUCED, Estimate
from opsd_kernels.train.studies.study import Claim, load

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = 0.04


@pytest.fixture(scope="module")
def flips():
    spec = importlib.util.spec_from_file_location("grade_flips", ROOT / "benchmarks" / "grade_flips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / FOLDER).glob("*.json")), ids=lambda path: path.stem)
def test_the_words_of_a_claim_give_its_rule(flips, path):
    study = load(path)
    if flat(study):
        pytest.skip("made by older code, whose intervals are others")
    for claim in study.claims:
        assert flips.rule(claim)(claim.estimate) == claim.grade


def test_words_that_give_another_grade_are_refused(flips):
    claim = Claim("It is so", "a less b", Estimate(0.1, 0.05, 0.15, 6, 6), INCONCLUSIVE)
    with pytest.raises(ValueError, match="It is so: expected the grade 'inconclusive', got 'direction repr"):
        flips.rule(claim)


def test_chances(flips):
    rng = np.random.default_rng(0)
    clear = Claim("Far ahead", "a less b", Estimate(1.0, 0.9, 1.1, 6, 6), REPRODUCED)
    flipped, inside = flips.expected(clear, 6, rng)
    assert flipped < SAMPLING and inside == pytest.approx(0.95, abs=SAMPLING)
    # An estimate of nothing, graded by many base models: either sign, and hardly ever inconclusive.
    unclear = Claim("Ahead", "a less b", Estimate(0.0, -0.1, 0.1, 6, 6), INCONCLUSIVE)
    few, many = (flips.expected(unclear, bases, rng)[0] for bases in (6, 6000))
    assert many < few
