"""The reference where an option must have no effect or a known one, and at entries of probability zero."""

import math

import pytest
import torch
from reference_cases import (
    DIVERGENCES,
    SIDES,
    TAILS,
    K,
    N,
    V,
    assert_equal,
    judge,
    judge_listed,
    logits,
    minus_infinity,
    value_and_gradient,
)
from torch import Tensor

from opsd_kernels.spec import Divergence
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.testing.reference import (
    reference_divergence,
)

# ---------------------------------------------------------------- limits that pin the meaning


@DIVERGENCES
@SIDES
@TAILS
@pytest.mark.parametrize("k", [V, V + 5])
def test_a_support_of_all_entries_changes_nothing(divergence, side, tail, k):
    """An empty bucket is equal on both sides, and its clamp has no gradient."""
    S, T = logits()
    restricted = value_and_gradient(
        lambda s: judge(s, T, divergence=divergence, topk=k, topk_support=side, topk_tail=tail), S
    )
    assert_equal(restricted, value_and_gradient(lambda s: judge(s, T, divergence=divergence), S))


@DIVERGENCES
def test_a_huge_clip_clips_nothing(divergence):
    S, T = logits()
    plain = value_and_gradient(lambda s: judge(s, T, divergence=divergence), S)
    clipped = value_and_gradient(
        lambda s: judge(s, T, divergence=divergence, entry_clip=1e6, token_clip=1e9), S
    )
    for ours, theirs in zip(clipped, plain, strict=True):
        assert_same_bits(ours, theirs)
    assert not judge(S, T, divergence=divergence, entry_clip=1e6, return_stats=True)[1][
        "clipped_fraction"
    ].any()


@DIVERGENCES
def test_a_clipped_token_has_no_gradient(divergence):
    S, T = logits()
    free = judge(S, T, divergence=divergence)
    above = free > free.median()
    loss, grad = value_and_gradient(
        lambda s: judge(s, T, divergence=divergence, token_clip=free.median().item()), S
    )
    assert_same_bits(loss, torch.where(above, free.median(), free))
    assert above.any() and (grad[above] == 0).all() and (grad[~above] != 0).all()


@DIVERGENCES
def test_a_mixed_teacher_is_a_teacher_of_mixed_logits(divergence):
    S, T = logits()
    mixed = 0.75 * T + 0.25 * S
    options = {"divergence": divergence, "topk": K, "topk_support": "teacher", "return_stats": True}
    by_option, by_hand = (
        judge(S, t, **options, **how)[1] for t, how in ((T, {"teacher_mix": 0.25}), (mixed, {}))
    )
    for name in by_hand:
        assert_same_bits(by_option[name], by_hand[name])
    options["return_stats"] = False
    ours, theirs = (
        value_and_gradient(lambda s, t=t, how=how: judge(s, t, **options, **how), S)
        for t, how in ((T, {"teacher_mix": 0.25}), (mixed, {}))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def test_a_mixed_teacher_is_a_geometric_mixture():
    S, T = logits()
    product = T.softmax(-1) ** 0.75 * S.softmax(-1) ** 0.25
    expected = reference_divergence(S, product.log(), Divergence.parse("forward_kl"))
    assert_one_rounding(judge(S, T, divergence="forward_kl", teacher_mix=0.25), expected, torch.float64)


@DIVERGENCES
@SIDES
def test_a_bucket_is_a_column_of_merged_columns(divergence, side):
    S, T = logits()
    support = (S if side == "student" else T).topk(K).indices
    outside = torch.ones(N, V, dtype=torch.bool).scatter(1, support, False)

    def merged(x: Tensor) -> Tensor:
        return torch.cat(
            [x.gather(1, support), x.masked_fill(~outside, -math.inf).logsumexp(-1, keepdim=True)], 1
        )

    by_hand = value_and_gradient(
        lambda s: reference_divergence(merged(s), merged(T), Divergence.parse(divergence, 0.3)), S
    )
    assert_equal(
        value_and_gradient(lambda s: judge(s, T, divergence=divergence, topk=K, topk_support=side), S),
        by_hand,
    )


@DIVERGENCES
@SIDES
def test_renormalizing_drops_columns(divergence, side):
    S, T = logits()
    support = (S if side == "student" else T).topk(K).indices
    by_hand = value_and_gradient(
        lambda s: reference_divergence(
            s.gather(1, support), T.gather(1, support), Divergence.parse(divergence, 0.3)
        ),
        S,
    )
    assert_equal(
        value_and_gradient(
            lambda s: judge(s, T, divergence=divergence, topk=K, topk_support=side, topk_tail="renormalize"),
            S,
        ),
        by_hand,
    )


# ---------------------------------------------------------------- entries of probability zero


EXTRAS = {
    "plain": {},
    "clip": {"entry_clip": 0.05},
    "mix": {"teacher_mix": 0.25},
    "bucket": {"topk": 5},
    "renormalize": {"topk": 5, "topk_support": "teacher", "topk_tail": "renormalize"},
    "none": {"topk": 5, "topk_tail": "none", "token_clip": 0.3},
}


@DIVERGENCES
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_a_column_that_both_exclude_is_no_column(divergence, extra):
    S, T = logits()
    biases = {"student_bias": minus_infinity(2), "teacher_bias": minus_infinity(2)}
    kept = [v for v in range(V) if v != 2]
    without = value_and_gradient(lambda s: judge(s[:, kept], T[:, kept], divergence=divergence, **extra), S)
    assert_equal(
        value_and_gradient(lambda s: judge(s, T, divergence=divergence, **biases, **extra), S), without
    )


@DIVERGENCES
@pytest.mark.parametrize("extra", ["clip", "mix", "bucket", "none"])
@SIDES
def test_a_column_that_one_excludes_is_never_nan(divergence, extra, side):
    """The loss is infinite exactly where D is; where the loss is finite, so is the gradient."""
    S, T = logits()
    column = S.mean(0).argmax().item()
    options = {"divergence": divergence, f"{side}_bias": minus_infinity(column), **EXTRAS[extra]}
    loss, grad = value_and_gradient(lambda s: judge(s, T, **options), S)
    assert not loss.isnan().any() and grad[loss.isfinite()].isfinite().all()
    needs = {"teacher": "reverse_kl", "student": "forward_kl"}[side]
    assert loss.isfinite().all() or (divergence in (needs, "mixed_kl") and "entry_clip" not in options)


def test_an_infinite_entry_counts_as_its_clip():
    """An infinite term counts as the clip, and the other entries keep their gradient."""
    S, T = logits()
    free = [v for v in range(V) if v != 2]
    ours = value_and_gradient(lambda s: judge(s, T, teacher_bias=minus_infinity(2), entry_clip=0.05), S)

    def by_hand(s: Tensor) -> Tensor:
        log_q, log_p = s.log_softmax(-1)[:, free], T[:, free].log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1) + 0.05

    assert_equal(ours, value_and_gradient(by_hand, S))


@pytest.mark.parametrize("how", ["clipped", "weight zero"])
def test_an_infinite_token_that_does_not_count_has_no_gradient(how):
    S, T = logits()
    options = {"token_clip": 1e3} if how == "clipped" else {"token_weights": torch.zeros(N)}
    loss, grad = value_and_gradient(lambda s: judge(s, T, teacher_bias=minus_infinity(2), **options), S)
    assert (loss == (1e3 if how == "clipped" else 0)).all() and (grad == 0).all()


@TAILS
@DIVERGENCES
def test_a_side_without_mass_on_the_support_is_never_nan(divergence, tail):
    S, T = logits()
    support = S.topk(K).indices
    ids, logprobs = support, T.log_softmax(-1).gather(1, support)
    empty = minus_infinity(*support[0].tolist())
    loss, grad = value_and_gradient(
        lambda s: judge_listed(s, ids, logprobs, divergence=divergence, tail=tail, student_bias=empty)[:1], S
    )
    assert not loss.isnan().any() and (grad.isfinite().all() or loss.isinf().all())
