"""Test that accuracy does not depend on a common offset of the logits, their scale or their order.

A softmax sees none of them.
"""

import functools
from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels._core import centre, cpu_gemm
from opsd_kernels._rows import extension
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    LOGPROB_NATS,
    assert_invariant,
    assert_on_target,
    assert_same_bits,
    cases,
    evaluate,
    hard_case,
    relative_error,
)
from opsd_kernels.testing.reference import linear_divergence_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMOOTH = tuple(name for name in KIND_NAMES if name != "tvd")  # at a kink an offset decides the sign
SETTINGS = [
    pytest.param(dtype, divergence, marks=[] if divergence == "reverse_kl" else pytest.mark.slow)
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
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_invariant_by_other_routes(backend, dtype, made, options):
    case = near_case(dtype, True, masked_entry=None, **made)
    assert_invariant(functools.partial(linear_divergence, backend=backend), case, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_invariant_with_two_heads(backend, dtype):
    case = hard_case(29, 1003, 48, dtype, near=1e-1, largest_logit=8.0, bias=False)
    assert_invariant(functools.partial(linear_divergence, backend=backend), case)


@pytest.fixture(params=["own kernel", "addmm", "slices"])
def way(request, monkeypatch):
    """Take each way to subtract a row's constant, those of other processors and of GPUs too."""
    if request.param != "own kernel":
        monkeypatch.setattr(extension, "gemm_unavailable", lambda: "planted")
        monkeypatch.setattr(extension, "mm_has_units", lambda dtype: request.param == "addmm")
        monkeypatch.setattr(extension, "has_amx", lambda: False)
    cpu_gemm.cblas_gemm.cache_clear()
    yield request.param
    cpu_gemm.cblas_gemm.cache_clear()


@pytest.mark.parametrize("shared_head", [True, False], ids=["difference", "pair"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_invariant_on_other_processors(way, dtype, shared_head):
    """16-bit logits of two heads are off by rounding both sides, so they only meet the target when far."""
    near = {"near": 1e-2} if shared_head else {"near": 2.0, "largest_logit": 8.0}
    case = near_case(dtype, True, bias=False, shared_head=shared_head, **near)
    op = functools.partial(linear_divergence, logits_dtype="input")
    assert_invariant(op, case)


@pytest.mark.parametrize("shared_head", [True, False], ids=["difference", "pair"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_statistics_of_16_bit_logits(way, dtype, shared_head):
    """The label's log-probs see no offset; student and teacher agree where their exact logits do."""
    case = near_case(dtype, True, bias=False, shared_head=shared_head)
    for name, changed, told in cases.invariant_variants(case, {"return_stats": True}):
        ours, truth = (
            evaluate(
                op, changed if op is linear_divergence else changed.double(), **told, logits_dtype="input"
            ).stats
            for op in (linear_divergence, linear_divergence_reference)
        )
        bound = LOGPROB_NATS / min(told.get("temperature", 1.0), 1.0)
        for field in ("student_logprob", "teacher_logprob"):
            off = (getattr(ours, field) - truth[field]).abs().max().item()
            assert off <= bound, f"{name}: {field} is off by {off}"
        assert torch.equal(ours.top1_agreement.double(), truth["top1_agreement"]), name


@pytest.mark.parametrize("shared_head", [True, False], ids=["difference", "pair"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_two_runs_have_the_same_bits(backend, way, dtype, shared_head):
    """Recomputed, the same logits again: the gradient may differ in how a sweep rounds it, the rest not."""
    case = replace(near_case(dtype, True, shared_head=shared_head), upstream=1.0)
    options = {"backend": backend, "logits_dtype": "input", "return_stats": True, "workspace_bytes": 1 << 17}
    one, two, again = (
        evaluate(linear_divergence, case, backward=backward, **options)
        for backward in ("in_forward", "in_forward", "recompute")
    )
    assert_same_bits(two, one)
    assert_same_bits(again.value(), one.value())
    off = relative_error(again.student_weight, one.student_weight)
    assert off < torch.finfo(dtype).eps / 100, f"the recomputed gradient is off by {off}"
    for other in (two, again):
        for field in (
            "divergence",
            "student_logprob",
            "teacher_logprob",
            "student_entropy",
            "top1_agreement",
        ):
            assert_same_bits(getattr(other.stats, field), getattr(one.stats, field))


def test_a_row_alone_has_the_constant_that_it_has_in_a_batch(backend):
    """With the extension's GEMM, the whole row of 16-bit logits: the same loss and statistics."""
    case = replace(near_case(torch.bfloat16, True, bias=False), trainable=())
    h, W, t, y = case.student_hidden, case.student_weight, case.teacher_hidden, case.labels
    valid = (case.mask & (y != -100)).nonzero()[:, 0]
    assert_same_bits(
        torch.cat([centre.logits_at(h[i : i + 1], W, y[i : i + 1, None]) for i in valid]),
        centre.logits_at(h[valid], W, y[valid, None]),
    )
    if extension.gemm_unavailable() is None:
        told = {"return_stats": True, "reduction": "none", "backend": backend}
        loss, stats = linear_divergence(h, W, t, W, labels=y, mask=case.mask, **told)
        for i in valid:
            row = slice(i, i + 1)
            alone, own = linear_divergence(h[row], W, t[row], W, labels=y[row], **told)
            assert_same_bits(alone, loss[row])
            assert_same_bits(own.student_logprob, stats.student_logprob[row])


@functools.cache
def large_logits(bias: bool):
    """Return rows and a head in bf16 with logits to 25, a bias, and where the two largest logits agree."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(8192, 64, generator=gen)
    hidden = torch.randn(4096, 64, generator=gen)
    hidden = hidden * 25 / (hidden @ weight.T).abs().amax()
    teacher = hidden + 0.1 * hidden.norm(dim=1, keepdim=True) / 8 * torch.randn(4096, 64, generator=gen)
    hidden, weight, teacher = (x.bfloat16() for x in (hidden, weight, teacher))
    shift = torch.randn(8192, generator=gen) if bias else torch.zeros(8192)
    s, t = ((x.double() @ weight.double().T + shift).argmax(1) for x in (hidden, teacher))
    return hidden, weight, teacher, shift, s == t


@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no bias", "bias"])
@pytest.mark.parametrize("divergence", ["reverse_kl", pytest.param("jsd", marks=pytest.mark.slow)])
def test_top1_agreement_of_16_bit_logits_is_exact(backend, divergence, bias):
    """.4 % of the tokens have another largest logit than before the rounding to bf16."""
    hidden, weight, teacher, shift, agree = large_logits(bias)
    with torch.no_grad():
        _, stats = linear_divergence(
            hidden,
            weight,
            teacher,
            weight,
            divergence=divergence,
            student_bias=shift if bias else None,
            teacher_bias=shift if bias else None,
            return_stats=True,
            backend=backend,
        )
    assert 0.5 < stats.top1_agreement.mean() < 0.99
    assert (stats.top1_agreement != agree).float().mean() <= 2e-4


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 31), (5, 32), (7, 1003), (2, 70_001)])
@pytest.mark.parametrize("bias", [False, True])
def test_likely_columns_are_the_largest(shape, bias):
    gen = torch.Generator().manual_seed(0)
    S = torch.randn(*shape, generator=gen).half()
    offset = torch.randn(shape[1], generator=gen) if bias else None
    found = centre.likely_columns(S, offset)
    exact = S if offset is None else S + offset
    largest = exact.topk(min(centre.LIKELY, shape[1])).values
    assert torch.equal(exact.gather(1, found).sort(descending=True).values, largest)


@pytest.mark.parametrize("change", ["a hidden unit adds -32", "hidden states and temperature times 0.25"])
def test_the_gate_can_fail(change):
    """Rounding the raw logits of both sides to bf16 fails at the first change, and at each one alone."""

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
    truth = evaluate(linear_divergence_reference, changed.double(), **told)
    with pytest.raises(AssertionError, match="relative error"):
        assert_on_target(evaluate(rounded_pair, changed, **told), truth, "default")
