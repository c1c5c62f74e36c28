"""Log-probs and entropies of TRL and Liger under our options, and where both libraries deviate."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl_losses import B, K, V, assert_same, batch, iw_opd, listed, logits_of, sdpo_loss, short_list, trl

from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_on_target,
    assert_one_rounding,
    evaluate,
)
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


# ---------------------------------------------------------------- log-probs and entropies


def trl_chunked(hidden, weight, labels, *, bias, temperature=1.0, logit_scale=1.0, softcap=None):
    function = trl("kernels.chunked_logprob").ChunkedLogProbFunction
    flat = (
        hidden.flatten(end_dim=-2),
        weight,
        bias,
        labels.flatten(),
        temperature,
        16,
        softcap,
        logit_scale,
        ("entropy",),
    )
    logprobs, entropy, *_ = function.apply(*flat)
    return logprobs.view(labels.shape), entropy.view(labels.shape)


def trl_selective(hidden, weight, labels, *, bias, temperature=1.0):
    return trl("trainer.utils").selective_log_softmax_and_entropy(
        hidden @ weight.T + bias, labels, temperature=temperature
    )


def liger_chunked(hidden, weight, labels, *, bias, temperature=1.0):
    base = pytest.importorskip(
        "liger_kernel.chunked_loss.fused_linear_ppo", reason="liger-kernel is not installed"
    ).LigerFusedLinearPPOBase
    return base.chunk_forward(hidden, weight, labels, bias=bias, temperature=temperature), None


def outcome(logprobs: Callable, case: Case, *, entropy: bool, **options: Any) -> Outcome:
    """Evaluate log-probs, or twice them minus the entropies, as a loss per token: both gradients at once."""

    def op(
        student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias, labels
    ):
        values, entropies = logprobs(student_hidden, student_weight, labels, bias=student_bias, **options)
        return 2 * values - entropies if entropy else values

    return evaluate(op, case)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7}], ids=str)
def test_logprobs_and_entropies_of_trls_logits(ops, options):
    case = batch(ragged=False)
    ours = outcome(functools.partial(ops.logprobs, return_entropy=True), case, entropy=True, **options)
    assert_same(ours, outcome(trl_selective, case, entropy=True, **options))


TRANSFORMS = [{}, {"temperature": 1.7}, {"temperature": 0.8, "logit_scale": 0.7, "softcap": 20.0}]
FUSED = [(trl_chunked, True, options) for options in TRANSFORMS] + [
    (liger_chunked, False, options) for options in TRANSFORMS[:2]
]


@pytest.mark.parametrize(
    "peer, entropy, options", FUSED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_fused_logprobs(ops, peer, entropy, options):
    """Both compute in fp32 for any inputs. Liger's has no entropy, scale or softcap."""
    case = batch(ragged=False)
    ours = outcome(functools.partial(ops.logprobs, return_entropy=True), case, entropy=entropy, **options)
    assert_on_target(outcome(peer, case, entropy=entropy, **options), ours, "fp32_logits")


# ---------------------------------------------------------------- where they deviate


def test_sdpo_counts_sequences_without_a_valid_token_and_ours_does_not(ops):
    case = batch()
    case.labels[2] = -100
    theirs = evaluate(sdpo_loss(case, "full_logits", None), case)
    ours = evaluate(ops.divergence, case, divergence="jsd", reduction="sequence_mean")
    assert_same(
        ours,
        Outcome(**{field: value * B / (B - 1) for field, value in vars(theirs).items() if value is not None}),
    )


@pytest.mark.parametrize("options", [{}, {"topk": V}], ids=str)
@pytest.mark.parametrize("alpha, divergence", [(0.0, "forward_kl"), (0.5, "jsd")])
def test_a_teacher_entry_of_minus_infinity_is_nan_in_sdpo_and_finite_in_ours(ops, options, alpha, divergence):
    case = batch()
    case.teacher_bias[V // 2] = -math.inf
    mode = "topk_logits" if options else "full_logits"
    theirs = evaluate(sdpo_loss(case, mode, None, distillation_alpha=alpha, distillation_topk=V), case)
    assert theirs.loss.isnan()
    ours = evaluate(ops.divergence, case, divergence=divergence, **options)
    assert all(value.isfinite().all() and value.abs().max() > 0 for _, value in ours.named())


def test_an_infinite_reverse_kl_is_the_largest_float_in_iw_opd_and_infinite_in_ours(ops):
    case = batch(torch.float32, ragged=False)
    case.teacher_bias[:] = -math.inf
    case.teacher_bias[0] = 0
    s, t = logits_of(case)
    theirs = iw_opd().generalized_jsd_loss(s, t, beta=1.0, top_k=K, reduction="none")
    assert theirs.isfinite().all() and theirs.amax() == torch.finfo(torch.float32).max
    ours = ops.divergence(*case.inputs(), **case.options(), divergence="reverse_kl", topk=K, reduction="none")
    assert ours.isinf().any() and not ours.isnan().any()


def test_a_short_list_is_nan_in_sdpos_server_loss_and_finite_in_ours(ops):
    """Fewer than K log-probs leave -inf, which IW-OPD's server loss masks and SDPO's does not."""
    case = batch()
    ids, logprobs = short_list(case)
    student = logits_of(case)[0].log_softmax(-1).gather(-1, ids)
    divergence = trl("experimental.sdpo.loss_utils")
    theirs = divergence.compute_divergence(
        divergence.add_tail_bucket(student), divergence.add_tail_bucket(logprobs), 0.5
    )
    assert theirs[1, ::2].isnan().all() and theirs[1, 1::2].isfinite().all()
    ours = evaluate(listed(ops, ids, logprobs), case, divergence="jsd")
    assert all(value.isfinite().all() and value.abs().max() > 0 for _, value in ours.named())


@pytest.mark.parametrize("options", [{}, {"topk": K}], ids=str)
def test_sdpo_takes_a_bf16_softmax_and_misses_the_loss_that_ours_hits(ops, options):
    case = batch(torch.bfloat16, near=1e-2, shared_head=True, bias=True)
    truth = evaluate(
        linear_divergence_reference,
        case.double(),
        divergence="reverse_kl",
        reduction="sequence_mean",
        **options,
    )
    mode = "topk_logits" if options else "full_logits"
    with pytest.raises(AssertionError, match="target"):
        assert_on_target(
            evaluate(sdpo_loss(case, mode, None, distillation_alpha=1.0), case).value(),
            truth.value(),
            "default",
        )
    assert_on_target(
        evaluate(ops.divergence, case, divergence="reverse_kl", reduction="sequence_mean", **options),
        truth,
        "default",
    )


@pytest.mark.parametrize("peer", [trl_chunked, liger_chunked])
def test_an_ignored_label_has_a_logprob_and_a_gradient_in_both_and_none_in_ours(ops, peer):
    """The other libraries give -log Z, as if the label's logit were 0, for the caller to mask."""
    case = batch()
    ignored = case.labels == -100
    hidden = case.student_hidden.clone().requires_grad_()
    their_values, _ = peer(hidden, case.student_weight, case.labels, bias=case.student_bias)
    our_values = ops.logprobs(hidden, case.student_weight, case.labels, bias=case.student_bias)
    assert (their_values[ignored] != 0).all() and (our_values[ignored] == 0).all()
    theirs, ours = (torch.autograd.grad(values.sum(), hidden)[0] for values in (their_values, our_values))
    assert theirs[ignored].any() and not ours[ignored].any()


@pytest.mark.parametrize("peer", [trl_chunked, trl_selective])
def test_an_excluded_token_makes_trls_entropy_nan_and_not_ours(ops, peer):
    case = batch(ragged=False)
    case.student_bias[V // 2 :] = -math.inf
    given = case.student_hidden, case.student_weight, case.labels % (V // 2)
    assert peer(*given, bias=case.student_bias)[1].isnan().all()
    logprobs, entropy = ops.logprobs(*given, bias=case.student_bias, return_entropy=True)
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    assert_one_rounding(
        entropy,
        torch.distributions.Categorical(logits=logits_of(case)[0][..., : V // 2]).entropy(),
        torch.float64,
    )


@pytest.mark.parametrize("peer", [trl_chunked, liger_chunked])
def test_both_round_bf16_logits_and_miss_the_logprobs_that_ours_hits(ops, peer):
    """The log-probs of likely tokens are small differences of large logits."""
    case = batch(torch.bfloat16, ragged=False, largest_logit=40.0, widths=(1.0,))
    likely = logits_of(case.double())[0].argmax(-1)
    given = case.student_hidden, case.student_weight, likely
    truth = linear_logprobs_reference(
        case.student_hidden.double(), case.student_weight.double(), likely, bias=case.student_bias.double()
    )
    with pytest.raises(AssertionError, match="target"):
        assert_on_target(peer(*given, bias=case.student_bias)[0], truth, "fp32_logits")
    assert_on_target(ops.logprobs(*given, bias=case.student_bias), truth, "fp32_logits")
