"""Test routes, passes and errors of `linear_logprobs`, `linear_topk_divergence` and the modules.

Their values are tested in tests/property/test_dialects.py.
"""

import inspect
from dataclasses import replace

import pytest
import torch

from opsd_kernels import (
    DistillationHead,
    LinearDivergenceLoss,
    linear_divergence,
    linear_logprobs,
    linear_topk_divergence,
)
from opsd_kernels._core import loop
from opsd_kernels.divergence import DEFAULTS, DivergenceOptions
from opsd_kernels.spec import KIND_NAMES, TAILS
from opsd_kernels.testing import assert_no_worse, assert_on_target, assert_same_bits, evaluate, hard_case
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)

N, V, H = 29, 211, 24


def logprobs_of(op, **how):
    """Return the log-probs of a case's student, in the signature of linear_divergence."""

    def run(
        h,
        W,
        t,
        Wt,
        *,
        labels,
        mask=None,
        student_bias=None,
        teacher_bias=None,
        token_weights=None,
        vocab_size=None,
        **options,
    ):
        return op(h, W, labels, bias=student_bias, mask=mask, vocab_size=vocab_size, **options, **how)

    return run


def topk_of(op, K=7, **how):
    """Return the divergence from the K most likely tokens of a case's teacher."""

    def run(h, W, t, Wt, *, teacher_bias=None, **options):
        valid = (options["mask"] & (options["labels"] != -100))[..., None]
        logits = torch.where(valid, t, 0.0).float() @ Wt.float().T
        logprobs, ids = (
            (logits if teacher_bias is None else logits + teacher_bias.float()).log_softmax(-1).topk(K)
        )
        return op(h, W, ids, logprobs, **options, **how)

    return run


@pytest.fixture
def passes(monkeypatch):
    """Record the names of the GEMMs, one entry per call."""
    seen = []
    for name in ("project", "accumulate_weight_grad"):
        inner = getattr(loop, name)
        monkeypatch.setattr(
            loop, name, lambda *args, inner=inner, name=name: (seen.append(name), inner(*args))
        )
    return seen


# ---------------------------------------------------------------- log-probs


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probs_by_dtype(backend, dtype, frozen):
    case = hard_case(N, V, H, dtype, largest_logit=8.0, frozen_head=frozen, padding=3)
    ours = evaluate(logprobs_of(linear_logprobs, backend=backend, workspace_bytes=60_000), case)
    truth = evaluate(logprobs_of(linear_logprobs_reference), case.double())
    if dtype == torch.float32:
        assert_no_worse(ours, evaluate(logprobs_of(linear_logprobs_reference), case), truth)
    else:
        assert_on_target(ours, truth, "fp32_logits")
    assert ours.loss.dtype == torch.float32 and ours.student_hidden.dtype == dtype


def test_passes_over_one_head(backend, passes):
    """Passes: 1 without gradients, 1 + 3 for a trainable head, 2 + 0 for a frozen one (recompute: 1 + 2)."""
    for frozen, how, forward, backward in (
        (False, {}, 1, 3),
        (True, {}, 2, 0),
        (True, {"backward": "recompute"}, 1, 2),
    ):
        case = hard_case(N, V, H, frozen_head=frozen).leaves()
        passes.clear()
        result = linear_logprobs(
            case.student_hidden, case.student_weight, case.labels, mask=case.mask, backend=backend, **how
        )
        assert len(passes) == forward
        result.sum().backward()
        assert len(passes) == forward + backward
    passes.clear()
    with torch.no_grad():
        linear_logprobs(
            case.student_hidden, case.student_weight, case.labels, mask=case.mask, backend=backend
        )
    assert passes == ["project"]


def test_entropy_is_differentiable_beside_the_log_prob(backend):
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0)

    def both(op, **how):
        run = logprobs_of(op, return_entropy=True, **how)
        return lambda *heads, **options: torch.stack(run(*heads, **options)).sum(0)

    truth = evaluate(both(linear_logprobs_reference), case)
    assert_no_worse(evaluate(both(linear_logprobs, backend=backend), case), truth, truth)


def test_log_probs_compile_whole(backend):
    case = hard_case(N, V, H, torch.float32)
    run = logprobs_of(linear_logprobs, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(evaluate(compiled, case).loss, evaluate(run, case).loss)
    truth = evaluate(logprobs_of(linear_logprobs_reference), case.double())
    assert_no_worse(evaluate(compiled, case), evaluate(run, case), truth)


def test_a_listed_teacher_compiles_whole(backend):
    case = hard_case(N, V, H, torch.float32)
    ids, logprobs = torch.arange(7).repeat(N, 1), torch.linspace(-1, -4, 7).repeat(N, 1)

    def run(h, W, t, Wt, *, teacher_bias, **options):
        return linear_topk_divergence(h, W, ids, logprobs, **options, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(evaluate(compiled, case).loss, evaluate(run, case).loss)


def test_no_tokens_and_nothing_valid(backend):
    weight = torch.randn(V, H, requires_grad=True)
    empty = linear_logprobs(
        torch.randn(0, H, requires_grad=True), weight, torch.zeros(0, dtype=torch.int64), backend=backend
    )
    assert empty.shape == (0,)
    masked = linear_logprobs(torch.full((3, H), torch.nan), weight, torch.full((3,), -100), backend=backend)
    assert_same_bits(masked.detach(), torch.zeros(3))
    (grad,) = torch.autograd.grad(masked.sum(), weight)
    assert_same_bits(grad, torch.zeros(V, H))


# ---------------------------------------------------------------- a listed teacher


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_listed_teacher_by_dtype(backend, tail, divergence, dtype):
    case = hard_case(N, V, H, dtype, largest_logit=8.0)
    options = {"divergence": divergence, "tail": tail}
    ours = evaluate(topk_of(linear_topk_divergence, backend=backend, workspace_bytes=60_000), case, **options)
    truth = evaluate(topk_of(linear_topk_divergence_reference), case.double(), **options)
    if dtype == torch.float32:
        assert_no_worse(ours, evaluate(topk_of(linear_topk_divergence_reference), case, **options), truth)
    else:
        assert_on_target(ours, truth, "fp32_logits")


def test_a_listed_teacher_takes_three_passes(backend, passes):
    case = hard_case(N, V, H)
    evaluate(topk_of(linear_topk_divergence, backend=backend), case)
    assert sorted(passes) == ["accumulate_weight_grad", "project", "project"]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    "divergence", [name for name in KIND_NAMES if name not in ("forward_kl", "mixed_kl")]
)
def test_a_student_without_mass_on_the_list(backend, tail, divergence):
    """A bias of -inf at the only listed entry. (A forward KL is +inf there, without a gradient.)"""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(7, 1, generator=gen, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    bias[3] = -torch.inf
    listed = torch.tensor([[3, 0]]), torch.tensor([[-1.0, -torch.inf]], dtype=torch.float64)
    told = {"divergence": divergence, "tail": tail, "student_bias": bias}
    truth = linear_topk_divergence_reference(hidden, weight, *listed, **told)
    loss = linear_topk_divergence(hidden, weight, *listed, **told, backend=backend)
    assert_no_worse(loss, truth, truth)
    slopes = [torch.autograd.grad(value, hidden)[0] for value in (loss, truth)]
    assert_no_worse(slopes[0], slopes[1], slopes[1])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mixed_kl"])
@pytest.mark.parametrize("k", [1, 3])
def test_renormalised_where_the_student_has_less_than_the_least_number(backend, k, divergence):
    """The student's log-probs on the list are below -87 nats, where fp32 has no probabilities left."""
    torch.manual_seed(0)
    weight = torch.randn(31, H)
    weight[0] = 0
    weight[0, 0] = 100.0
    hidden = torch.randn(6, H)
    hidden[:, 0] = torch.tensor([0.8, 0.9, 1.0, 1.05, 1.5, 3.0])
    listed = (torch.randint(30, (6, 1)) + torch.arange(k)) % 30 + 1
    teacher = torch.randn(6, k).log_softmax(-1) - 0.1
    told = {"divergence": divergence, "tail": "renormalize", "reduction": "none"}
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    losses = (
        linear_topk_divergence(*inputs, listed, teacher, **told, backend=backend),
        linear_topk_divergence_reference(*inputs, listed, teacher, **told),
        linear_topk_divergence_reference(*wide, listed, teacher.double(), **told),
    )
    assert_no_worse(*losses)
    sources = inputs, inputs, wide
    slopes = [torch.autograd.grad(value.sum(), x) for value, x in zip(losses, sources, strict=True)]
    for each in zip(*slopes, strict=True):
        assert_no_worse(*each)


def test_the_whole_vocabulary_listed_is_the_divergence(backend):
    """A list of all of V, in any order, equals the whole teacher."""
    case = hard_case(N, V, H, torch.float64, largest_logit=8.0)
    truth = evaluate(linear_divergence, case, divergence="forward_kl", backend=backend)
    listed = evaluate(
        topk_of(linear_topk_divergence, K=V, tail="renormalize", backend=backend), replace(case)
    )
    assert_on_target(listed, truth, "fp32_logits")  # the list is fp32


def test_statistics_of_a_listed_teacher(backend):
    case = hard_case(N, V, H, torch.float32)
    _, stats = topk_of(linear_topk_divergence, backend=backend, return_stats=True, token_clip=0.5)(
        *case.inputs(), **case.options()
    )
    assert (
        stats.teacher_entropy
        is stats.teacher_max_prob
        is stats.top1_agreement
        is stats.teacher_logprob
        is None
    )
    assert stats.student_entropy.shape == stats.student_logprob.shape == stats.clipped_fraction.shape == (N,)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda ids, lp: (ids.int(), lp), TypeError, "teacher_topk_ids: expected dtype int64"),
        (lambda ids, lp: (ids + V, lp), ValueError, r"teacher_topk_ids: expected entries in \[0, 211\)"),
        (lambda ids, lp: (ids, lp[:, :3]), ValueError, r"teacher_topk_logprobs: expected shape \(29, 7\)"),
        (lambda ids, lp: (ids[0], lp[0]), ValueError, r"teacher_topk_ids: expected shape \(29, K\)"),
        (lambda ids, lp: (ids, ids), TypeError, "teacher_topk_logprobs: expected a floating-point tensor"),
    ],
    ids=["dtype", "range", "K", "rows", "logprobs"],
)
def test_bad_lists(change, error, message):
    ids, logprobs = torch.arange(7).repeat(N, 1), torch.full((N, 7), -3.0)
    with pytest.raises(error, match=message):
        linear_topk_divergence(torch.randn(N, H), torch.randn(V, H), *change(ids, logprobs))


# ---------------------------------------------------------------- modules


def test_the_options_are_those_of_the_function():
    parameters = {
        name: p.default
        for name, p in inspect.signature(linear_divergence).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    assert parameters == DEFAULTS and set(parameters) == set(DivergenceOptions.__annotations__)


def test_a_loss_module_is_the_function(backend):
    case = hard_case(N, V, H, torch.float32)
    options = {"divergence": "jsd", "beta": 0.3, "temperature": 0.8, "backend": backend}
    module = LinearDivergenceLoss(**options)
    assert_same_bits(evaluate(module, case), evaluate(linear_divergence, case, **options))
    assert not list(module.parameters()) and "beta=0.3" in repr(module)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"divergance": "jsd"},
            TypeError,
            "options: expected arguments of linear_divergence, got 'divergance'",
        ),
        ({"divergence": "kl"}, ValueError, "divergence: expected one of"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
        ({"beta": 0.0, "divergence": "jsd"}, ValueError, "beta: expected .* use divergence='forward_kl'"),
    ],
    ids=["unknown", "divergence", "reduction", "beta"],
)
def test_modules_complain_when_they_are_made(options, error, message):
    for make in (LinearDivergenceLoss, lambda **given: DistillationHead(torch.nn.Linear(H, V), **given)):
        with pytest.raises(error, match=message):
            make(**options)


@pytest.mark.parametrize("bias", [True, False])
def test_a_distillation_head(backend, bias):
    """The head serves both sides, or the teacher has its own."""
    torch.manual_seed(0)
    own, other = torch.nn.Linear(H, V, bias=bias), torch.nn.Linear(16, V, bias=bias)
    head = DistillationHead(own, divergence="forward_kl", backend=backend)
    h, same, wide = torch.randn(2, 5, H), torch.randn(2, 5, H), torch.randn(2, 5, 16)
    for teacher, layer, given in ((same, own, ()), (wide, other, (other,))):
        loss = head(h, teacher, *given, mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
        options = {
            "student_bias": own.bias,
            "teacher_bias": layer.bias,
            "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        }
        plain = linear_divergence_reference(
            h, own.weight, teacher, layer.weight, divergence="forward_kl", **options
        )
        truth = linear_divergence_reference(
            h.double(), own.weight.double(), teacher.double(), layer.weight.double(), divergence="forward_kl",
            **{
                name: value.double() if name.endswith("bias") and value is not None else value
                for name, value in options.items()
            },
        )  # fmt: skip
        assert_no_worse(loss.detach(), plain.detach(), truth.detach())
        assert torch.autograd.grad(loss, own.weight)[0].shape == (V, H)
    assert sum(p.numel() for p in head.parameters()) == sum(p.numel() for p in own.parameters())
    with pytest.raises(TypeError, match="lm_head: expected a linear layer"):
        DistillationHead(torch.nn.ReLU())
    with pytest.raises(TypeError, match="teacher_head: expected a module .*, got list"):
        head(h, [same, wide], [own, other], teacher_index=torch.zeros(2, 5, dtype=torch.int64))


class OtherBias(torch.nn.Linear):
    def __init__(self):
        super().__init__(H, V)
        self.bias = torch.nn.Parameter(torch.zeros(V + 1))


@pytest.mark.parametrize(
    "make, got",
    [
        (torch.nn.ReLU, "ReLU without them"),
        (lambda: torch.nn.Embedding(V, H), "Embedding without them"),
        (lambda: torch.nn.Conv1d(H, V, 1), rf"Conv1d of weight \({V}, {H}, 1\) and bias \({V},\)"),
        (OtherBias, rf"OtherBias of weight \({V}, {H}\) and bias \({V + 1},\)"),
    ],
)
def test_a_head_that_is_no_linear_layer(make, got):
    head, h = DistillationHead(torch.nn.Linear(H, V)), torch.randn(2, 5, H)
    expected = r"expected a linear layer with weight \(V, H\) and bias \(V,\) or None, got"
    with pytest.raises(TypeError, match=f"^lm_head: {expected} {got}$"):
        DistillationHead(make())
    with pytest.raises(TypeError, match=f"^teacher_head: {expected} {got}$"):
        head(h, h, make())


@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed_kl"])
def test_a_bucket_at_its_bound_leaves_the_gradient_of_the_support(backend, divergence):
    """The student's tail is below 1e-7, so its bucket is constant: the support's q do not sum to 1."""
    hidden, weight = torch.eye(1).double(), torch.tensor([[20.0], [1.0], [0.0]]).double()
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[-1e-3]]).double()
    grads = []
    for op in (linear_topk_divergence, linear_topk_divergence_reference):
        h = hidden.clone().requires_grad_()
        how = {"backend": backend} if op is linear_topk_divergence else {}
        loss = op(h, weight, ids, logprobs, divergence=divergence, tail="bucket", **how)
        grads.append(torch.autograd.grad(loss, h)[0])
    assert_no_worse(*grads, grads[1])


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("shared_head", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_bucket_of_little_mass_keeps_its_digits(backend, divergence, shared_head, side):
    """Of 1e-2 to 1e-6: as 1 minus the support's the gradient of the forward KL would be off by 1 %.

    The bound is that of float64, 1e-5 of the largest entry: plain PyTorch's error is no excuse.
    """
    near = 1e-2 if shared_head else None
    case = hard_case(
        30, 203, 24, shared_head=shared_head, near=near, largest_logit=20.0, widths=(1.0, 0.8), views=False
    )
    case, told = replace(case, token_weights=None), {"divergence": divergence, "topk_support": side}
    truth = evaluate(linear_divergence_reference, case.double(), topk=20, **told)
    for how in ({}, {"backward": "recompute", "workspace_bytes": 9000}):
        ours = evaluate(linear_divergence, case, topk=20, backend=backend, **told, **how)
        assert_no_worse(ours, truth, truth)
