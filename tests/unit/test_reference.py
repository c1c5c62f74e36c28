"""The reference against loops over Python numbers and finite differences."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference_cases import (
    CLIPPED,
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

from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.testing.reference import (
    linear_logprobs_reference,
)

# ---------------------------------------------------------------- by loops over Python numbers


def probabilities(row: Tensor) -> list[float]:
    weights = [math.exp(x) for x in row.tolist()]
    return [w / math.fsum(weights) for w in weights]


def ratio(a: float, b: float) -> float:
    return 0.0 if a == 0 else math.inf if b == 0 else a * math.log(a / b)


def term(q: float, p: float, divergence: str, beta: float) -> float:
    m = beta * p + (1 - beta) * q
    return {
        "reverse_kl": lambda: ratio(q, p),
        "forward_kl": lambda: ratio(p, q),
        "jsd": lambda: beta * ratio(p, m) + (1 - beta) * ratio(q, m),
        "skew_reverse_kl": lambda: ratio(q, m),
        "skew_forward_kl": lambda: ratio(p, m),
        "tvd": lambda: abs(p - q) / 2,
        "mixed_kl": lambda: beta * ratio(p, q) + (1 - beta) * ratio(q, p),
    }[divergence]()


def chosen(
    q: list[float], p: list[float], topk: int | None, side: str, tail: str
) -> list[tuple[float, float]]:
    if topk is None:
        return list(zip(q, p, strict=True))
    by = q if side == "student" else p
    support = sorted(range(len(q)), key=lambda v: -by[v])[:topk]
    pairs = [(q[v], p[v]) for v in support]
    mass = [math.fsum(pair[i] for pair in pairs) for i in (0, 1)]
    if tail == "renormalize":
        return [(a / mass[0], b / mass[1]) for a, b in pairs]
    return [*pairs, (1 - mass[0], 1 - mass[1])] if tail == "bucket" else pairs


def by_loop(
    S: Tensor,
    T: Tensor,
    divergence: str,
    clips: dict,
    topk: int | None = None,
    side: str = "student",
    tail: str = "bucket",
) -> tuple[Tensor, Tensor]:
    """Return (D, clipped fraction), both (n,)."""
    losses, fractions = [], []
    for s, t in zip(S, T, strict=True):
        pairs = chosen(probabilities(s), probabilities(t), topk, side, tail)
        f = [term(a, b, divergence, 0.3) for a, b in pairs]
        over = [x > clips.get("entry_clip", math.inf) for x in f]
        D = math.fsum(clips["entry_clip"] if high else x for x, high in zip(f, over, strict=True))
        too_far = D > clips.get("token_clip", math.inf)
        losses.append(clips["token_clip"] if too_far else D)
        fractions.append(1.0 if too_far else sum(over) / len(f))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(fractions, dtype=torch.float64)


def assert_as_by_loop(
    result: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, Tensor], clips: dict
) -> None:
    loss, stats = result
    assert_one_rounding(loss, expected[0], torch.float64)
    assert_same_bits(stats["divergence"], loss)
    assert ("clipped_fraction" in stats) == bool(clips)
    if clips:
        assert 0 < expected[1].mean() < 1
        assert_one_rounding(stats["clipped_fraction"], expected[1], torch.float64)


@DIVERGENCES
@CLIPPED
def test_whole_vocabulary_by_loop(divergence, clips):
    S, T = logits()
    assert_as_by_loop(
        judge(S, T, divergence=divergence, return_stats=True, **clips),
        by_loop(S, T, divergence, clips),
        clips,
    )


@DIVERGENCES
@CLIPPED
@SIDES
@TAILS
def test_topk_by_loop(divergence, clips, side, tail):
    S, T = logits()
    options = {"topk": K, "topk_support": side, "topk_tail": tail, "return_stats": True, **clips}
    assert_as_by_loop(
        judge(S, T, divergence=divergence, **options), by_loop(S, T, divergence, clips, K, side, tail), clips
    )


def test_tvd_clip_by_hand():
    q, p = (
        torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64),
        torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64),
    )
    loss, stats = judge(q.log(), p.log(), divergence="tvd", entry_clip=0.15, return_stats=True)
    assert_one_rounding(loss, torch.tensor([0.3], dtype=torch.float64), torch.float64)
    assert_one_rounding(stats["clipped_fraction"], torch.tensor([2 / 3], dtype=torch.float64), torch.float64)


def test_statistics_stay_those_of_the_whole_vocabulary():
    S, T = logits()
    labels = torch.arange(N)
    whole = judge(S, T, labels=labels, return_stats=True)[1]
    restricted = judge(S, T, labels=labels, return_stats=True, topk=2, entry_clip=0.05)[1]
    listed = judge_listed(S, labels[:, None], torch.full((N, 1), -0.5), labels=labels, return_stats=True)[1]
    assert whole.keys() == restricted.keys() - {"clipped_fraction"}
    assert listed.keys() == {name for name in whole if not name.startswith("teacher")} - {"top1_agreement"}
    for name in whole.keys() - {"divergence"}:
        assert_same_bits(restricted[name], whole[name])
        if name in listed:
            assert_same_bits(listed[name], whole[name])


# ---------------------------------------------------------------- by finite differences


def gradcheck(loss_of: object, S: Tensor) -> None:
    assert torch.autograd.gradcheck(loss_of, S.clone().requires_grad_(), fast_mode=False)


@DIVERGENCES
@CLIPPED
def test_gradient_under_clips(divergence, clips):
    S, T = logits()
    gradcheck(lambda s: judge(s, T, divergence=divergence, **clips), S)


@DIVERGENCES
@SIDES
@TAILS
def test_gradient_on_a_support(divergence, side, tail):
    S, T = logits()
    options = {"topk": K, "topk_support": side, "topk_tail": tail, "entry_clip": 0.2}
    gradcheck(lambda s: judge(s, T, divergence=divergence, **options), S)


@DIVERGENCES
@TAILS
def test_gradient_on_a_list(divergence, tail):
    S, T = logits()
    logprobs, ids = T.log_softmax(-1)[:, :K], torch.arange(K).expand(N, K)
    logprobs = logprobs.index_fill(1, torch.tensor([1]), -math.inf)
    gradcheck(lambda s: judge_listed(s, ids, logprobs, divergence=divergence, tail=tail, entry_clip=0.2), S)


def test_gradient_of_logprobs_and_entropy():
    S, labels = logits()[0], torch.tensor([0, 3, -100, 7, 2])
    head, bias = torch.eye(V, dtype=torch.float64), torch.linspace(-1, 1, V, dtype=torch.float64)
    options = {
        "temperature": 1.3,
        "logit_scale": 0.7,
        "softcap": 3.0,
        "vocab_size": V - 1,
        "return_entropy": True,
    }
    leaves = [x.clone().requires_grad_() for x in (S, head, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs_reference(h, w, labels, bias=b, **options), leaves, fast_mode=False
    )


# ---------------------------------------------------------------- a teacher that lists its entries


@DIVERGENCES
@TAILS
@CLIPPED
def test_a_list_of_the_teachers_largest_is_its_support(divergence, tail, clips):
    S, T = logits()
    logprobs, ids = T.log_softmax(-1).topk(K)
    listed = value_and_gradient(
        lambda s: judge_listed(s, ids, logprobs, divergence=divergence, tail=tail, **clips), S
    )
    assert_equal(
        listed,
        value_and_gradient(
            lambda s: judge(
                s, T, divergence=divergence, topk=K, topk_support="teacher", topk_tail=tail, **clips
            ),
            S,
        ),
    )


@DIVERGENCES
@TAILS
def test_padding_of_a_list_influences_nothing(divergence, tail):
    S, T = logits()
    logprobs, ids = T.log_softmax(-1).topk(K)
    padding = torch.tensor([-7, 10**9, 0]).expand(N, 3)
    ids_padded = torch.cat([padding[:, :1], ids, padding[:, 1:], ids[:, :1]], 1)
    logprobs_padded = torch.nn.functional.pad(logprobs, (1, 3), value=-math.inf)
    options = {"divergence": divergence, "tail": tail, "entry_clip": 0.05}
    padded = value_and_gradient(lambda s: judge_listed(s, ids_padded, logprobs_padded, **options), S)
    assert_equal(padded, value_and_gradient(lambda s: judge_listed(s, ids, logprobs, **options), S))
    fractions = [
        judge_listed(S, *listed, **options, return_stats=True)[1]["clipped_fraction"]
        for listed in ((ids_padded, logprobs_padded), (ids, logprobs))
    ]
    assert_same_bits(*fractions)
    loss, grad = value_and_gradient(
        lambda s: judge_listed(s, ids, torch.full_like(logprobs, -math.inf), **options), S
    )
    assert (loss == 0).all() and (grad == 0).all()


@DIVERGENCES
@TAILS
def test_an_id_that_comes_again_counts_once(divergence, tail):
    """With its first log-prob; one of -inf does not count as an occurrence."""
    S, T = logits()
    logprobs, ids = T.log_softmax(-1).topk(K)
    again = torch.tensor([0, *range(K), 1, 0])
    others = logprobs[:, again] - torch.linspace(0, 1, len(again))
    others[:, 0], others[:, 1 : K + 1] = -math.inf, logprobs
    options = {"divergence": divergence, "tail": tail, "entry_clip": 0.05}
    repeated = value_and_gradient(lambda s: judge_listed(s, ids[:, again], others, **options), S)
    assert_equal(repeated, value_and_gradient(lambda s: judge_listed(s, ids, logprobs, **options), S))
    fractions = [
        judge_listed(S, *listed, **options, return_stats=True)[1]["clipped_fraction"]
        for listed in ((ids[:, again], others), (ids, logprobs))
    ]
    assert_same_bits(*fractions)


def test_a_masked_token_may_list_anything():
    S, T = logits()
    logprobs, ids = T.log_softmax(-1).topk(K)
    mask = torch.tensor([1, 0, 1, 1, 0])
    garbage = logprobs.masked_fill(mask[:, None] == 0, math.nan), ids.masked_fill(mask[:, None] == 0, -5)
    loss, grad = value_and_gradient(
        lambda s: judge_listed(
            s.masked_fill(mask[:, None] == 0, math.nan), garbage[1], garbage[0], mask=mask
        ),
        S,
    )
    clean, clean_grad = value_and_gradient(lambda s: judge_listed(s, ids, logprobs), S)
    assert_same_bits(loss, clean * mask)
    assert (grad[mask == 0] == 0).all() and not grad.isnan().any()
    assert_same_bits(grad[mask == 1], clean_grad[mask == 1])


# ---------------------------------------------------------------- weights that are computed from statistics


class Recorded:
    """A weighting, divergence / teacher entropy or 1 + position, that records its arguments."""

    def __init__(self, scope: str) -> None:
        self.scope, self.stats, self.mask = scope, None, None

    def __call__(self, stats: SimpleNamespace | None, mask: Tensor) -> Tensor:
        self.stats, self.mask = stats, mask
        return (
            1.0 + torch.arange(mask.shape[1]).expand(mask.shape)
            if self.scope == "index"
            else stats.divergence / stats.teacher_entropy
        )


@pytest.mark.parametrize("scope", ["index", "row", "sequence"])
@pytest.mark.parametrize(
    "leading, sequences",
    [((6,), (1, 6)), ((2, 3), (2, 3)), ((2, 1, 3), (2, 3)), ((), (1, 1)), ((0, 3), (0, 3))],
    ids=str,
)
def test_a_weighting_is_called_with_sequences(scope, leading, sequences):
    gen = torch.Generator().manual_seed(1)
    S, T = (torch.randn(*leading, V, generator=gen, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(leading, generator=gen) > 0.2
    weighting = Recorded(scope)
    by_object = value_and_gradient(lambda s: judge(s, T, mask=mask, token_weights=weighting), S)
    assert weighting.mask.shape == sequences and weighting.mask.dtype == torch.bool
    assert torch.equal(weighting.mask.view(leading), mask)
    stats = judge(S, T, mask=mask, return_stats=True)[1]
    if scope == "index":
        assert weighting.stats is None
    else:
        assert weighting.stats.student_logprob is None and weighting.stats.clipped_fraction is None
        for name, values in stats.items():
            assert not getattr(weighting.stats, name).requires_grad
            assert_same_bits(getattr(weighting.stats, name), values.view(sequences))
    tensor = Recorded(scope)(
        SimpleNamespace(**{name: values.view(sequences) for name, values in stats.items()}), weighting.mask
    ).view(leading)
    by_tensor = value_and_gradient(lambda s: judge(s, T, mask=mask, token_weights=tensor), S)
    for ours, theirs in zip(by_object, by_tensor, strict=True):
        assert_same_bits(ours, theirs)


# ---------------------------------------------------------------- log-probs


def test_logprobs_by_loop():
    S, labels = logits()[0], torch.tensor([0, 3, -100, 7, 2])
    mask = torch.tensor([1, 1, 1, 1, 0])
    logprobs, entropy = linear_logprobs_reference(
        S, torch.eye(V, dtype=S.dtype), labels, mask=mask, temperature=2.0, vocab_size=8, return_entropy=True
    )
    for i, label in enumerate(labels.tolist()):
        q = probabilities(S[i, :8] / 2)
        counts = i not in (2, 4)
        expected = (math.log(q[label]), -math.fsum(x * math.log(x) for x in q)) if counts else (0.0, 0.0)
        for actual, truth in zip((logprobs[i], entropy[i]), expected, strict=True):
            assert_one_rounding(actual, torch.tensor(truth, dtype=torch.float64), torch.float64)


def test_an_excluded_column_leaves_the_entropy_finite():
    S, labels = logits()[0], torch.arange(N)
    head, kept = torch.eye(V, dtype=S.dtype), [v for v in range(V) if v != 7]

    def both(weight: Tensor, bias: Tensor | None) -> object:
        return lambda s: torch.stack(
            linear_logprobs_reference(s, weight, labels, bias=bias, return_entropy=True)
        )

    assert_equal(
        value_and_gradient(both(head, minus_infinity(7)), S), value_and_gradient(both(head[kept], None), S)
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"teacher_mix": 1.0},
        {"entry_clip": 0.0},
        {"token_clip": -1.0},
        {"topk": 2, "topk_tail": "rest"},
        {"topk": 2, "topk_support": "both"},
    ],
    ids=str,
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        judge(*logits(), **wrong)
