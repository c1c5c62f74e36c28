"""Packed rows, products with users' own objects, and errors of token weightings."""

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from weight_loops import CASES, MASK, OLD, STARTS, B, T, make_stats, run_loop

from opsd_kernels import TokenStats
from opsd_kernels import weights as W
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.weights import base, schemes
from opsd_kernels.weights.base import check_weighting

# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("rows", [1, None], ids=["(1, N)", "(N,)"])
@pytest.mark.parametrize("name", CASES)
def test_packed_rows_match_the_loop(name, rows):
    """Pack sequences one after the other without padding; one keeps its masked tokens."""
    weighting, loop, scope = CASES[name]
    keep = MASK.clone()
    keep[2] = True
    lengths = keep.sum(1)
    stats = make_stats(MASK)

    def pack(tensor):
        return tensor[keep] if rows is None else tensor[keep][None]

    packed = W.PackedSequences(schemes._moved(weighting, lambda _, tensor: pack(tensor)), lengths)
    assert (
        packed.lengths == tuple(lengths.tolist())
        and packed.scope == scope
        and packed.needs_labels == weighting.needs_labels
    )
    given = (
        TokenStats(**{f.name: pack(getattr(stats, f.name)) for f in fields(TokenStats)})
        if scope != "index"
        else None
    )
    assert_one_rounding(
        packed(given, pack(MASK)), pack(run_loop(loop, stats, MASK, STARTS & keep)), torch.float64
    )


def test_lengths_of_a_product_are_those_of_its_widest_factors():
    decay, wide = W.LinearDecay(0.5), W.PrefixDiscrepancy()
    packed = W.PackedSequences(wide, [2, 3])
    assert (
        (packed * decay).lengths
        == (decay * packed).lengths
        == (packed * W.PackedSequences(wide, [2, 3])).lengths
        == (2, 3)
    )
    for other in (wide, W.PackedSequences(wide, [3, 2])):
        assert not hasattr(packed * other, "lengths")  # the whole row is needed


# ---------------------------------------------------------------- users' own objects, and errors


class Theirs:
    scope = "row"

    def __init__(self, result=None, scope="row"):
        self.result, self.scope = result, scope

    def __call__(self, stats, mask):
        return torch.full(mask.shape, 3.0, requires_grad=True) if self.result is None else self.result


@pytest.mark.parametrize(
    "product",
    [W.LinearDecay(0.5) * Theirs(), Theirs() * W.LinearDecay(0.5)],
    ids=["ours * theirs", "theirs * ours"],
)
def test_products_with_a_users_object(product):
    weights = product(make_stats(MASK), MASK)
    assert product.scope == "row" and not product.needs_labels and not weights.requires_grad
    assert_same_bits(weights, (W.LinearDecay(0.5) * 3)(None, MASK))


def test_needs_labels():
    labelled = {name for name, (weighting, _, _) in CASES.items() if weighting.needs_labels}
    assert labelled == {
        "ratio",
        "ratio clip",
        "trust",
        "prefix",
        "segments",
        "mean one of row",
        "product",
        "wide product",
    }
    without = replace(make_stats(MASK), student_logprob=None, teacher_logprob=None)
    for name in CASES:
        if name in labelled:
            with pytest.raises(ValueError, match="^labels: expected the sampled tokens"):
                CASES[name][0](without, MASK)
        else:
            assert CASES[name][0](without, MASK).shape == (B, T)


DECAY = W.LinearDecay(0.5)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: W.FirstFraction(0), "p"),
        (lambda: W.LastFraction(1.1), "p"),
        (lambda: W.FirstFraction(math.nan), "p"),
        (lambda: W.LinearDecay(-0.1), "end"),
        (lambda: W.LinearDecay("0.1"), "end"),
        (lambda: W.ExponentialDecay(-1), "rate"),
        (lambda: W.Sigmoid(1.5, 0, 1), "w_min"),
        (lambda: W.Sigmoid(0.5, math.inf, 1), "center"),
        (lambda: W.Sigmoid(0.5, 0, 0), "width"),
        (lambda: W.ImportanceRatio([1.0]), "old_logprobs"),
        (lambda: W.ImportanceRatio(torch.ones(2, dtype=torch.int64)), "old_logprobs"),
        (lambda: W.ImportanceRatio(OLD, clip=0), "clip"),
        (lambda: W.ImportanceRatio(OLD[:, :-1])(make_stats(MASK), MASK), "old_logprobs"),
        (lambda: W.ImportanceRatio(OLD.T)(make_stats(MASK), MASK), "old_logprobs"),
        (lambda: W.ImportanceRatio(OLD.to("meta"))(make_stats(MASK), MASK), "old_logprobs"),
        (lambda: W.EntropyGate("both", below=1), "of"),
        (lambda: W.EntropyGate("student"), "below, above"),
        (lambda: W.EntropyGate("student", below=1, above=2), "below, above"),
        (lambda: W.EntropyGate("student", above=math.nan), "above"),
        (lambda: W.TrustGate(0), "threshold"),
        (lambda: W.PrefixDiscrepancy(-2), "gamma"),
        (lambda: W.PrefixDiscrepancy(of="entropy"), "of"),
        (lambda: W.SegmentMean(3, STARTS), "inner"),
        (lambda: W.SegmentMean(DECAY, STARTS.long()), "boundaries"),
        (lambda: W.SegmentMean(DECAY, STARTS[:3])(None, MASK), "boundaries"),
        (lambda: W.MeanOne(lambda stats, mask: mask.double()), "inner"),
        (lambda: W.PackedSequences(DECAY, [3, -1]), "lengths"),
        (lambda: W.PackedSequences(DECAY, [3.0]), "lengths"),
        (lambda: W.PackedSequences(DECAY, 7), "lengths"),
        (lambda: W.PackedSequences(DECAY, torch.ones(1, 2, dtype=torch.int64)), "lengths"),
        (lambda: W.PackedSequences(DECAY, [3, 4])(None, torch.ones(1, 8, dtype=torch.bool)), "lengths"),
        (lambda: W.PackedSequences(DECAY, [3, 5])(None, torch.ones(2, 4, dtype=torch.bool)), "mask"),
        (lambda: DECAY(None, MASK.long()), "mask"),
        (lambda: W.TrustGate(0.5)(None, MASK), "stats"),
        (lambda: check_weighting(SimpleNamespace(scope="row")), "token_weights"),
        (lambda: check_weighting(len), "token_weights"),
        (lambda: check_weighting(Theirs(scope="token")), "token_weights.scope"),
        (lambda: DECAY * Theirs(scope="token"), "token_weights.scope"),
        (lambda: (DECAY * Theirs(result=3.0))(None, MASK), "token_weights"),
        (lambda: W.MeanOne(Theirs(result=MASK))(None, MASK), "token_weights"),
        (lambda: W.SegmentMean(Theirs(result=torch.ones(B, 1)), STARTS)(None, MASK), "token_weights"),
        (lambda: base.check_weights(torch.ones(3), (4,)), "token_weights"),
    ],
)
def test_errors_name_the_argument(make, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .* got "):
        make()


def test_products_with_anything_else_are_type_errors():
    for other in ("2", None, True, [DECAY]):
        with pytest.raises(TypeError, match="operand|multiply"):
            DECAY * other


def test_a_tensor_as_a_factor():
    """A tensor may stand on the right of `*`: on the left its own `__mul__` comes first and refuses."""
    given = torch.linspace(0.1, 2.0, MASK.numel()).reshape(MASK.shape)
    product = W.FirstFraction(0.5) * given
    assert product.scope == "index"
    assert_same_bits(product(None, MASK), W.FirstFraction(0.5)(None, MASK) * given.double())
    with pytest.raises(TypeError, match="weights: expected a floating-point tensor"):
        W.FirstFraction(0.5) * MASK
