"""Compare a study with its rerun: estimates inside the first's intervals, and grades that flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd_kernels.train.studies.statistics import DIGITS, Estimate
from opsd_kernels.train.studies.study import Claim, Study, Table


@dataclass(frozen=True)
class Pair:
    """One claim of a study and the same one of its rerun."""

    first: Claim
    second: Claim

    @property
    def inside(self) -> bool:
        return holds(self.first.estimate, self.second.estimate.value)

    @property
    def flipped(self) -> bool:
        return self.first.grade != self.second.grade


def holds(estimate: Estimate, value: float) -> bool:
    """Return whether an interval holds a value, both as a page prints them."""
    low, high, value = (round(number, DIGITS) for number in (estimate.low, estimate.high, value))
    return low <= value <= high


def pairs(first: Study, second: Study) -> list[Pair]:
    """Pair the claims of two runs of a study. Raises ValueError for studies whose claims differ."""
    names = [[(claim.text, _plain(claim.measured)) for claim in study.claims] for study in (first, second)]
    if first.paper != second.paper or names[0] != names[1]:
        raise ValueError(
            f"against: expected a study of {first.paper} with the same {len(first.claims)} claims, got one "
            f"of {second.paper} with {len(second.claims)}, of which "
            f"{sum(a == b for a, b in zip(*names, strict=False))} are the same"
        )
    return [Pair(*both) for both in zip(first.claims, second.claims, strict=True)]


def _plain(measured: str) -> str:
    """Drop what a run measured itself, such as a margin, from the words for an estimate."""
    return measured.partition(";")[0]


def summary(found: Sequence[Pair]) -> str:
    inside, flipped = sum(pair.inside for pair in found), sum(pair.flipped for pair in found)
    return (
        f"{inside} of {len(found)} estimates of the rerun lie inside the intervals, "
        f"{flipped} of {len(found)} grades flipped"
    )


def table(found: Sequence[Pair]) -> Table:
    rows = [
        [
            pair.first.text,
            str(pair.first.estimate),
            f"{pair.second.estimate.value:.{DIGITS}f}",
            "yes" if pair.inside else "**no**",
            pair.first.grade + (f" -> **{pair.second.grade}**" if pair.flipped else ""),
        ]
        for pair in found
    ]
    return Table("", ["claim", "value [95 % of reruns]", "rerun", "inside", "grade"], rows)
