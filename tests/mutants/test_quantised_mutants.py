"""Plant bugs in heads of eight bits that are read by slices (see planting.py)."""

import pytest
import torch
from planting import Mutant, arguments, check, kill, result
from quantised_cases import BLOCK, quantised_case, through_cache

from opsd_kernels import QuantizedHead, cache_forward_kl, linear_cached_forward_kl
from opsd_kernels._core import forward_cache, sliced_head
from opsd_kernels.testing import assert_no_worse, evaluate
from opsd_kernels.testing.reference import linear_divergence_reference

BLOCKS, GROUPS = "float8_e4m3fn, blocks", "int4 in int8, groups, zero points"
ROWS = 3 * BLOCK[0] // 4  # of a slice: every other one begins and ends inside a block


def quantised(kind: str, role: str):
    """Check value and gradients against the dequantised head in float64."""
    case, op, _ = quantised_case(kind, role, torch.float64, largest_logit=8.0)
    truth = evaluate(linear_divergence_reference, case)
    assert_no_worse(evaluate(op, case, backend="torch"), truth, truth)


def cached(kind: str):
    """Check the forward KL from a cache that was made with the quantised head."""
    case, _, head = quantised_case(
        kind, "shared", torch.float64, largest_logit=8.0, frozen_head=True, masked_entry=None
    )
    told = {"divergence": "forward_kl"}
    truth = evaluate(linear_divergence_reference, case, **told)
    assert_no_worse(evaluate(through_cache("shared", head), case, **told), truth, truth)


def another_head():
    """Check that a cache refuses a head with other scales."""
    _, _, head = quantised_case(GROUPS, "shared", torch.float32)
    h = torch.ones(2, head.shape[1])
    cache = cache_forward_kl(h, head, head)
    other = QuantizedHead(head.values, 1.01 * head.scales, head.zero_points, head.block_size)
    try:
        linear_cached_forward_kl(h, other, cache)
    except ValueError as error:
        assert str(error).startswith("student_weight: expected the head")
    else:
        raise AssertionError("other scales are taken")


def from_zero(head, grid, at, wide):
    """Count the blocks of a slice from its own start."""
    return head, grid, slice(0, at.stop - at.start) if isinstance(at, slice) else at - at.min(), wide


def of_the_first_row(found, *_):
    entries, width = found
    return entries[:1].expand_as(entries), width


def unscaled(values, quantised, *rest):
    return values, None, *rest


MUTANTS = {
    "the blocks of a slice begin where it begins": Mutant(
        sliced_head.SlicedHead, "_blocks", arguments(from_zero), check(quantised, BLOCKS, "teacher")
    ),
    "a slice that crosses a block's border has the scales of its first row": Mutant(
        sliced_head.SlicedHead, "_blocks", result(of_the_first_row), check(quantised, BLOCKS, "shared")
    ),
    "a cache of the values without their scales": Mutant(
        forward_cache, "SlicedHead", arguments(unscaled), check(cached, BLOCKS)
    ),
    "a cache knows its head by the values alone": Mutant(
        QuantizedHead,
        "entries",
        lambda _: lambda head, rows, columns: head.values[rows, columns].float(),
        check(another_head),
    ),
}


@pytest.fixture(autouse=True)
def slices(monkeypatch):
    """Read heads in slices of ROWS, all rows of a slice at a time."""
    monkeypatch.setitem(sliced_head.SLICED_BYTES, "cpu", 0)
    monkeypatch.setattr(sliced_head, "LEAST_ROWS", ROWS)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, monkeypatch):
    kill(MUTANTS[name], monkeypatch)
