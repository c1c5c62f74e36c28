"""Quantised frozen heads against the dequantised heads in float64."""

from dataclasses import replace

import pytest
import torch
from operators import TESTS, check_operators
from quantised_cases import QUANTISED, quantised_case, through_cache

import opsd_kernels
from opsd_kernels import (
    QuantizedHead,
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs,
    linear_logprobs_at,
    linear_topk,
    linear_topk_divergence,
)
from opsd_kernels._core import library, sliced_head
from opsd_kernels._core.sliced_head import SlicedHead
from opsd_kernels.objectives import PolicyGradient, linear_policy_divergence
from opsd_kernels.testing import assert_no_worse, assert_on_target, evaluate, plain_outcomes, relative_error
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.weights import EntropyGate

KINDS = list(QUANTISED)
ROLES = ("teacher", "student", "shared")
ALONE = ("workspace_bytes", "backward", "gradient_tolerance", "backend", "logits_dtype")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Slices of 64 rows, and a few rows at a time."""
    monkeypatch.setattr(sliced_head, "SLICED_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(sliced_head, "COPIED_BYTES", {"cpu": 700, "cuda": 700})


def check(case, op, target: str | None = None, **options):
    """Compare value and gradients with float64, beside plain PyTorch's error or within a target."""
    told = {name: value for name, value in options.items() if name not in ALONE}
    ours = evaluate(op, case, **options)
    truth = evaluate(linear_divergence_reference, case.double(), **told)
    if target is None:
        assert_no_worse(ours, plain_outcomes(case, **told), truth)
    else:
        assert_on_target(ours, truth, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_dequantised_head(backend, dtype, role, kind):
    case, op, _ = quantised_case(kind, role, dtype)
    target = None if dtype.itemsize > 2 else "default" if role == "shared" else "fp32_logits"
    check(case, op, target, backend=backend)


OPTIONS = {
    "forward_kl, chunks": {"divergence": "forward_kl", "workspace_bytes": 20000},
    "jsd, softcap, temperatures": {
        "divergence": "jsd", "student_softcap": 9.0, "temperature": 0.7, "teacher_temperature": 1.3,
    },
    "tvd": {"divergence": "tvd"},
    "mixed_kl, per token": {"divergence": "mixed_kl", "beta": 0.3, "reduction": "none"},
    "recompute": {"backward": "recompute", "workspace_bytes": 20000},
    "top 5": {"topk": 5},
    "a weighting": {"token_weights": EntropyGate("student", below=2.0)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("role", ROLES)
def test_options(name, role):
    told = OPTIONS[name]
    made = {"largest_logit": 8.0, "views": False} if "topk" in told else {}
    case, op, _ = quantised_case("float8_e4m3fn, blocks", role, torch.float32, padding=3, **made)
    if "topk" in told or "token_weights" in told:
        case = replace(case, token_weights=None)
    check(case, op, **told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_near_teacher_under_one_quantised_head(kind, dtype):
    """The difference GEMM keeps the digits of a teacher at 1e-4 nats, as under a dense head."""
    case, op, head = quantised_case(kind, "shared", dtype, near=1e-4, largest_logit=12.0)
    truth = evaluate(linear_divergence_reference, case.double())
    ours, dense = (evaluate(each, case) for each in (op, linear_divergence))
    for name in ("loss", "student_hidden"):
        errors = [relative_error(getattr(x, name), getattr(truth, name)) for x in (ours, dense)]
        # Sums over slices round in another order than one product: of two like errors one is up to 1.5 times
        # the other.
        assert errors[0] <= 1.5 * errors[1] + torch.finfo(dtype).eps / 8, (name, errors)
    # The same tensors in another object are the same head.
    again = QuantizedHead(head.values, head.scales, head.zero_points, head.block_size)
    h, t = case.student_hidden.detach(), case.teacher_hidden
    options = case.options()
    assert torch.equal(
        linear_divergence(h, head, t, head, **options), linear_divergence(h, head, t, again, **options)
    )


def test_rows_of_a_slice_are_those_of_the_dequantised_head():
    """Every byte of both float8 types, NaN and infinities included, and rows by number."""
    bits = torch.arange(256, dtype=torch.uint8).view(2, 128).repeat(50, 1)
    for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
        head = QuantizedHead(bits.view(stored), torch.rand(100) + 0.5)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            sliced = SlicedHead(head.values, head, 0, 100, dtype, torch.device("cpu"))
            dense = head.dequantize(dtype)
            rows = torch.cat([rows.clone() for _, rows in sliced.slices()])
            torch.testing.assert_close(rows, dense, rtol=0, atol=0, equal_nan=True)
            some = torch.tensor([[3, 99], [7, 7]])
            torch.testing.assert_close(sliced[some], dense[some], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                sliced[5:80][some % 75], dense[5:80][some % 75], rtol=0, atol=0, equal_nan=True
            )


def test_no_tensor_of_the_head_s_size_is_made(monkeypatch):
    """All tensors of the loop that are as wide as the head have at most a slice's rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    V, H, N, seen = 1024, 40, 8, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if not isinstance(x, torch.Tensor) or x.shape[-1:] != (H,) or x.element_size() == 1:
                    continue
                if x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():  # no view of it
                    seen.append(x.untyped_storage().nbytes() // (H * x.element_size()))
            return out

    weight = torch.randn(V, H).bfloat16()
    monkeypatch.setattr(library, "op", library._forward)  # a mode does not see into an operator
    head, h, t = QUANTISED["int8, rows"](weight), torch.randn(N, H, requires_grad=True), torch.randn(N, H)
    for student, teacher in ((head, head), (weight, head), (weight, weight)):
        seen.clear()
        with Watch():
            linear_divergence(h, student, t, teacher).backward()
        assert max(seen) == 64


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_gradient_tolerance(tolerance):
    case, op, _ = quantised_case("float8_e4m3fn, blocks", "shared", torch.float32, largest_logit=30.0)
    case = replace(case, student_bias=None, teacher_bias=None)
    exact = evaluate(op, case)
    some = evaluate(op, case, gradient_tolerance=tolerance, return_stats=True)
    dense = evaluate(linear_divergence, case, gradient_tolerance=tolerance, return_stats=True)
    assert some.stats.gradient_dropped <= tolerance
    assert relative_error(some.student_hidden, dense.student_hidden) < 1e-5
    assert relative_error(some.student_hidden, exact.student_hidden) <= 2 * tolerance + 1e-5


def test_sibling_ops():
    case, _, head = quantised_case(
        "float8_e4m3fn, rows", "shared", torch.float32, largest_logit=8.0, views=False
    )
    h, dense, t, V = case.student_hidden, case.student_weight, case.teacher_hidden, 203
    valid = case.mask & (case.labels >= 0)
    ids, labels = torch.randint(V, (31, 4)), torch.randint(V, (31,))
    logits = torch.randn(31, V)
    term = PolicyGradient(torch.ones(31))

    def results(weight):
        hidden = h.clone().requires_grad_()
        listed = linear_topk(t, weight, 5, mask=valid)
        losses = [
            linear_logprobs(hidden, weight, labels, mask=valid).sum(),
            linear_logprobs(hidden, weight, labels, mask=valid, return_entropy=True)[1].sum(),
            linear_logprobs_at(hidden, weight, ids, mask=valid).sum(),
            linear_topk_divergence(hidden, weight, listed.ids, listed.logprobs, mask=valid),
            linear_divergence_to(hidden, weight, logits, mask=valid),
            linear_policy_divergence(hidden, weight, t, weight, labels=labels, policy=term, mask=valid),
        ]
        return [listed.logprobs, *losses, *(torch.autograd.grad(x, hidden)[0] for x in losses)]

    for ours, truth in zip(results(head), results(dense), strict=True):
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cached_forward_kl(dtype, role, kind):
    """Making the cache and using it, both on the quantised head, in several chunks."""
    case, _, head = quantised_case(
        kind, role, dtype, largest_logit=8.0, frozen_head=True, masked_entry=None, padding=3
    )
    told = {"divergence": "forward_kl"}
    truth = evaluate(linear_divergence_reference, case.double(), **told)
    ours = evaluate(through_cache(role, head), case, workspace_bytes=20000, **told)
    if dtype.itemsize > 2:
        assert_no_worse(ours, plain_outcomes(case, **told), truth)
    else:
        assert_on_target(ours, truth, "default")


def test_a_cache_knows_its_quantised_head():
    _, _, head = quantised_case("int4 in int8, groups, zero points", "shared", torch.float32)
    h, t = torch.randn(5, 24), torch.randn(5, 24)
    cache = cache_forward_kl(t, head, head)
    dense = linear_cached_forward_kl(h, head.dequantize(), cache)
    assert relative_error(linear_cached_forward_kl(h, head, cache), dense) < 1e-6
    moved = QuantizedHead(head.values, head.scales * 1.01, head.zero_points, head.block_size)
    with pytest.raises(ValueError, match="^student_weight: expected the head that the cache was made with"):
        linear_cached_forward_kl(h, moved, cache)


def test_several_teachers_with_quantised_heads():
    gen = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=gen)

    W, heads = (
        randn(203, 24),
        [QUANTISED["int8, rows"](randn(203, 24)), QUANTISED["float8_e4m3fn, blocks"](randn(203, 16))],
    )
    index = torch.arange(31) % 2
    teachers = [randn(31, 24), randn(31, 16).bfloat16()]
    results = []
    for weights in (heads, [heads[0].dequantize(), heads[1].dequantize(torch.bfloat16)]):
        h = randn(31, 24) if not results else results[0][0].detach()
        h.requires_grad_()
        loss = linear_divergence(h, W, teachers, weights, teacher_index=index)
        results.append((h, loss, torch.autograd.grad(loss, h)[0]))
    for ours, dense in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(ours, dense) < 1e-5


def test_gradcheck():
    _, _, head = quantised_case("int4 in int8, groups, zero points", "shared", torch.float64, N=3, V=70)
    h, t = (torch.randn(3, 24, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x: linear_divergence(x, head, t, head, reduction="none"), h.requires_grad_()
    )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", ["float8_e4m3fn, blocks", "int4 in int8, groups, zero points"])
def test_opcheck(kind, role):
    """The flat form of a quantised head. torch's test of schemas cannot multiply float8 tensors."""
    case, run, _ = quantised_case(kind, role, torch.bfloat16, N=5)
    tests = ("test_faketensor",) if "float8" in kind else TESTS
    check_operators(library, ("op",), lambda: evaluate(run, case), tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_as_one_graph(dtype):
    case, _, head = quantised_case("float8_e4m3fn, rows", "shared", dtype)
    t, options = case.teacher_hidden, case.options()

    def call(h, weight):
        return linear_divergence(h, weight, t, weight, **options)

    compiled, results = torch.compile(call, fullgraph=True, backend="aot_eager"), []
    for run in (call, compiled):
        h = case.student_hidden.detach().clone().requires_grad_()
        loss = run(h, head)
        results.append((loss, torch.autograd.grad(loss, h)[0]))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_the_cached_forward_kl_is_registered_and_compiles():
    case, _, head = quantised_case(KINDS[-1], "shared", torch.float32, frozen_head=True, masked_entry=None)
    cache = cache_forward_kl(case.teacher_hidden.nan_to_num(0, 0, 0), head, head)

    def call(h):
        return linear_cached_forward_kl(h, head, cache)

    results, h = [], case.student_hidden.nan_to_num(0, 0, 0).requires_grad_()
    assert check_operators(library, ("op",), lambda: call(h)) == 1
    for run in (call, torch.compile(call, backend="aot_eager")):
        loss = run(h)
        results.append((loss.detach(), torch.autograd.grad(loss, h)[0]))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_heads_from_torchao(monkeypatch):
    pytest.importorskip("torchao")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    h, t = torch.randn(9, 64, requires_grad=True), torch.randn(9, 64)
    configs = [
        Int8WeightOnlyConfig(),
        Float8WeightOnlyConfig(),
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    ]
    for config in configs:
        layer = torch.nn.Sequential(torch.nn.Linear(64, 203, bias=False))
        quantize_(layer, config)
        weight = layer[0].weight
        dense = weight.dequantize()
        for teacher in (True, False):
            results = []
            for each in (weight, dense):
                own = dense if teacher else each
                loss = linear_divergence(h, own, t, each)
                results.append((loss, torch.autograd.grad(loss, h)[0]))
            for ours, truth in zip(*results, strict=True):
                assert relative_error(ours, truth) < 1e-5, type(weight)


class Packed(torch.Tensor):
    """A tensor as torchao's whose values are packed for a device."""

    qdata = torch.zeros(4, 4, dtype=torch.int32)
    scale = torch.zeros(4, 1)
    block_size = (1, 8)


Packed.__module__ = "torchao.quantization.packed"


def values(V=6, H=8):
    return torch.zeros(V, H, dtype=torch.int8)


BAD = [
    (lambda: QuantizedHead(torch.zeros(6, 8), torch.ones(6)), TypeError, ["values", "int8", "float32"]),
    (lambda: QuantizedHead(values()[0], torch.ones(6)), ValueError, ["values", "(V, H)", "(8,)"]),
    (lambda: QuantizedHead(values(), torch.ones(6, dtype=torch.int8)), TypeError, ["scales", "int8"]),
    (lambda: QuantizedHead(values(), torch.ones(5)), ValueError, ["scales", "(6,)", "(5,)"]),
    (lambda: QuantizedHead(values(), torch.ones(2, 3)), ValueError, ["scales", "block_size", "(2, 3)"]),
    (
        lambda: QuantizedHead(values(), torch.ones(2, 2), block_size=(4, 8)),
        ValueError,
        ["scales", "(2, 1)", "(2, 2)"],
    ),
    (lambda: QuantizedHead(values(), torch.ones(2, 2), block_size=4), ValueError, ["block_size", "4"]),
    (lambda: QuantizedHead(values(), torch.ones(6), torch.ones(5)), ValueError, ["zero_points", "(5,)"]),
    (
        lambda: QuantizedHead(values().to(torch.float8_e5m2), torch.ones(6), torch.ones(6)),
        ValueError,
        ["zero_points", "None", "float8_e5m2"],
    ),
    (
        lambda: QuantizedHead(values().to(torch.float8_e5m2).requires_grad_(), torch.ones(6)),
        ValueError,
        ["values", "frozen", "gradient"],
    ),
    (
        lambda: linear_topk(torch.ones(2, 8), Packed(torch.ones(6, 8)), 2),
        TypeError,
        ["weight", "torchao", "Packed"],
    ),
    (
        lambda: linear_topk(torch.ones(2, 7), QuantizedHead(values(), torch.ones(6)), 2),
        ValueError,
        ["hidden", "8", "(2, 7)"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, error, parts", BAD)
def test_bad_arguments(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_it_is_public():
    assert opsd_kernels.QuantizedHead is QuantizedHead
