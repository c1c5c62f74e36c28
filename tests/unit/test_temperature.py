"""Test temperatures that are numbers of other libraries, 0-dim tensors, or tensors of one entry per token."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from opsd_kernels import (
    DistillationHead,
    LinearDivergenceLoss,
    cache_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs,
    linear_topk_divergence,
    weights,
)
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)

B, T, V, H = 3, 5, 67, 24
GEN = torch.Generator().manual_seed(4)
PER_TOKEN = 0.5 + torch.rand(B, T, generator=GEN)
PER_SEQUENCE = torch.tensor([[0.6], [1.0], [1.7]])
# temperature and teacher_temperature
TEMPERATURES = {
    "one for both": (PER_TOKEN, None),
    "of sequences": (PER_SEQUENCE, None),
    "of positions": (PER_TOKEN[0], None),
    "of each side": (PER_TOKEN, PER_TOKEN.flip(0)),
    "the student's": (PER_TOKEN, 0.8),
    "the teacher's": (1.3, PER_TOKEN),
    "0-dim": (torch.tensor(0.7), torch.tensor(1.5)),
}
ROUTES = {
    "in forward": {},
    "several chunks": {"workspace_bytes": 4 * V * 8},
    "recompute": {"backward": "recompute", "workspace_bytes": 4 * V * 8},
    "per token": {"reduction": "none"},
    "top k": {"topk": 5, "topk_support": "teacher"},
    "top k of the student": {"topk": 5, "topk_tail": "renormalize", "backward": "recompute"},
    "mix": {"teacher_mix": 0.3},
    "softcaps": {"student_softcap": 20.0, "teacher_softcap": 30.0, "student_logit_scale": 1.2},
    "weights from statistics": {"token_weights": weights.EntropyGate("teacher", below=2.0)},
    "clips": {"entry_clip": 0.05, "token_clip": 0.6},
}
OF_THE_OP = ("workspace_bytes", "backward")


def reference_options(options):
    return {name: value for name, value in options.items() if name not in OF_THE_OP}


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shared_head", [False, True], ids=["two heads", "shared"])
def test_matches_truth(backend, temperatures, route, shared_head):
    temperature, teacher_temperature = TEMPERATURES[temperatures]
    options = {
        **ROUTES[route],
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "divergence": "jsd",
    }
    made = {"largest_logit": 8.0} if "topk" in options else {}
    near = 1e-2 if shared_head else None
    case = hard_case(B * T, V, H, batch=B, shared_head=shared_head, near=near, **made)
    ours = evaluate(linear_divergence, case, backend=backend, **options)
    plain = plain_outcomes(case, **reference_options(options))
    truth = evaluate(linear_divergence_reference, case.double(), **reference_options(options))
    assert_no_worse(ours, plain, truth)


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_divergence_and_dtype(backend, divergence, dtype):
    case = hard_case(6 * 40, 211, 48, dtype, batch=6, largest_logit=8.0)
    options = {"temperature": 0.5 + torch.rand(6, 40, generator=GEN), "divergence": divergence}
    ours = evaluate(linear_divergence, case, backend=backend, **options)
    truth = evaluate(linear_divergence_reference, case.double(), **options)
    if dtype == torch.bfloat16:
        assert_on_target(ours, truth, "fp32_logits")
    else:
        assert_no_worse(ours, truth, truth)


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs(backend, entropy):
    case = hard_case(B * T, V, H, batch=B)

    def of(op, **how):
        def run(h, W, t, Wt, *, labels, mask, student_bias, teacher_bias, token_weights):
            call = {"bias": student_bias, "mask": mask, "temperature": PER_TOKEN, "return_entropy": entropy}
            found = op(h, W, labels, **call, **how)
            return torch.stack(found) if entropy else found

        return run

    truth, plain = (evaluate(of(linear_logprobs_reference), x) for x in (case.double(), case))
    assert_no_worse(evaluate(of(linear_logprobs, backend=backend), case), plain, truth)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
def test_lists(backend, tail):
    case = hard_case(B * T, V, H, batch=B, largest_logit=8.0)
    logits = torch.nan_to_num(case.teacher_hidden) @ case.teacher_weight.T + case.teacher_bias
    logprobs, ids = logits.log_softmax(-1).topk(6)

    def of(op, **how):
        def run(h, W, t, Wt, *, teacher_bias=None, **options):
            return op(h, W, ids, logprobs, temperature=PER_TOKEN, tail=tail, **options, **how)

        return run

    truth, plain = (evaluate(of(linear_topk_divergence_reference), x) for x in (case.double(), case))
    assert_no_worse(evaluate(of(linear_topk_divergence, backend=backend), case), plain, truth)


def test_a_policy_term_is_at_the_temperature_of_its_token(backend):
    """The mix equals the divergence alone and the term on log-probs, at the same temperatures."""
    case = hard_case(B * T, V, H, torch.float64, batch=B, largest_logit=8.0)
    term = PPOClip(PER_SEQUENCE - 1, torch.full((B, T), -3.0))

    def mixed(*heads, **options):
        how = {"policy": term, "policy_weight": 0.4, "temperature": PER_TOKEN, "backend": backend}
        return linear_policy_divergence(*heads, **options, **how)

    def apart(h, W, t, Wt, **options):
        valid = options["mask"] & (options["labels"] != -100)
        call = {"bias": options["student_bias"], "mask": options["mask"], "temperature": PER_TOKEN}
        losses = term(linear_logprobs(h, W, options["labels"], **call), None, valid)
        policy = torch.where(valid, losses, 0.0).sum() / valid.sum()
        divergence = linear_divergence(h, W, t, Wt, temperature=PER_TOKEN, **options)
        return 0.6 * divergence + 0.4 * policy

    expected = evaluate(apart, case)
    assert_no_worse(evaluate(mixed, case), expected, expected)


NUMBERS = [np.float32(0.75), np.float64(0.75), np.float16(0.75), Fraction(3, 4), torch.tensor(0.75)]
NUMBERS += [torch.tensor(0.75, dtype=torch.float64), torch.full((1, 1), 0.75), torch.full((B, T), 0.75)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_any_real_number(backend, number):
    case = hard_case(B * T, V, H, batch=B)
    expected = evaluate(linear_divergence, case, temperature=0.75, backend=backend)
    ours = evaluate(linear_divergence, case, temperature=number, backend=backend)
    truth = evaluate(linear_divergence_reference, case.double(), temperature=0.75)
    assert_no_worse(ours, (expected, *plain_outcomes(case, temperature=0.75)), truth)
    for whole in (np.int64(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)):
        assert evaluate(linear_divergence, case, temperature=whole, backend=backend).loss.isfinite()


def test_temperatures_are_detached_and_masked_ones_do_not_matter(backend):
    case = hard_case(B * T, V, H, batch=B)
    valid = case.mask & (case.labels != -100)
    expected = evaluate(linear_divergence, case, temperature=PER_TOKEN, backend=backend)
    for rubbish in (math.nan, 0.0, -1.0, math.inf):
        spoilt = torch.where(valid, PER_TOKEN, rubbish).requires_grad_()
        ours = evaluate(linear_divergence, case, temperature=spoilt, backend=backend)
        for (_, got), (_, one) in zip(ours.named(), expected.named(), strict=True):
            assert_same_bits(got, one)
        assert spoilt.grad is None


def test_modules_take_them():
    case = hard_case(B * T, V, H, batch=B)
    expected = linear_divergence(*case.inputs(), temperature=PER_TOKEN, mask=case.mask)
    loss = LinearDivergenceLoss(temperature=PER_TOKEN)
    assert_same_bits(loss(*case.inputs(), mask=case.mask), expected)
    head = DistillationHead(torch.nn.Linear(H, V), temperature=PER_TOKEN)
    hidden = torch.randn(B, T, H)
    loss = head(hidden, 2 * hidden)
    assert loss.isfinite() and loss != head(hidden, 2 * hidden, temperature=1.0)


ERRORS = {
    "zero": ({"temperature": torch.tensor(0.0)}, ValueError, "temperature: expected positive finite numbers"),
    "negative": ({"temperature": -PER_TOKEN}, ValueError, "temperature: expected positive finite numbers"),
    "nan": (
        {"teacher_temperature": PER_TOKEN * math.nan},
        ValueError,
        "teacher_temperature: expected positive finite numbers",
    ),
    "shape": ({"temperature": torch.ones(T, B)}, ValueError, r"temperature: expected a number, or a tensor"),
    "too many dimensions": (
        {"temperature": torch.ones(1, B, T)},
        ValueError,
        r"temperature: expected .* broadcasts to \(3, 5\), got shape \(1, 3, 5\)",
    ),
    "complex": (
        {"temperature": torch.ones(B, T, dtype=torch.complex64)},
        TypeError,
        "temperature: expected a tensor of real numbers, got torch.complex64",
    ),
    "bool": ({"temperature": torch.ones(B, T, dtype=torch.bool)}, TypeError, "temperature: expected"),
    "text": ({"temperature": "hot"}, TypeError, "temperature: expected a number"),
    "numpy zero": ({"temperature": np.float32(0)}, ValueError, "temperature: expected a positive finite"),
    "sparse": ({"temperature": torch.ones(B, T).to_sparse()}, TypeError, "temperature: expected .*sparse"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    options, error, message = ERRORS[name]
    case = replace(hard_case(B * T, V, H, batch=B), labels=None)
    with pytest.raises(error, match=message):
        evaluate(linear_divergence, case, **options)


OF_A_TEACHER = {
    "heads": lambda h, W, **told: linear_divergence(h, W, h, W, **told),
    "rows": lambda h, W, **told: linear_divergence_to(h, W, h @ W.T, **told),
    "cache": lambda h, W, **told: cache_forward_kl(h, W, W, **told),
    "reference": lambda h, W, **told: linear_divergence_reference(h, W, h, W, **told),
}


@pytest.mark.parametrize("name", OF_A_TEACHER)
def test_errors_name_the_temperature_of_a_teacher(name):
    call, inputs = OF_A_TEACHER[name], (torch.randn(B, T, H), torch.randn(V, H))
    wrong = {
        "a positive finite number": -1.0,
        "a tensor of real numbers": torch.ones(B, T, dtype=torch.bool),
        "a number, or a tensor .* that broadcasts": PER_TOKEN.t(),
        "positive finite numbers": -PER_TOKEN,
    }
    if name == "reference":  # it does not read them
        del wrong["positive finite numbers"]
    for expected, given in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"^teacher_temperature: expected {expected}"):
            call(*inputs, teacher_temperature=given)
        if name != "cache":  # whose student has a number
            with pytest.raises((TypeError, ValueError), match=f"^temperature: expected {expected}"):
                call(*inputs, temperature=given)


@pytest.mark.parametrize("temperature", [torch.tensor(1.5), torch.tensor([1.5]), PER_TOKEN[0]], ids=str)
def test_tensors_that_repeat_one_entry_without_a_mask(backend, temperature):
    """Nothing masks a token here, so the temperatures of the rows are not made anew."""
    gen = torch.Generator().manual_seed(0)
    h, t = torch.randn(2, T, H, generator=gen, dtype=torch.float64).split(1)
    W = torch.randn(V, H, generator=gen, dtype=torch.float64)
    ours = linear_divergence(h, W, t, W, temperature=temperature, backend=backend)
    truth = linear_divergence_reference(h, W, t, W, temperature=temperature)
    assert_no_worse(ours, truth, truth)
    labels = torch.arange(T)[None]
    ours = linear_logprobs(h, W, labels, temperature=temperature, backend=backend)
    truth = linear_logprobs_reference(h, W, labels, temperature=temperature)
    assert_no_worse(ours, truth, truth)
