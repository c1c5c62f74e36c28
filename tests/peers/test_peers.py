"""The numbers of TRL and Liger where they are right, and the truth where they are known to be wrong."""

import functools
from dataclasses import replace

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels.testing import Case, assert_no_worse, assert_on_target, evaluate, hard_case, plain_outcomes
from opsd_kernels.testing.reference import linear_divergence_reference

# Both libraries' betas of the two ends.
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}


@functools.cache
def trl_divergence():
    return pytest.importorskip(
        "trl.kernels.chunked_divergence", reason="trl >= 1.16 is not installed"
    ).ChunkedDivergenceFunction


@functools.cache
def liger_loss():
    return pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed"
    ).LigerFusedLinearJSDLoss


def trl(student_hidden, student_weight, teacher_hidden, teacher_weight, *, divergence, beta=0.5, **options):
    """Call TRL's function with our argument names; per token."""
    values, _ = trl_divergence().apply(
        student_hidden,
        student_weight,
        options.get("student_bias"),
        teacher_hidden,
        teacher_weight,
        options.get("teacher_bias"),
        PEER_BETA.get(divergence, beta),
        options.get("temperature", 1.0),
        options.get("student_logit_scale", 1.0),
        options.get("student_softcap"),
        options.get("teacher_logit_scale", 1.0),
        options.get("teacher_softcap"),
    )
    return values


def liger(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    divergence,
    labels,
    beta=0.5,
    temperature=1.0,
    **biases,
):
    """Call Liger's chunked loss with our argument names; mean over labels that are not ignored."""
    module = liger_loss()(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=PEER_BETA.get(divergence, beta),
        temperature=temperature,
        compiled=False,
    )
    return module(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **biases)


def case_for(divergence: str, dtype=torch.float32, **made) -> Case:
    """Make finite inputs: neither library takes a mask over inf and NaN, or a -inf in a bias."""
    case = hard_case(29, 211, 24, dtype, masked_entry=None, views=False, seed=1, **made)
    clean = {
        name: getattr(case, name).nan_to_num(0.3, 0.3, 0.3) for name in ("student_hidden", "teacher_hidden")
    }
    return replace(case, **clean, mask=None, labels=None, token_weights=None)


def agree(peer, case, options, peer_options=None):
    """Both are within the fp32 target of the truth, and ours is no worse than plain PyTorch."""
    truth, plain = (
        evaluate(linear_divergence_reference, case.double(), **options),
        plain_outcomes(case, **options),
    )
    assert_on_target(
        evaluate(peer, case, **(options if peer_options is None else peer_options)), truth, "fp32_logits"
    )
    assert_no_worse(evaluate(linear_divergence, case, **options), plain, truth)


@pytest.mark.parametrize(
    "divergence, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
@pytest.mark.parametrize(
    "transform",
    [
        {},
        {"temperature": 2.0},
        {"student_softcap": 20.0, "teacher_softcap": 25.0, "student_logit_scale": 0.7, "temperature": 0.8},
    ],
    ids=str,
)
def test_trl_chunked_divergence(divergence, beta, transform):
    trl_divergence()
    options = {"divergence": divergence, "beta": beta, **transform}
    agree(trl, case_for(divergence), {**options, "reduction": "none"}, options)


@pytest.mark.parametrize(
    "divergence, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_chunked_jsd(divergence, beta, temperature):
    """With ignored labels both divide by the number of the others."""
    liger_loss()
    labels = torch.arange(29)
    labels[[3, 17]] = -100
    case = replace(case_for(divergence), labels=labels)
    agree(liger, case, {"divergence": divergence, "beta": beta, "temperature": temperature})


# ---------------------------------------------------------------- defects that are not copied


def test_bf16_loss_where_a_bf16_softmax_fails():
    """Liger's chunked loss takes a bf16 softmax; ours is within 0.5 %, its gradient within the target."""
    liger_loss()
    case = replace(
        case_for("jsd", torch.bfloat16, shared_head=True, near=1e-2, largest_logit=16.0, bias=False),
        labels=torch.arange(29),
    )
    truth = evaluate(linear_divergence_reference, case.double(), divergence="jsd")
    with pytest.raises(AssertionError, match="target"):
        assert_on_target(evaluate(liger, case, divergence="jsd"), truth, "default")
    assert_on_target(evaluate(linear_divergence, case, divergence="jsd"), truth, "default")


def test_a_smaller_student_vocabulary_gets_no_probability():
    """Padded columns have no effect on either side, whatever their logits."""
    case = hard_case(29, 211, 24, padding=7)
    truth, plain = evaluate(linear_divergence_reference, case.double()), plain_outcomes(case)
    ours = evaluate(linear_divergence, case)
    assert_no_worse(ours, plain, truth)
    assert (ours.student_weight[211:] == 0).all() and (ours.student_bias[211:] == 0).all()


def test_a_teacher_entry_of_minus_infinity_is_no_nan():
    case = hard_case(29, 211, 24, masked_entry="teacher")
    truth, plain = (
        evaluate(linear_divergence_reference, case.double(), divergence="jsd"),
        plain_outcomes(case, divergence="jsd"),
    )
    assert all(value.isfinite().all() for _, value in truth.named())
    assert_no_worse(evaluate(linear_divergence, case, divergence="jsd"), plain, truth)


def test_the_jsd_gradient_points_where_the_true_one_does():
    """One published example's JSD gradient has cosine 0.73-0.84 to the truth."""
    case = case_for("jsd")
    truth, ours = (
        evaluate(op, c, divergence="jsd")
        for op, c in ((linear_divergence_reference, case.double()), (linear_divergence, case))
    )
    assert_on_target(ours, truth, "fp32_logits")
