"""Expect how many grades of the committed studies a rerun flips, by the number of base models.

For each claim its true value is drawn around the estimate (Student's t, as wide as the interval says). Two
runs of `n` base models each are drawn around that, normal between base models, and graded by the claim's own
rule. An estimate is inside where the second run's value is in the first's interval. Writes nothing.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from opsd_kernels.train.studies import rerun
from opsd_kernels.train.studies.pages import FOLDER, RERUNS
from opsd_kernels.train.studies.statistics import (
    GRADES,
    LEVEL,
    Estimate,
    graded_ahead,
    graded_at_most,
    graded_equal,
    widening,
)
from opsd_kernels.train.studies.study import Claim, load

DRAWS = 2000
NORMAL = stats.norm.ppf((1 + LEVEL) / 2)


def rule(claim: Claim):
    """Return the function that graded a claim, by its words.

    Raises ValueError where that gives another grade.
    """
    words = f"{claim.text}; {claim.measured}"
    if found := re.search(r"graded against (-?[\d.]+)", words):
        graded = partial(graded_ahead, least=float(found[1]))
    elif "no worse" in words and (found := re.search(r"margin ([\d.]+)", words)):
        graded = partial(graded_ahead, least=-float(found[1]))
    elif found := re.search(r"equal (?:means )?within (?:a quarter of the slope at \d+, )?([\d.]+)", words):
        graded = partial(graded_equal, margin=float(found[1]))
    elif found := re.search(r"\(within ([\d.]+)\)", words):
        graded = partial(graded_equal, margin=float(found[1]))
    elif "a third of the attempts" in words or "half the attempts" in words:
        graded = partial(graded_at_most, bound=1 / 3 if "third" in words else 0.5)
    else:
        graded = graded_ahead
    if graded(claim.estimate) != claim.grade:
        raise ValueError(f"{claim.text}: expected the grade {claim.grade!r}, got {graded(claim.estimate)!r}")
    return graded


def half_width(bases: int) -> float:
    """Return half an interval, in standard deviations between base models, of one run from each."""
    return widening(bases) * NORMAL * np.sqrt(bases - 1) / bases


def expected(claim: Claim, bases: int, rng: np.random.Generator, width: float = 1.0) -> tuple[float, float]:
    """Return the chances that the grades of two runs differ, and that the second value is inside.

    `width` multiplies the intervals.
    """
    graded, one = rule(claim), claim.estimate
    spread = (one.high - one.low) / 2 / half_width(one.bases)
    true = one.value + spread / np.sqrt(one.bases) * rng.standard_t(one.bases - 1, DRAWS)
    value_2D = true + spread / np.sqrt(bases) * rng.standard_normal((2, DRAWS))
    seen_2D = spread * np.sqrt(rng.chisquare(bases - 1, (2, DRAWS)) / (bases - 1))
    half_2D = width * half_width(bases) * seen_2D
    low_2D, high_2D = value_2D - half_2D, value_2D + half_2D
    grades = [
        [
            GRADES.index(graded(Estimate(*map(float, numbers), bases, bases)))
            for numbers in zip(value_2D[run], low_2D[run], high_2D[run], strict=True)
        ]
        for run in range(2)
    ]
    inside = (low_2D[0] <= value_2D[1]) & (value_2D[1] <= high_2D[0])
    return float(np.mean(np.not_equal(*grades))), float(inside.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", type=int, nargs="+", default=[6, 12, 24, 48, 96])
    parser.add_argument("--width", type=float, default=1.0, help="of the intervals, in that of the studies")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="of the repository")
    args = parser.parse_args()
    claims = []
    for path in sorted((args.root / FOLDER / RERUNS).glob("*.json")):
        first = load(args.root / FOLDER / path.name)
        claims += first.claims
        print(f"{first.paper}: {rerun.summary(rerun.pairs(first, load(path)))}")
    print("base models | grades flipped, expected | estimates inside, expected")
    for bases in args.bases:
        rng = np.random.default_rng(0)
        found = np.array([expected(claim, bases, rng, args.width) for claim in claims])
        print(f"{bases} | {found[:, 0].mean():.1%} | {found[:, 1].mean():.1%}")


if __name__ == "__main__":
    main()
