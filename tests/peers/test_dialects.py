"""TRL's trainers' losses under our options: the same value and gradient in float64 where TRL's are right."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trl_losses import (
    ALPHA,
    BETAS,
    MODEL,
    TAILS,
    K,
    Ops,
    V,
    assert_same,
    at,
    batch,
    iw_opd,
    listed,
    logits_of,
    old_logprobs,
    on_logits,
    sdpo,
    sdpo_loss,
    sdpo_trainer,
    short_list,
    trl,
)

from opsd_kernels.testing import (
    assert_no_worse,
    evaluate,
)
from opsd_kernels.weights import ImportanceRatio, PrefixDiscrepancy

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


# ---------------------------------------------------------------- the whole vocabulary

JSD_LOSSES = {
    "GKD": ("experimental.gkd.gkd_trainer", "GKDTrainer"),
    "GOLD": ("experimental.gold.gold_trainer", "GOLDTrainer"),
    "IW-OPD": ("experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer"),
}


@BETAS
@pytest.mark.parametrize("peer", JSD_LOSSES)
@pytest.mark.parametrize("items", [None, 100])
def test_generalized_jsd_loss(ops, peer, divergence, beta, items):
    """All three divide by the number of counted labels or the trainer's global count, our `normalizer`."""
    path, name = JSD_LOSSES[peer]
    loss_of = getattr(trl(path), name).generalized_jsd_loss

    def theirs(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return loss_of(
            s, t, labels, beta=ALPHA.get(divergence, beta), temperature=1.5, num_items_in_batch=items
        )

    ours = evaluate(
        ops.divergence, batch(), divergence=divergence, beta=beta, temperature=1.5, normalizer=items
    )
    assert_same(ours, evaluate(on_logits(theirs), batch()))


@BETAS
@pytest.mark.parametrize("trainer", ["sdpo", "sdft"])
def test_full_logit_self_distillation(ops, trainer, divergence, beta):
    loss_of = trl(f"experimental.{trainer}.loss_utils").compute_full_logit_self_distillation_loss
    case = batch(ragged=False)
    theirs = evaluate(
        on_logits(lambda s, t, labels: loss_of(s, t, distillation_alpha=ALPHA.get(divergence, beta))),
        case,
        temperature=0.7,
    )
    assert_same(
        evaluate(ops.divergence, case, divergence=divergence, beta=beta, temperature=0.7, reduction="none"),
        theirs,
    )


# ---------------------------------------------------------------- top-k supports of a local teacher


@BETAS
@pytest.mark.parametrize(
    "tail, k", [("bucket", 1), ("bucket", K), ("bucket", V), ("renormalize", K), ("renormalize", V)]
)
@pytest.mark.parametrize("trainer", ["sdpo", "sdft"])
def test_topk_self_distillation(ops, trainer, divergence, beta, tail, k):
    """The support is the student's for every divergence.

    A single renormalised entry is 1 on both sides and gives no loss.
    """
    loss_of = trl(f"experimental.{trainer}.loss_utils").compute_topk_self_distillation_loss
    how = {
        "distillation_topk": k,
        "distillation_alpha": ALPHA.get(divergence, beta),
        "distillation_add_tail": tail == "bucket",
    }
    case = batch(ragged=False)
    theirs = evaluate(on_logits(lambda s, t, labels: loss_of(s, t, **how)), case)
    ours = evaluate(
        ops.divergence, case, divergence=divergence, beta=beta, topk=k, topk_tail=tail, reduction="none"
    )
    # 1 - mass, for a mass near 1, multiplies the rounding errors of both sides.
    if tail == "bucket":
        assert_no_worse(ours, theirs, theirs)
    else:
        assert_same(ours, theirs)


@TAILS
@pytest.mark.parametrize("divergence, side", [("forward_kl", "teacher"), ("reverse_kl", "student")])
def test_iw_opd_topk(ops, divergence, side, tail):
    """The forward KL is on the teacher's support, the reverse KL on the student's."""
    how = {"beta": ALPHA[divergence], "top_k": K, "add_tail": tail == "bucket"}
    theirs = evaluate(
        on_logits(lambda s, t, labels: iw_opd().generalized_jsd_loss(s, t, labels, **how)), batch()
    )
    assert_same(
        evaluate(ops.divergence, batch(), divergence=divergence, topk=K, topk_support=side, topk_tail=tail),
        theirs,
    )


def without_repeats(ids: Tensor, logprobs: Tensor) -> Tensor:
    """Set entries whose id occurs further left to -inf, our padding."""
    earlier = (ids[..., :, None] == ids[..., None, :]).tril(-1).any(-1)
    return logprobs.masked_fill(earlier, -math.inf)


@TAILS
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_iw_opd_topk_jsd_on_the_union_of_both_supports(ops, beta, tail):
    """A listed teacher with the union as its list gives the same loss."""
    case = batch()
    s, t = logits_of(case)
    ids = torch.cat([t.topk(K).indices, s.topk(K).indices], -1)
    logprobs = without_repeats(ids, t.log_softmax(-1).gather(-1, ids))
    assert logprobs.isinf().any()
    how = {"beta": beta, "top_k": K, "add_tail": tail == "bucket"}
    theirs = evaluate(
        on_logits(lambda s, t, labels: iw_opd().generalized_jsd_loss(s, t, labels, **how)), case
    )
    assert_same(evaluate(listed(ops, ids, logprobs), case, divergence="jsd", beta=beta, tail=tail), theirs)


# ---------------------------------------------------------------- a teacher behind a server


@TAILS
def test_iw_opd_server_forward_kl(ops, tail):
    case = batch()
    ids, logprobs = short_list(case)
    trainer = SimpleNamespace(
        loss_add_tail=tail == "bucket", _reduce_divergence_loss=iw_opd()._reduce_divergence_loss
    )

    def theirs(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return iw_opd()._compute_server_forward_kl_loss(
            trainer, {"topk_logprobs": logprobs, "topk_token_ids": ids}, s.log_softmax(-1), labels
        )

    assert_same(evaluate(listed(ops, ids, logprobs), case, tail=tail), evaluate(on_logits(theirs), case))


@pytest.mark.parametrize(
    "divergence, tail", [("jsd", "bucket"), ("jsd", "renormalize"), ("reverse_kl", "bucket")]
)
def test_iw_opd_sparse_top_1(ops, divergence, tail):
    """Mixed divergences have the teacher's likeliest token and the sampled one as their support.

    The reverse KL has the sampled one alone.
    """
    case = batch()
    teacher = logits_of(case)[1].log_softmax(-1)
    sampled, top = case.labels.clamp(min=0), teacher.argmax(-1)
    beta = ALPHA.get(divergence, 0.3)
    trainer = SimpleNamespace(
        beta=beta, loss_add_tail=tail == "bucket", _reduce_divergence_loss=iw_opd()._reduce_divergence_loss
    )

    def theirs(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        known = s.log_softmax(-1), top, at(teacher, top), sampled, at(teacher, sampled)
        return iw_opd()._compute_sparse_top_1_divergence_loss(trainer, *known, labels)

    ids = sampled[..., None] if divergence == "reverse_kl" else torch.stack([top, sampled], -1)
    logprobs = without_repeats(ids, teacher.gather(-1, ids))
    ours = evaluate(listed(ops, ids, logprobs), case, divergence=divergence, beta=0.3, tail=tail)
    assert_same(ours, evaluate(on_logits(theirs), case))


# ---------------------------------------------------------------- SDPO: importance ratios, sequence means


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize("mode, options", [("full_logits", {}), ("topk_logits", {"topk": K})])
def test_sdpo_loss(ops, mode, options, clip):
    case = batch()
    old = old_logprobs(case)
    weights = None if clip is None else ImportanceRatio(old, clip)
    theirs = evaluate(sdpo_loss(case, mode, old, distillation_is_clip=clip), case)
    assert_same(
        evaluate(
            ops.divergence,
            case,
            divergence="jsd",
            reduction="sequence_mean",
            token_weights=weights,
            **options,
        ),
        theirs,
    )


@TAILS
@pytest.mark.parametrize("clip", [None, 2.0])
def test_sdpo_server_loss(ops, tail, clip):
    """The support is the teacher's, since a server cannot score the student's."""
    case = batch()
    teacher = logits_of(case)[1].log_softmax(-1)
    logprobs, ids = teacher.topk(K)
    ended = case.labels == -100
    logprobs, old, mask = (
        logprobs.masked_fill(ended[..., None], -math.inf),
        old_logprobs(case),
        (~ended).double(),
    )
    trainer = sdpo_trainer(
        distillation_mode="topk_logits", distillation_add_tail=tail == "bucket", distillation_is_clip=clip
    )
    trainer._get_teacher_token_logprobs_from_server = lambda *_: {
        "actual_logprobs": at(teacher, case.labels),
        "topk_logprobs": logprobs,
        "topk_token_ids": ids,
    }

    def theirs(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        trainer._forward_logits = lambda **_: s
        ids = labels.clamp(min=0)
        made = {
            "completion_ids": ids,
            "completion_mask": mask,
            "prompt_ids": ids[:, :1],
            "prompt_mask": mask[:, :1],
            "old_per_token_logps": old,
        }
        return sdpo()._compute_server_distillation_loss(trainer, MODEL, made)

    weights = None if clip is None else ImportanceRatio(old, clip)
    ours = evaluate(
        listed(ops, ids, logprobs),
        case,
        divergence="jsd",
        tail=tail,
        token_weights=weights,
        reduction="sequence_mean",
    )
    assert_same(ours, evaluate(on_logits(theirs), case))


# ---------------------------------------------------------------- objectives of the sampled token


def sampled(ops: Ops, loss_of: Callable) -> Callable:
    """Turn a loss of both sides' log-probs of the labels into an op on hidden states and heads."""

    def op(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        *,
        student_bias,
        teacher_bias,
        labels,
        **options,
    ):
        with torch.no_grad():
            teacher = ops.logprobs(teacher_hidden, teacher_weight, labels, bias=teacher_bias, **options)
        return loss_of(
            ops.logprobs(student_hidden, student_weight, labels, bias=student_bias, **options),
            teacher,
            labels != -100,
        )

    return op


def test_sampled_token_self_distillation(ops):
    """The gradient is that of the reverse KL's estimate at the sampled token; the value is no divergence."""
    loss_of = trl("experimental.sdpo.loss_utils").compute_sampled_token_self_distillation_loss
    case = batch(ragged=False)
    theirs = evaluate(
        on_logits(lambda s, t, labels: loss_of(s, t, labels, distillation_alpha=1.0)), case, temperature=1.3
    )
    ours = evaluate(sampled(ops, lambda s, t, valid: (s - t).detach() * s), case, temperature=1.3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("items", [None, 100])
def test_iw_opd_loss(ops, gamma, items):
    """The loss is -w_t * (log t - log s) * log s of the sampled token; the prefix's discrepancy gives w."""
    trainer = SimpleNamespace(
        temperature=1.3,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=MODEL,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )

    def theirs(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        teacher = at((t / 1.3).log_softmax(-1), labels)
        return iw_opd()._compute_iw_opd_loss(
            trainer, s, labels.clamp(min=0), labels, teacher, num_items_in_batch=items
        )

    def ours(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        weights = PrefixDiscrepancy(gamma)(
            SimpleNamespace(student_logprob=s.detach(), teacher_logprob=t), valid
        )
        return -(weights * (t - s).detach() * s).sum() / (valid.sum() if items is None else items)

    assert_same(evaluate(sampled(ops, ours), batch(), temperature=1.3), evaluate(on_logits(theirs), batch()))
