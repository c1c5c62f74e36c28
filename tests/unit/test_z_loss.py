"""Test the z-loss, the log-sum-exps beside it, and whether a label is the student's most likely token."""

import math
from dataclasses import replace

import pytest
import torch
from operators import check_operators

from opsd_kernels import (
    LinearDivergenceLoss,
    linear_divergence,
    linear_topk_divergence,
    weights,
)
from opsd_kernels._core import library, loop
from opsd_kernels.objectives import OnPolicyDistillation, linear_policy_divergence
from opsd_kernels.testing import (
    LOGSUMEXP_NATS,
    assert_no_worse,
    assert_on_target,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.cases import with_bias_offset, with_offset
from opsd_kernels.testing.reference import linear_divergence_reference, linear_topk_divergence_reference

B, T, V, H, C = 4, 7, 211, 24, 0.03
N = B * T
BUDGET = 8 * 2 * V * 4  # chunks of a few rows, the last one ragged
TRANSFORM = {"temperature": 0.7, "student_logit_scale": 1.2, "student_softcap": 25.0, "teacher_mix": 0.3}
# name: arguments of the case, options of the op, how it computes
SITUATIONS = {
    "two heads": ({}, {}, {}),
    "shared head": ({"shared_head": True, "near": 1e-2}, {"divergence": "mixed_kl"}, {}),
    "one chunk": ({}, {}, {"workspace_bytes": None}),
    "transforms": ({}, TRANSFORM, {}),
    "padded": ({"padding": 3, "masked_entry": "teacher"}, {"divergence": "forward_kl"}, {}),
    "frozen head": ({"frozen_head": True}, {"divergence": "jsd"}, {}),
    "clips": ({}, {"entry_clip": 0.05, "token_clip": 0.4}, {}),
    "per token": ({}, {"reduction": "none", "token_clip": 0.4}, {}),
    "per token, frozen head": ({"frozen_head": True}, {"reduction": "none"}, {}),
    "recompute": ({}, {"divergence": "jsd"}, {"backward": "recompute"}),
    "sequences": ({"batch": B}, {"reduction": "sequence_mean"}, {}),
    "gate": ({"batch": B}, {"token_weights": weights.EntropyGate("student", below=2.0)}, {}),
    "prefix": ({"batch": B}, {"token_weights": weights.PrefixDiscrepancy(0.5)}, {}),
    "top k": ({}, {"topk": 5, "token_clip": 0.4}, {}),
    "top k of the teacher": ({}, {"topk": 5, "topk_support": "teacher", "topk_tail": "none"}, {}),
}


def made_case(made, told, dtype=torch.float32):
    case = hard_case(N, V, H, dtype, **{"largest_logit": 8.0, **made})
    return replace(case, token_weights=None) if "token_weights" in told else case


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_value_and_gradient(backend, situation, dtype):
    made, told, how = SITUATIONS[situation]
    case, told = made_case(made, told, dtype), {**told, "z_loss": C}
    ours = evaluate(linear_divergence, case, **told, **{"workspace_bytes": BUDGET, **how}, backend=backend)
    truth = evaluate(linear_divergence_reference, case.double(), **told)
    assert_no_worse(ours, plain_outcomes(case, **told), truth)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
def test_of_a_listed_teacher(backend, tail):
    case = made_case({}, {})
    logits = case.teacher_hidden.nan_to_num(0, 0, 0) @ case.teacher_weight.T
    logprobs, ids = logits.log_softmax(-1).topk(7)
    told = {"tail": tail, "token_clip": 0.4, "z_loss": C, "return_stats": True}

    def listed(op, **how):
        return lambda h, W, t, Wt, teacher_bias=None, **options: op(h, W, ids, logprobs, **options, **how)

    ours = evaluate(listed(linear_topk_divergence, backend=backend), case, **told)
    plain, truth = (
        evaluate(listed(linear_topk_divergence_reference), one, **told) for one in (case, case.double())
    )
    assert_no_worse(ours, plain, truth)
    for name in ("student_logsumexp", "label_is_top1"):
        assert_no_worse(getattr(ours.stats, name), plain.stats[name], truth.stats[name])
    assert ours.stats.teacher_logsumexp is None


@pytest.mark.parametrize("shared_head", [True, False], ids=["difference", "pair"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(backend, dtype, shared_head):
    """By default, and with 16-bit logits of two heads, which hold a constant of their row apart."""
    case = made_case({"shared_head": shared_head, "near": 1e-2 if shared_head else 2.0}, {}, dtype)
    told = {"z_loss": C, "return_stats": True, "teacher_mix": 0.25, "temperature": 0.8}
    for moved in (case, with_offset(case, 32.0), with_bias_offset(case, -300.0)):
        truth = evaluate(linear_divergence_reference, moved.double(), **told)
        ours = evaluate(linear_divergence, moved, **told, backend=backend, workspace_bytes=BUDGET)
        assert_on_target(ours, truth, "default" if shared_head else "fp32_logits")
        narrow = evaluate(linear_divergence, moved, **told, backend=backend, logits_dtype="input")
        for stats in (ours.stats, narrow.stats):
            for name in ("student_logsumexp", "teacher_logsumexp"):
                off = (getattr(stats, name) - truth.stats[name]).abs().max().item()
                assert off <= LOGSUMEXP_NATS / 0.8, f"{name} is off by {off}"


def test_the_divergence_stays_alone(backend):
    """Statistics and weights see the divergence, and 0 is no z-loss: the same bits."""
    case = made_case({}, {})
    plain, zero, more = (
        evaluate(linear_divergence, case, reduction="none", return_stats=True, backend=backend, z_loss=z)
        for z in (None, 0.0, C)
    )
    assert torch.equal(plain.loss, zero.loss) and torch.equal(plain.student_weight, zero.student_weight)
    exact = evaluate(linear_divergence_reference, case.double(), return_stats=True).stats["divergence"]
    assert_no_worse(more.stats.divergence, plain.stats.divergence, exact)
    assert more.loss.sum() > plain.loss.sum()


def test_where_a_weight_is_zero_nothing_enters(backend):
    case = replace(made_case({"masked_entry": "teacher"}, {}), token_weights=torch.zeros(N))
    outcome = evaluate(linear_divergence, case, z_loss=C, backend=backend)
    assert outcome.loss == 0 and not outcome.student_weight.any() and not outcome.student_hidden.any()


def test_zero_tokens(backend):
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
    loss, stats = linear_divergence(
        hidden, weight, hidden, weight, z_loss=C, return_stats=True, backend=backend
    )
    loss.backward()
    assert loss == 0 and not weight.grad.any() and stats.student_logsumexp.shape == (0,)


def test_it_costs_no_gemm(backend, monkeypatch):
    seen = []
    for name in ("project", "accumulate_weight_grad"):
        inner = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, i=inner, n=name: (seen.append(n), i(*a)))
    evaluate(linear_divergence, made_case({}, {}), z_loss=C, backend=backend)
    assert sorted(seen) == ["accumulate_weight_grad", "project", "project", "project"]


def test_it_is_an_option_of_the_module(backend):
    case = made_case({}, {})
    loss = LinearDivergenceLoss(z_loss=C, backend=backend)(*case.inputs(), **case.options())
    assert torch.equal(loss, evaluate(linear_divergence, case, z_loss=C, backend=backend).loss)


@pytest.mark.parametrize("value, error", [(-0.1, ValueError), (math.inf, ValueError), ("1e-4", TypeError)])
def test_bad_values(value, error):
    case = made_case({}, {})
    with pytest.raises(error, match="z_loss: expected"):
        linear_divergence(*case.inputs(), **case.options(), z_loss=value)


def test_beside_a_policy_term_it_is_refused():
    case = made_case({"batch": B}, {})
    told = {**case.options(), "policy": OnPolicyDistillation(), "policy_weight": 0.5, "z_loss": C}
    with pytest.raises(ValueError, match="z_loss: expected None beside a policy term"):
        linear_policy_divergence(*case.inputs(), **told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z_loss", [C, 0.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_opcheck(backend, dtype, labelled, z_loss):
    """The flat form of a call with a z-loss, and the shapes of its fake."""
    h, t, W = (torch.randn(*shape).to(dtype) for shape in ((5, H), (5, H), (V, H)))
    labels = torch.randint(V, (5,)) if labelled else None
    told = {"z_loss": z_loss, "labels": labels, "backend": backend}
    check_operators(library, ("op",), lambda: linear_divergence(h.requires_grad_(), W, t, W, **told))


def test_compiled_as_one_graph(backend):
    h, t = torch.randn(5, H, requires_grad=True), torch.randn(5, H)
    W = torch.randn(V, H, requires_grad=True)

    def call(*leaves):
        return linear_divergence(leaves[0], leaves[1], t, leaves[1], z_loss=C, backend=backend)

    def counting(graph, inputs):
        return graph.forward

    whole, traced = call(h, W), torch.compile(call, backend=counting, fullgraph=True)(h, W)
    assert torch.equal(whole, traced)
    for eager, compiled in zip(*(torch.autograd.grad(x, [h, W]) for x in (whole, traced)), strict=True):
        assert torch.equal(eager, compiled)


# ---------------------------------------------------------------- the most likely token


@pytest.mark.parametrize("form", ["difference", "pair", "list"])
def test_label_is_top1_is_exact_of_16_bit_logits(backend, form):
    """Logits to 25 in bf16, and labels that are the largest or the next to it: rounding swaps the two."""
    gen = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(4096, 64, generator=gen), torch.randn(1024, 64, generator=gen)
    hidden = hidden * 25 / (hidden @ weight.T).abs().amax()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = hidden.double() @ weight.double().T
    labels = exact.topk(2).indices[torch.arange(1024), torch.arange(1024) % 2]
    told = {"labels": labels, "return_stats": True, "logits_dtype": "input", "backend": backend}
    with torch.no_grad():
        if form == "list":
            lists = labels[:, None], torch.full((1024, 1), -0.5)
            _, stats = linear_topk_divergence(hidden, weight, *lists, **told)
        else:
            head = weight if form == "difference" else weight.clone()
            _, stats = linear_divergence(hidden, weight, hidden * 1.02, head, **told)
    assert torch.equal(stats.label_is_top1, (exact.argmax(1) == labels).float())
    assert (hidden @ weight.T).argmax(1).eq(labels).float().sub(stats.label_is_top1).any(), "no tie to tell"


def test_of_invalid_tokens_it_is_zero(backend):
    head = torch.eye(5)
    labels = torch.tensor([0, -100, 2, 3])
    _, stats = linear_divergence(
        9 * head[:4],
        head,
        head[:4],
        head,
        labels=labels,
        mask=labels != 3,
        return_stats=True,
        backend=backend,
    )
    assert stats.label_is_top1.tolist() == [1, 0, 1, 0]
    assert stats.student_logsumexp[1] == 0 and stats.student_logsumexp[0] > 9
