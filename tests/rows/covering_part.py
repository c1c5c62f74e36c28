"""Run of each test of the row contract the cases that cover its options in pairs: for slow backends.

class TestRowContract(CoveringPart, RowContract): ...

A test's options are its parameters and what it loops over. Every two values that meet in any case meet in a
chosen one, but for pairs in APART. Where a test takes HARD rows, every two values meet on these alone too.
"""

from collections.abc import Iterator
from itertools import combinations, product

import pytest
import torch
from covering import covering

# test: the attributes that it loops over
LOOPS = {
    "test_loss_and_gradient": ("SHAPES", "EACH_ROUTE"),
    "test_a_temperature_for_each_row": ("SHAPES", "EACH_ROUTE"),
    "test_statistics": ("SHAPES",),
    "test_narrowed_gradient": ("SHAPES",),
    "test_zero_factor_gives_exact_zeros": ("EACH_ROUTE",),
    "test_minus_infinity_in_a_bias": ("EACH_ROUTE",),
    "test_a_row_alone_has_the_bits_it_has_in_a_batch": ("EACH_ROUTE",),
    "test_clips": ("SHAPES", "FORMS", "EACH_ROUTE"),
    "test_teacher_mix": ("SHAPES", "FORMS", "EACH_ROUTE"),
    "test_policy": ("SHAPES", "FORMS", "EACH_ROUTE"),
    "test_policy_into_a_narrowed_view": ("SHAPES", "EACH_ROUTE"),
    "test_norms": ("SHAPES",),
    "test_gather": ("SHAPES",),
    "test_two_calls_give_the_same_bits": ("SHAPES",),
}
# Pairs that decide nothing together. A factor of zero is asked for before a divergence, in one place for
# all types; lanes of a cap beyond the vocabulary are cut off where they are read, a shift is taken off where
# it is found, and a policy term asks for no divergence.
APART = {
    "test_zero_factor_gives_exact_zeros": list(combinations(("kind", "dtype", "rubbish", "EACH_ROUTE"), 2)),
    "test_a_row_alone_has_the_bits_it_has_in_a_batch": [("kind", "dtype"), ("kind", "EACH_ROUTE")],
    "test_a_shifted_teacher_costs_no_digits": [("kind", "dtype")],
    "test_a_softcap_leaves_columns_beyond_the_vocabulary_out": [("dtype", "route")],
    "test_without_options_nothing_changes": [("kind", "route")],
}


class CoveringPart:
    """The fixture that skips the other cases and narrows the loops of the chosen ones."""

    HARD: tuple[int, int] | None = None  # the shape of test_loss_and_gradient whose rows have every teacher

    def served(self, test: str, params: dict) -> bool:
        """True for cases to choose from."""
        return True

    def cases(self, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict]]:
        """Yield (node, options) of all cases of this test."""
        test = request.node.originalname
        loops = LOOPS.get(test, ())
        for item in request.session.items:
            if item.cls is type(self) and item.originalname == test:
                params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
                if self.served(test, params):
                    for values in product(*(getattr(self, name) for name in loops)):
                        yield item.nodeid, {**params, **dict(zip(loops, values, strict=True))}

    def chosen(self, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
        """Return the chosen options of each node of this test."""
        test = request.node.originalname
        # Of equals the first is chosen: another one than float64, which takes the longest.
        every = sorted(self.cases(request), key=lambda case: case[1].get("dtype") == torch.float64)
        apart, found = APART.get(test, []), {}
        groups = [(every, apart)]
        if test == "test_loss_and_gradient" and self.HARD:
            hard = [case for case in every if case[1]["SHAPES"] == self.HARD]
            rest = [case for case in every if case[1]["SHAPES"] != self.HARD]
            groups = [(hard, apart), (rest, [*apart, ("kind", "form")])]
        for cases, without in groups:
            for n in covering([options for _, options in cases], without):
                found.setdefault(cases[n][0], []).append(cases[n][1])
        return found

    @pytest.fixture(autouse=True)
    def covering_part(self, request):
        kept = request.session.__dict__.setdefault("opsd_covering_parts", {})
        key = type(self), request.node.originalname
        if key not in kept:
            kept[key] = self.chosen(request)
        mine = kept[key].get(request.node.nodeid)
        if mine is None:
            pytest.skip("not in the part of the matrix that this backend runs")
        for name in LOOPS.get(request.node.originalname, ()):
            setattr(self, name, list(dict.fromkeys(options[name] for options in mine)))
