"""Draw calls of every op from the cross product of its options, and compare each with dense float64.

A combination that an op refuses must raise the documented error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from checked_call import FORMS, Call
from flawed_calls import FLAWS, Flaw
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sampled_calls import NARROW, calls, refusals

from opsd_kernels.testing import assert_no_worse, assert_on_target, assert_one_rounding, assert_same_bits

CASES, QUICK = 100, 10  # of each op, with each backend
LARGEST_LOGIT = 12 * 1.3 / 0.6  # by logit scale and temperature


def compare(call: Call) -> None:
    """Compare results, statistics and gradients with the reference's on the same inputs in float64."""
    ours, truth = call.run(), call.run(reference=True, wide=True)
    peers = [truth]
    if call.dtype == torch.float32:
        flipped, restore = call.flipped()
        peers = [call.run(reference=True), restore(flipped.run(reference=True))]
    finite = all(x.isfinite().all() for name, x in truth.items() if name.startswith("result"))
    assert set(truth) <= set(ours)
    for name, exact in truth.items():
        got = ours[name]
        assert got.shape == exact.shape, (name, got.shape, exact.shape)
        if name.startswith("gradient") and not finite and call.form != "at ids":
            continue  # of a sum that is infinite
        if not exact.numel():
            continue
        if call.dtype in NARROW:
            if not name.startswith("statistic") and exact.is_floating_point():
                assert_on_target(got, exact, "default")
        elif not exact.is_floating_point():
            if call.dtype == torch.float64:
                assert_same_bits(got, exact)
        elif got.dtype == torch.float64:
            # The largest term of the sums behind an entry is taken for a hundred times the largest entry.
            largest = torch.where(exact.isfinite(), exact.abs(), 0.0).amax().item()
            assert_one_rounding(got, exact, torch.float64, magnitude=max(1.0, 100 * largest), name=name)
        elif name.startswith("statistic"):
            assert_one_rounding(got, exact, torch.float32, magnitude=LARGEST_LOGIT, name=name)
        else:
            assert_no_worse(got, [peer[name] for peer in peers], exact)


def refuse(call: Call, names: set[str]) -> None:
    """The call raises an error of one of the arguments `names`."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call.run()
    begins = "|".join(re.escape(name.format(prefix=call.prefix)) for name in sorted(names))
    assert re.match(rf"({begins})(\[\d+\])?:", str(raised.value)), str(raised.value)


def sampled(check: Callable[..., None], cases: int, **drawn: st.SearchStrategy) -> None:
    """Run `check` on `cases` examples, the same ones on every run."""
    health = list(HealthCheck)
    told = settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=health
    )
    told(given(**drawn)(check))()


def check_sample(form: str, backend: str, cases: int) -> None:
    """Check `cases` calls of an op. Most must be computed; the op refuses no more than `backward`."""
    seen: Counter = Counter()

    def check(call: Call, packs: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPSD_PACK", packs)
            if names := refusals(call):
                refuse(call, names)
            else:
                compare(call)
            seen["refused" if names else "computed"] += 1

    sampled(check, cases, call=calls(backend, form), packs=st.sampled_from(("1", "1", "0")))
    assert seen.total() >= cases and seen["computed"] >= cases / 2, seen


@pytest.mark.parametrize("form", FORMS)
def test_some_calls(backend, form):
    check_sample(form, backend, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_many_calls(backend, form):
    assert 2 * len(FORMS) * CASES >= 1500
    check_sample(form, backend, CASES)


def check_flaw(flaw: Flaw, form: str, cases: int) -> None:
    """Plant a flaw into `cases` calls of an op."""
    seen: list[Call] = []

    def check(call: Call) -> None:
        assume(flaw.when(call))
        refuse(flaw.plant(call), {flaw.error})
        seen.append(call)

    sampled(check, cases, call=calls("torch", form))
    assert len(seen) >= cases


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_is_refused_by_name(name):
    for form in FLAWS[name].forms:
        check_flaw(FLAWS[name], form, 2)
