"""Test linear_divergence on hard cases against float64: no worse than plain PyTorch at the same dtype."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence, plan
from opsd_kernels._core import loop, planner
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    assert_no_growth,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

DIVERGENCES = tuple(KIND_NAMES)
TRANSFORM = {
    "temperature": 0.7,
    "teacher_temperature": 1.4,
    "student_logit_scale": 1.2,
    "teacher_logit_scale": 0.8,
}
TRANSFORM |= {"student_softcap": 25.0, "teacher_softcap": 30.0}
# name: arguments of the case, options of the op
SITUATIONS = {
    "two heads": ({}, {}),
    "shared head": ({"shared_head": True}, {}),
    "shared head, near": ({"shared_head": True, "near": 1e-3}, {"beta": 0.1}),
    "wider teacher": ({"teacher_width": 61}, {"beta": 0.9}),
    "padded vocabulary": ({"padding": 5}, {}),
    "padded shared head": ({"padding": 5, "shared_head": True, "near": 1e-1}, {"temperature": 2.0}),
    "transforms": ({}, TRANSFORM),
    "transforms, shared head": ({"shared_head": True, "bias": False}, TRANSFORM),
    "softcap, shared head": (
        {"shared_head": True, "masked_entry": None},
        {"student_softcap": 30.0, "teacher_softcap": 30.0, "temperature": 0.8},
    ),
    "frozen head": ({"frozen_head": True}, {}),
    "masked teacher entry": ({"masked_entry": "teacher"}, {}),
}


def three(case, op_options, **options):
    """Return the outcomes (op, plain PyTorch in several orders, truth)."""
    ours = evaluate(linear_divergence, case, **op_options, **options)
    return (
        ours,
        plain_outcomes(case, **options),
        evaluate(linear_divergence_reference, case.double(), **options),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_truth(backend, divergence, situation, dtype):
    made, options = SITUATIONS[situation]
    if made.get("masked_entry") == "teacher" and divergence in ("reverse_kl", "mixed_kl"):
        pytest.skip("infinite: test_an_entry_that_only_the_student_has")
    case = hard_case(29, 211, 48, dtype, **made)
    budget = 2 * 211 * dtype.itemsize * 9  # rows of about eight tokens: several chunks, the last one ragged
    results = three(
        case,
        {"backend": backend, "workspace_bytes": budget},
        divergence=divergence,
        reduction="sum",
        **options,
    )
    if divergence == "tvd" and "near" in made:
        # The gradient of entries at the kink p = q is arbitrary, and small.
        assert_on_target(results[0], results[2], "default")
        ours, plain, truth = results
        results = ours.value(), [outcome.value() for outcome in plain], truth.value()
    assert_no_worse(*results)


@pytest.mark.parametrize(
    "N, V, H", [(1, 2, 1), (1, 7, 3), (2, 3, 5), (67, 1003, 48), (5, 4099, 7), (301, 17, 1)]
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ragged_shapes(backend, divergence, N, V, H):
    for made in ({}, {"shared_head": True}, {"views": False}):
        # With a few entries, logits of 40 have a gradient of 1e-18.
        case = hard_case(N, V, H, torch.float32, largest_logit=40.0 if V > 10 else 4.0, **made)
        assert_no_worse(*three(case, {"backend": backend}, divergence=divergence, beta=0.25))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_16_bit_inputs(backend, divergence, dtype, shared_head):
    """fp32 logits meet their target on wide rows far from the teacher.

    bf16 logits of 40 are off by 0.1, so the default is tested on near rows (test_near_teacher.py).
    """
    case = hard_case(67, 1003, 64, dtype, shared_head=shared_head, largest_logit=8.0)
    ours, _, truth = three(case, {"backend": backend, "logits_dtype": torch.float32}, divergence=divergence)
    assert_on_target(ours, truth, "fp32_logits")
    assert (
        ours.student_hidden.dtype == ours.student_weight.dtype == dtype and ours.loss.dtype == torch.float32
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
@pytest.mark.parametrize("backward", ["auto", "in_forward", "recompute"])
@pytest.mark.parametrize("frozen_head", [True, False], ids=["frozen", "trainable"])
def test_reductions_by_both_routes(backend, reduction, backward, frozen_head):
    if (reduction, backward, frozen_head) == ("none", "in_forward", False):
        pytest.skip("an error: test_errors.py")
    case = hard_case(28, 211, 24, torch.float32, batch=4, frozen_head=frozen_head)
    mask = case.mask.clone()
    mask[2] = False  # a sequence without a valid token
    case = replace(case, mask=mask)
    results = three(
        case,
        {"backend": backend, "backward": backward, "workspace_bytes": 20_000},
        divergence="jsd",
        reduction=reduction,
    )
    assert_no_worse(*results)
    if reduction == "none":
        ignored = (mask == 0) | (case.labels == -100)
        assert_same_bits(results[0].loss[ignored], torch.zeros(int(ignored.sum())))


@pytest.mark.parametrize("normalizer", [7, 0.25, torch.tensor(13.0), torch.tensor(5)], ids=str)
def test_normalizer_replaces_the_denominator(backend, normalizer):
    case = hard_case(13, 67, 8, torch.float32)
    assert_no_worse(*three(case, {"backend": backend}, normalizer=normalizer))


def test_weights_do_not_enter_the_denominator(backend):
    case = hard_case(13, 67, 8, torch.float64)
    heavy = replace(case, token_weights=4 * case.token_weights)
    light, twice = (evaluate(linear_divergence, c, backend=backend) for c in (case, heavy))
    assert_no_worse(
        replace(twice, loss=twice.loss / 4), replace(twice, loss=light.loss), replace(twice, loss=light.loss)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_statistics(backend, divergence, shared_head):
    case = hard_case(29, 211, 24, torch.float32, shared_head=shared_head, batch=None, padding=3)
    options = {"divergence": divergence, "beta": 0.3, "temperature": 0.9, "return_stats": True}
    ours, plain, truth = three(case, {"backend": backend, "workspace_bytes": 30_000}, **options)
    for name, exact in truth.stats.items():
        got = getattr(ours.stats, name)
        assert got.dtype == torch.float32 and not got.requires_grad and got.shape == case.mask.shape
        assert_no_worse(got, [outcome.stats[name] for outcome in plain], exact)


def test_statistics_come_with_every_route(backend):
    case = hard_case(28, 67, 8, torch.float32, batch=4)
    expected = evaluate(linear_divergence_reference, case.double(), return_stats=True).stats
    plain = evaluate(linear_divergence_reference, case, return_stats=True).stats
    for options in ({"reduction": "none"}, {"backward": "recompute"}, {"reduction": "sequence_mean"}):
        stats = evaluate(linear_divergence, case, return_stats=True, backend=backend, **options).stats
        for name in expected:
            assert_no_worse(getattr(stats, name), plain[name], expected[name])
    with torch.no_grad():
        _, stats = linear_divergence(*case.inputs(), **case.options(), return_stats=True, backend=backend)
    assert_no_worse(stats.divergence, plain["divergence"], expected["divergence"])


def test_statistics_without_labels(backend):
    case = replace(
        hard_case(5, 67, 8, torch.float32, bias=False),
        labels=None,
        mask=torch.tensor([True, False, False, True, True]),
    )
    _, stats = linear_divergence(*case.inputs(), **case.options(), return_stats=True, backend=backend)
    assert stats.student_logprob is None and stats.teacher_logprob is None
    assert stats.student_entropy[1] == 0 and stats.student_entropy[0] > 0


def budget_for(
    chunks: int, N: int, V: int, H: int, dtype: torch.dtype, logits_dtype: torch.dtype | str
) -> int:
    """Return the largest budget, to 1 %, at which a call with a shared head takes `chunks` chunks."""
    name, budget = "float32" if logits_dtype is torch.float32 else logits_dtype, 1 << 24
    while plan(N, V, H, dtype=dtype, logits_dtype=name, workspace_bytes=budget).chunks < chunks:
        budget = budget * 99 // 100
    return budget


@pytest.mark.parametrize(
    "dtype, logits_dtype",
    [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_256_chunks_are_as_exact_as_one(backend, dtype, logits_dtype, divergence, monkeypatch):
    # At 256 rows the fp32 call would take four chunks, which are more exact than one.
    monkeypatch.setattr(planner, "WIDE_CPU_ROWS", 1024)
    case = hard_case(1023, 257, 16, dtype, shared_head=True, largest_logit=6.0)
    options = {"divergence": divergence, "reduction": "sum", "backend": backend, "logits_dtype": logits_dtype}
    truth = evaluate(linear_divergence_reference, case.double(), divergence=divergence, reduction="sum")
    one = evaluate(linear_divergence, case, **options, workspace_bytes=1 << 28)
    many = evaluate(
        linear_divergence,
        case,
        **options,
        workspace_bytes=budget_for(256, 1023, 257, 16, dtype, logits_dtype),
    )
    assert_no_growth(many, one, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize("options", [{}, {"backward": "recompute"}, {"logits_dtype": torch.float32}], ids=str)
def test_rows_of_logits_may_lie_apart(backend, dtype, shared_head, options, monkeypatch):
    """Rows may start at multiples of 128 bytes, as on CUDA; the gaps hold NaN and are never read."""
    monkeypatch.setattr(
        loop, "row_stride", lambda V, buffer, device_type: planner.row_stride(V, buffer, "cuda")
    )
    case = hard_case(29, 211, 48, dtype, shared_head=shared_head, near=1e-1, largest_logit=8.0)
    results = three(case, {"backend": backend, "workspace_bytes": 1 << 15, **options}, divergence="jsd")
    if dtype == torch.bfloat16:
        assert_on_target(
            results[0],
            results[2],
            "fp32_logits" if "logits_dtype" in options or not shared_head else "default",
        )
    else:
        assert_no_worse(*results)


def test_no_grad_needs_no_gradient_buffers_and_agrees(backend):
    case = hard_case(29, 211, 24, torch.float32)
    expected = evaluate(linear_divergence, case, backend=backend).loss
    live = case.leaves()
    with torch.no_grad():
        quiet = linear_divergence(*live.inputs(), **live.options(), backend=backend)
    detached = linear_divergence(*case.inputs(), **case.options(), backend=backend)
    assert not quiet.requires_grad and not detached.requires_grad
    assert_same_bits(quiet, detached)
    truth, plain = (evaluate(linear_divergence_reference, c).loss for c in (case.double(), case))
    assert_no_worse(quiet, plain, truth)
    assert_no_worse(expected, plain, truth)


@pytest.mark.parametrize(
    "trainable",
    [
        ("student_weight",),
        ("student_bias",),
        ("student_hidden", "student_bias"),
        ("student_weight", "student_bias"),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_subset_of_gradients(backend, trainable, reduction):
    case = replace(hard_case(13, 67, 8, torch.float32), trainable=trainable)
    assert_no_worse(*three(case, {"backend": backend}, reduction=reduction))


def test_the_teacher_receives_no_gradient(backend):
    case = replace(
        hard_case(13, 67, 8, torch.float32),
        trainable=("student_hidden", "teacher_hidden", "teacher_weight", "teacher_bias"),
    ).leaves()
    linear_divergence(*case.inputs(), **case.options(), backend=backend).backward()
    assert case.student_hidden.grad is not None
    assert (
        case.teacher_hidden.grad is None
        and case.teacher_weight.grad is None
        and case.teacher_bias.grad is None
    )


def test_a_tied_head_gets_the_student_gradient_alone(backend):
    """One parameter on both sides gives the gradient of plain PyTorch with a detached teacher."""
    case = hard_case(13, 67, 8, torch.float32, shared_head=True)
    head = case.student_weight.detach().clone().requires_grad_()
    hidden = case.student_hidden.detach().clone().requires_grad_()
    linear_divergence(hidden, head, case.teacher_hidden, head, **case.options(), backend=backend).backward(
        torch.tensor(3.0)
    )
    truth, plain = (evaluate(linear_divergence_reference, c) for c in (case.double(), case))
    assert_no_worse(head.grad, plain.student_weight, truth.student_weight)
    assert_no_worse(hidden.grad, plain.student_hidden, truth.student_hidden)
