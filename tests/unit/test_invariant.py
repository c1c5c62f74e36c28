"""Test that accuracy does not depend on a common offset of the logits, their scale or their order.

A softmax sees none of them.
"""

import functools
from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import assert_invariant, hard_case
from opsd_kernels.testing.reference import linear_divergence_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMOOTH = tuple(name for name in KIND_NAMES if name != "tvd")  # at a kink an offset decides the sign
SETTINGS = [
    (dtype, divergence)
    for dtype in DTYPES
    for divergence in (SMOOTH if dtype.itemsize == 2 else ("reverse_kl", "jsd"))
]


def near_case(dtype, labels: bool, **made):
    """Return logits to 16 and a teacher at KL 1e-2, with the student's own samples as labels or with none."""
    N, V = (48, 2048) if dtype.itemsize == 2 else (24, 1024)  # a bf16 loss needs the rows to average out
    made = {"shared_head": True, "near": 1e-2, "largest_logit": 16.0, "widths": (1.0,), "seed": 1, **made}
    case = hard_case(N, V, 64, dtype, **made)
    valid = case.mask & (case.labels != -100)
    if not labels:
        return replace(case, token_weights=None, labels=None, mask=valid)
    logits = case.student_hidden.double().nan_to_num(0, 0, 0) @ case.student_weight.double().T
    own = logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    return replace(case, token_weights=None, labels=torch.where(valid, own, case.labels))


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("dtype, divergence", SETTINGS, ids=str)
def test_invariant(backend, dtype, labels, divergence):
    case = near_case(dtype, labels, bias=False)
    assert_invariant(functools.partial(linear_divergence, backend=backend), case, divergence=divergence)


@pytest.mark.parametrize("made", [{"bias": True}, {"frozen_head": True, "bias": False}], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"backward": "recompute"}, {"workspace_bytes": 1 << 17}, {"temperature": 0.7}, {"teacher_mix": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_invariant_by_other_routes(backend, dtype, made, options):
    case = near_case(dtype, True, masked_entry=None, **made)
    assert_invariant(functools.partial(linear_divergence, backend=backend), case, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_invariant_with_two_heads(backend, dtype):
    case = hard_case(29, 1003, 48, dtype, near=1e-1, largest_logit=8.0, bias=False)
    assert_invariant(functools.partial(linear_divergence, backend=backend), case)


@pytest.mark.parametrize("change", ["a hidden unit adds -32", "hidden states and temperature times 0.25"])
def test_the_gate_can_fail(change):
    """Rounding the raw logits of both sides to bf16 fails at the first change, and at each one alone."""
    from opsd_kernels.testing import cases, gates

    def rounded_pair(student_hidden, student_weight, teacher_hidden, teacher_weight, **options):
        s, t = (student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T)
        identity = torch.eye(s.shape[-1])
        return linear_divergence_reference(s.float(), identity, t.float(), identity, **options)

    case = replace(near_case(torch.bfloat16, False, bias=False), trainable=("student_hidden",))
    with pytest.raises(AssertionError, match="a hidden unit adds 32 to all logits: .*relative error"):
        assert_invariant(rounded_pair, case)
    changed, told = next(
        (c, o) for name, c, o in cases.invariant_variants(case, {}) if name.startswith(change)
    )
    truth = gates.evaluate(linear_divergence_reference, changed.double(), **told)
    with pytest.raises(AssertionError, match="relative error"):
        gates.assert_on_target(gates.evaluate(rounded_pair, changed, **told), truth, "default")
