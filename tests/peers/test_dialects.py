"""The dialects of TRL's trainers and the log-probs of TRL and Liger, under our options: the same value and gradient in float64 where they are right.

TRL's losses start at logits, so `on_logits` gives them our arguments. Its trainers' methods run on a stand-in for the trainer that holds their settings.
"""

import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    assert_one_rounding,
    evaluate,
    hard_case,
)
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.weights import ImportanceRatio, PrefixDiscrepancy

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


class Ops(NamedTuple):
    divergence: Callable
    topk_divergence: Callable
    logprobs: Callable


OPS = {
    "reference": Ops(
        linear_divergence_reference, linear_topk_divergence_reference, linear_logprobs_reference
    ),
    "package": Ops(linear_divergence, linear_topk_divergence, linear_logprobs),
}
ALPHA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # TRL's names of the two ends, for `alpha` and `beta` alike
BETAS = pytest.mark.parametrize(
    "divergence, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2)]
)
TAILS = pytest.mark.parametrize("tail", ["bucket", "renormalize"])
B, T, V, H, K = 3, 10, 61, 12, 7


@pytest.fixture(params=OPS.values(), ids=OPS)
def ops(request) -> Ops:
    return request.param


@functools.cache
def trl(path: str) -> Any:
    pytest.importorskip("trl", minversion="1.16", reason="trl >= 1.16 is not installed")
    return importlib.import_module(f"trl.{path}")


def iw_opd() -> Any:
    return trl("experimental.iw_opd.iw_opd_trainer").IWOPDTrainer


def sdpo() -> Any:
    return trl("experimental.sdpo.sdpo_trainer").SDPOTrainer


def on_logits(loss_of: Callable) -> Callable:
    """A loss of student logits, teacher logits and labels, as an op over hidden states and heads."""

    def op(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        *,
        student_bias,
        teacher_bias,
        temperature=1.0,
        labels=None,
        mask=None,
    ):
        s = student_hidden @ student_weight.T + student_bias
        with torch.no_grad():
            t = teacher_hidden @ teacher_weight.T + teacher_bias
        return loss_of(s / temperature, t / temperature, labels)

    return op


def batch(
    dtype: torch.dtype = torch.float64, ragged: bool = True, largest_logit: float = 12.0, **made: Any
) -> Case:
    """(B, T) tokens with finite numbers everywhere. `ragged`: the first sequence ends early, by label; no other token is ignored."""
    case = hard_case(
        B * T, V, H, dtype, masked_entry=None, views=False, batch=B, largest_logit=largest_logit, **made
    )
    labels = case.labels.clamp(min=0)
    if ragged:
        labels[0, -3:] = -100
    clean = {
        name: getattr(case, name).nan_to_num(0.3, 0.3, 0.3) for name in ("student_hidden", "teacher_hidden")
    }
    return replace(case, **clean, mask=None, labels=labels, token_weights=None)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    for (name, actual), (_, expected) in zip(ours.named(), theirs.named(), strict=True):
        assert actual.abs().max() > 0
        assert_one_rounding(
            actual, expected, torch.float64, magnitude=max(1.0, expected.abs().max().item()), name=name
        )


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    return (
        case.student_hidden @ case.student_weight.T + case.student_bias,
        case.teacher_hidden @ case.teacher_weight.T + case.teacher_bias,
    )


def at(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs.gather(-1, ids.clamp(min=0)[..., None])[..., 0]


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
    """All three divide by the number of labels that count, or by the trainer's count of the global batch: our `normalizer`."""
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
    """The student's support, whatever the divergence. (One entry alone that is renormalised is 1 on both sides, and no loss.)"""
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
    if tail == "bucket":  # 1 - mass, where the mass is nearly 1, multiplies the roundings of either side
        assert_no_worse(ours, theirs, theirs)
    else:
        assert_same(ours, theirs)


@TAILS
@pytest.mark.parametrize("divergence, side", [("forward_kl", "teacher"), ("reverse_kl", "student")])
def test_iw_opd_topk(ops, divergence, side, tail):
    """The forward KL on the teacher's support, the reverse KL on the student's."""
    how = {"beta": ALPHA[divergence], "top_k": K, "add_tail": tail == "bucket"}
    theirs = evaluate(
        on_logits(lambda s, t, labels: iw_opd().generalized_jsd_loss(s, t, labels, **how)), batch()
    )
    assert_same(
        evaluate(ops.divergence, batch(), divergence=divergence, topk=K, topk_support=side, topk_tail=tail),
        theirs,
    )


def without_repeats(ids: Tensor, logprobs: Tensor) -> Tensor:
    """-inf at each entry whose id stands further left already: padding, to us."""
    earlier = (ids[..., :, None] == ids[..., None, :]).tril(-1).any(-1)
    return logprobs.masked_fill(earlier, -math.inf)


@TAILS
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_iw_opd_topk_jsd_on_the_union_of_both_supports(ops, beta, tail):
    """As a listed teacher whose list is the union."""
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


def listed(ops: Ops, ids: Tensor, logprobs: Tensor) -> Callable:
    """Our op for a listed teacher under the arguments of a local one, which it does not look at."""

    def op(student_hidden, student_weight, teacher_hidden, teacher_weight, *, teacher_bias, **options):
        return ops.topk_divergence(student_hidden, student_weight, ids, logprobs, **options)

    return op


def short_list(case: Case) -> tuple[Tensor, Tensor]:
    """The teacher's K likeliest tokens, of which it returned only two for some positions and none at all after the end: id 0, log-prob -inf."""
    logprobs, ids = logits_of(case)[1].log_softmax(-1).topk(K)
    logprobs[1, ::2, 2:], ids[1, ::2, 2:] = -math.inf, 0
    ended = (case.labels == -100)[..., None]
    return ids.masked_fill(ended, 0), logprobs.masked_fill(ended, -math.inf)


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
    """The support of the mixed divergences is the teacher's likeliest token and the sampled one, that of the reverse KL the sampled one alone."""
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


# ---------------------------------------------------------------- SDPO's trainer: clipped importance ratios, sequence means


def sdpo_trainer(**args: Any) -> SimpleNamespace:
    settings = {
        "distillation_alpha": 0.5,
        "distillation_topk": K,
        "distillation_add_tail": True,
        "distillation_is_clip": 2.0,
        **args,
    }
    return SimpleNamespace(
        args=SimpleNamespace(**settings),
        accelerator=SimpleNamespace(gather=lambda x: x),
        state=SimpleNamespace(global_step=0),
        _last_loaded_step=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _log_self_distillation_metric=lambda mode, value: None,
    )


MODEL = SimpleNamespace(training=True)


def old_logprobs(case: Case) -> Tensor:
    """Of a policy some steps back: ratios on both sides of 1 and of the clip."""
    now = at(logits_of(case)[0].log_softmax(-1), case.labels)
    return now + torch.linspace(-1.5, 1.5, now.numel(), dtype=now.dtype).view(now.shape)


def sdpo_loss(case: Case, mode: str, old: Tensor | None, **args: Any) -> Callable:
    trainer = sdpo_trainer(distillation_mode=mode, **args)
    mask = (case.labels != -100).to(case.student_hidden.dtype)

    def loss_of(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        made = SimpleNamespace(
            student_logits=s, teacher_logits=t, completion_ids=labels.clamp(min=0), loss_mask=mask
        )
        return sdpo()._compute_self_distillation_loss(trainer, MODEL, {"old_per_token_logps": old}, made)

    return on_logits(loss_of)


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
    """The teacher's support here, since a server cannot score the student's."""
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
    """A loss of the student's and the teacher's log-probs of the labels, as an op over hidden states and heads."""

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
    """Its gradient is that of the reverse KL's estimate at the sampled token; its value is no divergence."""
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
    """-w_t * (log t - log s) * log s of the sampled token, w by the discrepancy of the prefix."""
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
    """Log-probs, or twice them minus the entropies, as a loss per token: both upstream gradients at once."""

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
    """Both compute in fp32 whatever the inputs. Liger's has no entropy, scale or softcap."""
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
    """A server that returns fewer than K log-probs leaves -inf, which IW-OPD's server loss masks and SDPO's does not."""
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
    """Theirs is -log Z, as if the label's logit were 0: the caller masks."""
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
    """Of likely tokens: their log-probs are small differences of large logits."""
    case = batch(torch.bfloat16, ragged=False, largest_logit=40.0, widths=(1.0,))
    likely = logits_of(case.double())[0].argmax(-1)
    given = case.student_hidden, case.student_weight, likely
    truth = linear_logprobs_reference(
        case.student_hidden.double(), case.student_weight.double(), likely, bias=case.student_bias.double()
    )
    with pytest.raises(AssertionError, match="target"):
        assert_on_target(peer(*given, bias=case.student_bias)[0], truth, "fp32_logits")
    assert_on_target(ops.logprobs(*given, bias=case.student_bias), truth, "fp32_logits")
