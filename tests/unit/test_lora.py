"""Heads with low-rank adapters against dense heads in float64."""

from dataclasses import replace

import pytest
import torch
from lora_cases import OPTIONS, WHICH, Adapted, adapted_case, frozen, outcome, target_of
from lora_cases import check as check_op
from operators import check_operators
from shapes_made import ShapesMade

from opsd_kernels import DistillationHead, linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels._core import adapted as adapted_module
from opsd_kernels._core import library
from opsd_kernels._core import lora as lora_module
from opsd_kernels.testing import assert_no_worse, assert_on_target, assert_same_bits
from opsd_kernels.testing.heads import with_dense_heads
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.weights import EntropyGate, PrefixDiscrepancy

dense = with_dense_heads(linear_divergence_reference)


def check(adapted: Adapted, op=linear_divergence, reference=dense, target: str | None = None, **options):
    check_op(op, reference, adapted, target, **options)


@pytest.fixture(params=[True, False], ids=["one GEMM", "slices"])
def joined(request, monkeypatch):
    """Run with the GEMM of head and adapter, where the machine has one, and with products of slices."""
    if not request.param:
        for module in (adapted_module, lora_module):
            monkeypatch.setattr(module, "joins", lambda device_type, dtype, H: False)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "shared head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_dense_heads(backend, joined, dtype, shared, which):
    if which == "one for both" and not shared:
        which = "both"
    case = adapted_case(31, 203, 24, dtype, which, shared_head=shared, largest_logit=12.0)
    check(case, backend=backend, target=target_of(dtype, shared), return_stats=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [1, 23])
def test_an_odd_hidden_size(dtype, H):
    """Pairs of 16-bit entries: an odd head takes the products of slices."""
    for shared in (False, True):
        case = adapted_case(19, 101, H, dtype, "both", shared_head=shared, largest_logit=8.0)
        check(case, target=target_of(dtype, shared))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "shared head"])
def test_options(name, shared):
    told = OPTIONS[name]
    made = {"largest_logit": 8.0, "views": False} if "topk" in told else {}  # no ties
    adapted = adapted_case(29, 101, 16, torch.float32, "both", shared_head=shared, padding=3, **made)
    if "topk" in told:
        adapted = replace(adapted, case=replace(adapted.case, token_weights=None))
    check(adapted, **told)
    check(frozen(adapted), **told)


@pytest.mark.parametrize("scheme", [EntropyGate("student", below=2.0), PrefixDiscrepancy(0.5)], ids=str)
@pytest.mark.parametrize("budget", [None, 9000])
def test_weights_of_the_loop_s_own_statistics(scheme, budget):
    adapted = adapted_case(28, 101, 16, torch.float32, "student", batch=4, shared_head=True)
    adapted = replace(adapted, case=replace(adapted.case, token_weights=None))
    check(adapted, token_weights=scheme, workspace_bytes=budget)
    check(frozen(adapted), token_weights=scheme, workspace_bytes=budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_adapter_of_another_dtype(joined, dtype, other):
    """peft keeps adapters of 16-bit models in fp32."""
    for shared in (False, True):
        adapted = adapted_case(
            23, 101, 16, dtype, "both", adapter_dtype=other, shared_head=shared, largest_logit=12.0
        )
        check(adapted, target=target_of(dtype, shared))
        gradients = outcome(linear_divergence, adapted)
        assert gradients["A"].dtype == gradients["B"].dtype == other


def test_only_the_adapter_is_trained():
    adapted = adapted_case(17, 67, 8, torch.float64, "student")
    case = replace(adapted.case, trainable=())
    for options in ({}, {"reduction": "none"}, {"backward": "recompute"}):
        check(replace(adapted, case=case), **options)


def test_no_valid_token():
    adapted = adapted_case(9, 67, 8, torch.float32, "student")
    case = replace(adapted.case, mask=torch.zeros(9, dtype=torch.bool))
    found = outcome(linear_divergence, replace(adapted, case=case))
    for value in found.values():
        assert_same_bits(value, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_siblings(dtype):
    adapted = adapted_case(21, 101, 16, dtype, "student", largest_logit=8.0)
    adapted = replace(adapted, case=replace(adapted.case, token_weights=None))
    gen = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(101, generator=gen)[:5] for _ in range(21)])
    logprobs = torch.rand(21, 5, generator=gen).log() - 3

    def listed(op):
        def run(h, W, t, Wt, *, teacher_bias=None, teacher_lora=None, **options):
            return op(h, W, ids, logprobs, **options)

        return run

    def of_labels(op):
        def run(h, W, t, Wt, *, labels, mask=None, student_bias=None, student_lora=None, **options):
            found = op(h, W, labels, bias=student_bias, mask=mask, lora=student_lora, return_entropy=True)
            return torch.stack(found)

        return run

    for tail in ("bucket", "renormalize", "none"):
        told = {"tail": tail, "return_stats": True}
        reference = listed(with_dense_heads(linear_topk_divergence_reference))
        check(adapted, listed(linear_topk_divergence), reference, **told)
    reference = of_labels(with_dense_heads(linear_logprobs_reference))
    check(adapted, of_labels(linear_logprobs), reference)
    check(frozen(adapted), of_labels(linear_logprobs), reference)


def test_gradcheck():
    adapted = adapted_case(5, 11, 3, torch.float64, "both", rank=2, bias=False, views=False)
    case = replace(adapted.case, labels=None, token_weights=None)
    clean = (torch.nan_to_num(x, 0.3, 0.3, 0.3) for x in (case.student_hidden, case.teacher_hidden))
    h, t = clean
    A, B, scaling = adapted.student

    def loss(h, W, A, B):
        adapters = {"student_lora": (A, B, scaling), "teacher_lora": adapted.teacher}
        return linear_divergence(h, W, t, case.teacher_weight, divergence="jsd", **adapters)

    leaves = [x.detach().clone().requires_grad_() for x in (h, case.student_weight, A, B)]
    torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_is_never_formed(narrow_slices, dtype):
    """With a frozen head no tensor has the head's size."""
    N, V, H = 13, 503, 40
    h, t, W = torch.randn(N, H), torch.randn(N, H), torch.randn(V, H)
    h, t, W = (x.to(dtype) for x in (h, t, W))
    A, B = (x.to(dtype).requires_grad_() for x in (torch.randn(4, H), torch.randn(V, 4)))
    with ShapesMade(W) as seen:
        h.requires_grad_()
        linear_divergence(h, W, t, W, student_lora=(A, B, 2.0)).backward()
    assert (V, H) not in seen.shapes and (H, V) not in seen.shapes and len(seen.shapes) > 3
    assert all(grad is not None for grad in (A.grad, B.grad, h.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
def test_opcheck(dtype, which, backward):
    adapted = adapted_case(13, 67, 8, dtype, which, shared_head=True, views=False)
    case = replace(adapted.case, mask=None, labels=None, token_weights=None)
    hidden = {name: torch.randn(13, 8).to(dtype) for name in ("student_hidden", "teacher_hidden")}
    clean = replace(adapted, case=replace(case, **hidden))
    count = check_operators(
        library, ("op", "op_backward"), lambda: outcome(linear_divergence, clean, backward=backward)
    )
    assert count == (1 if backward == "in_forward" else 2)


@pytest.mark.parametrize("backward", ["in_forward", "recompute"])
def test_compiled_as_one_graph(backward):
    torch._dynamo.reset()
    adapted = adapted_case(13, 67, 8, torch.float32, "both", shared_head=True)
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    found, expected = (outcome(op, adapted, backward=backward) for op in (compiled, linear_divergence))
    for name, value in expected.items():
        assert_no_worse(found[name], value, value)


def test_autocast_leaves_the_adapter_wide():
    adapted = adapted_case(19, 67, 16, torch.float32, "student", largest_logit=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(linear_divergence, adapted)
    truth = outcome(dense, adapted.double())
    for name in ("loss", "A", "B", "student_hidden"):
        assert ours[name].dtype == torch.float32
        # Hidden states and head are rounded to bf16.
        assert_on_target(ours[name], truth[name], "default")


def test_a_head_module_with_peft_s_layout():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 67, bias=False))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    h, t = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16)
    head = DistillationHead(layer, divergence="jsd")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    W = layer.base_layer.weight
    for teacher, expected in ((None, (A, B, 3.0)), (layer.base_layer, None)):
        got = torch.autograd.grad(head(h, t, teacher), (h, A, B))
        told = {"student_lora": (A, B, 3.0), "teacher_lora": expected, "divergence": "jsd"}
        truth = torch.autograd.grad(dense(h, W, t, W, **told), (h, A, B))
        for ours, exact in zip(got, truth, strict=True):
            assert_no_worse(ours, exact, exact)


@pytest.mark.parametrize(
    "value, error, match",
    [
        (3.0, TypeError, r"^student_lora: expected None or \(A, B, scaling\)"),
        ((torch.ones(2, 8), torch.ones(67, 2)), ValueError, "^student_lora: expected .*got 2 values"),
        ((torch.ones(2, 7), torch.ones(67, 2), 1.0), ValueError, r"^student_lora A: expected shape \(r, 8\)"),
        (
            (torch.ones(2, 8), torch.ones(66, 2), 1.0),
            ValueError,
            r"^student_lora B: expected shape \(67, 2\)",
        ),
        ((torch.ones(2, 8), torch.ones(67, 2), "a"), TypeError, "^student_lora scaling: expected a number"),
        ((torch.ones(2, 8).int(), torch.ones(67, 2), 1.0), TypeError, "^student_lora A: .*floating-point"),
        ((torch.ones(0, 8), torch.ones(67, 0), 1.0), ValueError, "^student_lora A: .*r >= 1"),
    ],
)
def test_errors(value, error, match):
    h, W = torch.ones(3, 8), torch.ones(67, 8)
    with pytest.raises(error, match=match):
        linear_divergence(h, W, h, W, student_lora=value)
