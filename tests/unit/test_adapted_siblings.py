"""Adapters of heads in the ops beside `linear_divergence`, against dense heads in float64."""

from dataclasses import replace

import pytest
import torch
from lora_cases import Adapted, adapted_case, check, frozen, outcome
from lora_siblings import SIBLINGS, rows_of_ids, through_cache
from operators import check_operators
from shapes_made import ShapesMade

from opsd_kernels import (
    LinearDivergenceLoss,
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs_at,
    linear_topk,
)
from opsd_kernels._core import listed
from opsd_kernels.testing import assert_no_worse, assert_on_target, assert_same_bits
from opsd_kernels.testing.heads import dense_head, with_dense_heads
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing.reference_lists import linear_topk_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case_of(dtype: torch.dtype, which: str = "student", **made) -> Adapted:
    adapted = adapted_case(21, 101, 16, dtype, which, largest_logit=8.0, **made)
    return replace(adapted, case=replace(adapted.case, token_weights=None))


def target_of(name: str) -> str:
    """A policy's gradient and that of a divergence cancel in part, but not the rounding of either."""
    return "captured" if name == "policy" else "fp32_logits"


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend, dtype, name):
    op, reference = SIBLINGS[name]
    target = None if dtype.itemsize > 2 else target_of(name)
    for budget in (None, 9000):
        for adapted in (case_of(dtype), frozen(case_of(dtype))):
            check(op, reference, adapted, target, backend=backend, workspace_bytes=budget)


@pytest.mark.parametrize("name", SIBLINGS)
def test_an_adapter_in_fp32_of_a_16_bit_head(name):
    op, reference = SIBLINGS[name]
    check(op, reference, case_of(torch.bfloat16, adapter_dtype=torch.float32), target_of(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_list_of_an_adapted_head(backend, dtype):
    adapted = case_of(dtype)
    case, (A, B, scaling) = adapted.case, adapted.student
    mask = case.mask & (case.labels != -100)
    told = {"bias": case.student_bias, "mask": mask, "temperature": 0.8}
    found = linear_topk(
        case.student_hidden, case.student_weight, 9, lora=(A, B, scaling), backend=backend, **told
    )

    def dense(cast):
        head = dense_head(cast(case.student_weight), (cast(A), cast(B), scaling))
        how = {**told, "bias": cast(told["bias"])}
        return linear_topk_reference(cast(case.student_hidden), head, 9, **how)

    ids, *truth = dense(torch.Tensor.double)
    _, *plain = dense(lambda x: x)
    if dtype == torch.float64:
        assert torch.equal(found.ids, ids)
    for ours, peer, exact in zip(found[1:], plain, truth, strict=True):
        if dtype.itemsize == 2:
            assert_on_target(ours, exact, "fp32_logits")
        else:
            assert_no_worse(ours, peer, exact)


# ---------------------------------------------------------------- the cached forward KL


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cached_forward_kl(backend, dtype, which):
    """A frozen adapter of the student is part of its head."""
    case = frozen(case_of(dtype, which, frozen_head=True))
    reference = with_dense_heads(linear_divergence_reference)

    def run(op, adapted, **how):
        live = adapted.case.leaves()
        adapters = {"student_lora": adapted.student, "teacher_lora": adapted.teacher}
        loss = op(*live.inputs(), divergence="forward_kl", **live.options(), **adapters, **how)
        return loss.detach(), *torch.autograd.grad(loss, live.student_hidden)

    ours, truth = run(through_cache, case, backend=backend), run(reference, case.double())
    if dtype.itemsize == 2:
        for found, exact in zip(ours, truth, strict=True):
            assert_on_target(found, exact, "default")
        return
    for found, peer, exact in zip(ours, run(reference, case), truth, strict=True):
        assert_no_worse(found, peer, exact)


def test_a_cache_belongs_to_one_adapter():
    h, t, W = torch.randn(5, 8), torch.randn(5, 8), torch.randn(67, 8)
    A, B = torch.randn(2, 8), torch.randn(67, 2)
    cache = cache_forward_kl(t, W, W, student_lora=(A, B, 0.5))
    linear_cached_forward_kl(h, W, cache, student_lora=(A, B, 0.5))
    for other in (None, (A, B, 0.6), (A, B + 0.1, 0.5)):
        with pytest.raises(ValueError, match="^student_weight: expected the head that the cache was made"):
            linear_cached_forward_kl(h, W, cache, student_lora=other)
    with pytest.raises(ValueError, match="^student_lora B: expected no gradient"):
        linear_cached_forward_kl(h, W, cache, student_lora=(A, B.requires_grad_(), 0.5))
    with pytest.raises(ValueError, match=r"^student_lora A: expected shape \(r, 8\)"):
        cache_forward_kl(t, W, W, student_lora=(A[:, :7], B, 0.5))
    with pytest.raises(ValueError, match=r"^teacher_lora A: expected shape \(r, 8\)"):
        cache_forward_kl(t, W, W, teacher_lora=(A[:, :7], B, 0.5))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_cache_of_meta_tensors_has_its_shapes(adapted):
    def through(device: str):
        made = {"h": (3, 4, 8), "t": (3, 4, 6), "W": (67, 8), "U": (67, 6), "A": (2, 8), "B": (67, 2)}
        x = {name: torch.randn(shape).to(device) for name, shape in made.items()}
        lora = (x["A"], x["B"], 0.5) if adapted else None
        mask = torch.ones(3, 4, dtype=torch.bool, device=device)
        cache = cache_forward_kl(x["t"], x["U"], x["W"], mask=mask, student_lora=lora)
        h = x["h"].requires_grad_()
        loss = linear_cached_forward_kl(h, x["W"], cache, mask=mask, reduction="none", student_lora=lora)
        return [
            *(getattr(cache, name) for name in ("mean", "bias", "token", "sample")),
            loss,
            *grads(loss, h),
        ]

    def grads(loss, h):
        return torch.autograd.grad(loss.sum(), h)

    for meta, real in zip(through("meta"), through("cpu"), strict=True):
        assert meta.is_meta and meta.shape == real.shape and meta.dtype == real.dtype


# ---------------------------------------------------------------- autograd, compile, memory


@pytest.mark.parametrize("name", SIBLINGS)
def test_gradcheck(name):
    op, _ = SIBLINGS[name]
    adapted = adapted_case(5, 11, 3, torch.float64, "student", rank=2, bias=False, views=False)
    case = replace(adapted.case, token_weights=None, mask=torch.ones(5, dtype=torch.bool))
    h, t = (torch.nan_to_num(x, 0.3, 0.3, 0.3) for x in (case.student_hidden, case.teacher_hidden))
    A, B, scaling = adapted.student
    labels = case.labels.clamp(min=0)

    def loss(h, W, A, B):
        told = {"labels": labels, "mask": case.mask, "student_lora": (A, B, scaling)}
        return op(h, W, t, case.teacher_weight, **told)

    if name == "policy":  # its value has no gradient; that of the term is its slope
        pytest.skip("the gradient of a policy term is not that of the value")
    leaves = [x.detach().clone().requires_grad_() for x in (h, case.student_weight, A, B)]
    torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("name", [name for name in SIBLINGS if name != "policy"])  # it breaks the graph
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    op, _ = SIBLINGS[name]
    adapted = case_of(torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found, expected = outcome(compiled, adapted), outcome(op, adapted)
    for key, value in expected.items():
        assert_no_worse(found[key], value, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    h, W = torch.randn(13, 8).to(dtype).requires_grad_(), torch.randn(67, 8).to(dtype).requires_grad_()
    A, B = (x.to(dtype).requires_grad_() for x in (torch.randn(2, 8), torch.randn(67, 2)))

    def run():
        linear_topk(h, W, 3, lora=(A, B, 0.5))
        linear_logprobs_at(h, W, torch.randint(67, (13, 4)), lora=(A, B, 0.5)).sum().backward()

    assert check_operators(listed, ("op_topk", "op_at", "op_at_backward"), run) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_second_head_is_made(narrow_slices, dtype):
    N, V, H = 13, 503, 40
    h, W = torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype)
    A, B = (x.to(dtype).requires_grad_() for x in (torch.randn(4, H), torch.randn(V, 4)))
    target, lora = torch.randn(N, V), (A, B, 2.0)
    with ShapesMade(W) as seen:
        linear_topk(h, W, 5, lora=lora)
        linear_logprobs_at(h, W, rows_of_ids(N, V), lora=lora).sum().backward()
        linear_divergence_to(h, W, target, student_lora=lora).backward()
        with torch.no_grad():
            cache = cache_forward_kl(h, W, W, student_lora=lora, teacher_lora=lora)
            linear_cached_forward_kl(h, W, cache, student_lora=lora)
    # A head in another dtype than the cache's fp32 is cast in slices, here of all rows.
    shapes = seen.shapes if dtype == torch.float32 else seen.shapes - {(V, H)}
    assert (V, H) not in shapes and (H, V) not in seen.shapes and len(seen.shapes) > 3
    assert all(grad is not None for grad in (A.grad, B.grad, h.grad))


def test_a_module_hands_adapters_on():
    adapted = case_of(torch.float32, "both")
    told = adapted.case.options()
    loss = LinearDivergenceLoss(divergence="jsd", teacher_lora=adapted.teacher)
    found = loss(*adapted.case.inputs(), student_lora=adapted.student, **told)
    adapters = {"student_lora": adapted.student, "teacher_lora": adapted.teacher}
    expected = linear_divergence(*adapted.case.inputs(), divergence="jsd", **adapters, **told)
    assert_same_bits(found, expected)
