"""Test the op inside PyTorch: repeated backward, equal bits, autocast, compile, opcheck."""

from dataclasses import replace

import pytest
import torch
from operators import check_operators

from opsd_kernels import linear_divergence
from opsd_kernels._core import library
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import linear_divergence_reference

ROUTES = [{"reduction": "mean"}, {"reduction": "mean", "backward": "recompute"}, {"reduction": "none"}]


def leaves_of(case):
    return [getattr(case, name) for name in case.trainable if getattr(case, name) is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen_head", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_backward_twice_gives_the_same_gradients(backend, dtype, frozen_head, options):
    live = hard_case(29, 211, 24, dtype, shared_head=True, near=1e-2, frozen_head=frozen_head).leaves()
    loss = linear_divergence(*live.inputs(), **live.options(), **options, backend=backend)
    first, second, last = (
        torch.autograd.grad(loss, leaves_of(live), torch.full_like(loss, 3.0), retain_graph=keep)
        for keep in (True, True, False)
    )
    for one, two, three in zip(first, second, last, strict=True):
        assert_same_bits(two, one)
        assert_same_bits(three, one)


@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_gradients_accumulate_and_own_their_memory(backend, options):
    """Two backward calls add up in .grad, and in-place changes of .grad do not affect a later backward."""
    live = hard_case(13, 67, 8).leaves()
    loss = linear_divergence(*live.inputs(), **live.options(), **options, backend=backend).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves_of(live)]
    for leaf in leaves_of(live):
        leaf.grad.mul_(7).zero_()
    loss.backward()
    for leaf, expected in zip(leaves_of(live), once, strict=True):
        assert_same_bits(leaf.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_two_runs_give_the_same_bits(backend, dtype, options):
    case = hard_case(67, 1003, 48, dtype)
    assert_same_bits(
        *(evaluate(linear_divergence, case, backend=backend, divergence="jsd", **options) for _ in range(2))
    )


def test_inputs_are_left_alone(backend):
    case = hard_case(29, 211, 24)
    before = {
        name: getattr(case, name).clone()
        for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "mask", "labels")
    }
    evaluate(linear_divergence, case, backend=backend)
    for name, value in before.items():
        assert_same_bits(getattr(case, name), value)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every second"])
def test_layouts_of_the_inputs(backend, layout):
    case = replace(hard_case(12, 67, 8, views=False), mask=None, labels=None, token_weights=None)
    case = replace(case, student_hidden=torch.randn(12, 8), teacher_hidden=torch.randn(12, 8))
    change = {
        "transposed": lambda x: x.t().contiguous().t(),
        "expanded": lambda x: x[:1].expand_as(x),
        "every second": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    }[layout]
    names = (
        ("student_hidden", "teacher_hidden")
        if layout == "expanded"
        else ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    )
    odd = replace(case, **{name: change(getattr(case, name)) for name in names})
    truth, plain = evaluate(linear_divergence_reference, odd.double()), plain_outcomes(odd)
    assert_no_worse(evaluate(linear_divergence, odd, backend=backend), plain, truth)


@pytest.mark.parametrize("shared_head", [True, False], ids=["shared head", "two heads"])
def test_autocast_computes_in_its_dtype(backend, shared_head):
    """Under autocast fp32 parameters meet bf16 arithmetic and get fp32 gradients, as in a matrix product."""
    case = hard_case(67, 1003, 32, torch.float32, shared_head=shared_head, near=1e-2, largest_logit=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = evaluate(linear_divergence, case, backend=backend)
    rounded = case._map(lambda t: t.bfloat16() if t.dim() == 2 and t.is_floating_point() else t)
    truth = evaluate(linear_divergence_reference, rounded.double())
    assert all(value.dtype == torch.float32 for _, value in ours.named())
    assert_on_target(ours, truth, "default")


def test_disabled_autocast_is_no_autocast(backend):
    case = hard_case(12, 67, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        inside = evaluate(linear_divergence, case, backend=backend)
    assert_same_bits(inside, evaluate(linear_divergence, case, backend=backend))


def test_a_missing_upstream_gradient_is_no_gradient(backend):
    """A call of which only the statistics are used gives no gradients and no error."""
    live = hard_case(12, 67, 8).leaves()
    loss, stats = linear_divergence(*live.inputs(), **live.options(), return_stats=True, backend=backend)
    assert loss.requires_grad and not stats.divergence.requires_grad
    other = (live.student_hidden.nan_to_num(0, 0, 0) * stats.divergence[:, None]).sum()
    other.backward()
    assert live.student_weight.grad is None


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("options", [*ROUTES, {"z_loss": 0.03}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(backend, options, dtype):
    case = replace(
        hard_case(13, 67, 8, dtype, padding=3, views=False), mask=None, labels=None, token_weights=None
    )
    case = replace(
        case, student_hidden=torch.randn(13, 8).to(dtype), teacher_hidden=torch.randn(13, 8).to(dtype)
    )
    told = {"backend": backend, "return_stats": "z_loss" not in options, **options}
    check_operators(library, ("op", "op_backward"), lambda: evaluate(linear_divergence, case, **told))


@pytest.mark.slow
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_compile_fullgraph(backend, options):
    """Per-token results equal those of eager bitwise; sums over tokens pass the gate."""
    torch._dynamo.reset()
    case = hard_case(13, 67, 8)

    def loss_of(*tensors, **named):
        return linear_divergence(*tensors, **named, **options, divergence="jsd", backend=backend) * 2.0

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    ours, eager = evaluate(compiled, case), evaluate(loss_of, case)
    reference = {name: value for name, value in options.items() if name == "reduction"}
    truth, plain = (
        evaluate(lambda *t, **n: 2 * linear_divergence_reference(*t, **n, **reference, divergence="jsd"), c)
        for c in (case.double(), case)
    )
    assert_no_worse(ours, plain, truth)
    if options["reduction"] == "none":
        assert_same_bits(ours.loss, eager.loss)


@pytest.mark.slow
def test_compile_takes_another_token_count(backend):
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (13, 20, 7):
        case = hard_case(N, 67, 8)
        truth, plain = evaluate(linear_divergence_reference, case.double()), plain_outcomes(case)
        assert_no_worse(evaluate(compiled, case, backend=backend), plain, truth)
