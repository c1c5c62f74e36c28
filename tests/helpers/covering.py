"""Choose few of many cases, so that two values that meet in any case still meet in one of the chosen."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, object]], apart: Collection[tuple[str, str]] = ()) -> list[int]:
    """Return the positions of cases that hold every pair of values that any case holds, in rising order.

    A case maps options to values, which are compared by their repr. Pairs of the options in `apart` do not
    count; their values still do. Each step takes the case with the most missing pairs, the first of equals.
    """
    left_out = {frozenset(pair) for pair in apart}
    held = []
    for case in cases:
        values = sorted((name, repr(value)) for name, value in case.items())
        pairs = {pair for pair in combinations(values, 2) if frozenset(dict(pair)) not in left_out}
        held.append({*pairs, *values, ()})  # (): a case without options counts too
    missing, chosen = set().union(*held), []
    while missing:
        best = max(range(len(cases)), key=lambda n: len(held[n] & missing))
        missing -= held[best]
        chosen.append(best)
    return sorted(chosen)
