"""Token weightings against loops over Python numbers (weight_loops.py), and the tokens that affect them."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weight_loops import CASES, MASK, READERS, B, T, few, make_stats, per_token, run_loop, share

from opsd_kernels import TokenStats
from opsd_kernels import weights as W
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.weights import schemes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_loop(name, dtype):
    """Left, right and interior padding, an empty sequence and one token, with NaN at masked tokens."""
    weighting, loop, scope = CASES[name]
    stats = make_stats(MASK, dtype=dtype)
    truth = run_loop(loop, stats, MASK)
    assert weighting.scope == scope
    assert_one_rounding(weighting(stats if scope != "index" else None, MASK), truth, torch.float64)
    assert name == "all" or truth[MASK].unique().numel() > 1


@pytest.mark.parametrize("name", CASES)
def test_one_sequence_without_a_batch_dimension(name):
    weighting, stats, row = CASES[name][0], make_stats(MASK), 2
    one = TokenStats(**{f.name: getattr(stats, f.name)[row] for f in fields(TokenStats)})
    parts = schemes._moved(weighting, lambda _, tensor: tensor[row])
    assert_same_bits(parts(one, MASK[row]), weighting(stats, MASK)[row])


@pytest.mark.parametrize("p", ["0.1", "0.25", "0.3", "0.55", "0.7", "0.85", "0.95", "1"])
def test_shares_are_exact_and_complementary(p):
    """Shares are exact even where p * T is whole or a tie, which the product misses by a rounding error."""
    for length in range(1, 201):
        mask, tokens = torch.ones(1, length, dtype=torch.bool), [{}] * length
        first, last = W.FirstFraction(float(p))(None, mask), W.LastFraction(float(p))(None, mask)
        assert_same_bits(first[0], torch.tensor(share(p)(tokens), dtype=torch.float64))
        assert_same_bits(last[0], torch.tensor(share(p, last=True)(tokens), dtype=torch.float64))
        if p != "1":
            assert_same_bits(W.LastFraction(1 - float(p))(None, mask), 1 - first)


# ---------------------------------------------------------------- what influences what


JUNK = st.sampled_from([0.0, 1e30, -1e30, math.inf, -math.inf, math.nan])


@given(seed=st.integers(0, 10**6), junk=JUNK, name=st.sampled_from(list(READERS)))
@few
def test_masked_tokens_influence_nothing(seed, junk, name):
    clean, spoilt = make_stats(MASK, seed, masked=0.0), make_stats(MASK, seed, masked=junk)
    weighting = READERS[name]
    moved = schemes._moved(
        weighting, lambda _, tensor: tensor if tensor.dtype == torch.bool else torch.where(MASK, tensor, junk)
    )
    weights = moved(spoilt, MASK)
    assert_same_bits(weights, weighting(clean, MASK))
    assert (weights[~MASK] == 0).all()


@given(seed=st.integers(0, 10**6), row=st.integers(0, B - 1), junk=JUNK, name=st.sampled_from(list(READERS)))
@few
def test_sequences_do_not_depend_on_each_other(seed, row, junk, name):
    weighting, stats = READERS[name], make_stats(MASK, seed)
    others = torch.arange(B)[:, None] != row
    spoilt = TokenStats(
        **{
            f.name: getattr(stats, f.name).masked_fill(others & (per_token(seed) < -2), junk)
            for f in fields(TokenStats)
        }
    )
    assert_same_bits(weighting(spoilt, MASK)[row], weighting(stats, MASK)[row])


@given(
    seed=st.integers(0, 10**6),
    split=st.integers(0, B * T),
    name=st.sampled_from([n for n, w in READERS.items() if w.scope == "row"]),
)
@few
def test_row_weights_need_their_own_row_only(seed, split, name):
    """Rows that the op has not computed yet hold zeros and do not change the others."""
    weighting, stats = READERS[name], make_stats(MASK, seed)
    done = (torch.arange(B * T) < split).view(B, T)
    partly = TokenStats(
        **{f.name: torch.where(done, getattr(stats, f.name), 0.0) for f in fields(TokenStats)}
    )
    early = weighting(partly, MASK)
    assert early.isfinite().all()
    assert_same_bits(early[done], weighting(stats, MASK)[done])


@pytest.mark.parametrize("name", CASES)
def test_unfinished_statistics_give_finite_weights(name):
    nothing = TokenStats(**{f.name: torch.zeros(B, T) for f in fields(TokenStats)})
    assert CASES[name][0](nothing, MASK).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_weights_carry_no_gradient_and_repeat_bit_for_bit(name):
    weighting, stats = CASES[name][0], make_stats(MASK)
    live = TokenStats(**{f.name: getattr(stats, f.name).requires_grad_() for f in fields(TokenStats)})
    weights = weighting(live, MASK)
    assert not weights.requires_grad and weights.dtype == torch.float64
    assert_same_bits(weights, weighting(live, MASK))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_back_from_the_device(name):
    """On the meta device `.item()` and branches on data raise."""
    stats = TokenStats(**{f.name: torch.zeros(B, T, device="meta") for f in fields(TokenStats)})
    weighting = schemes._moved(CASES[name][0], lambda _, tensor: tensor.to("meta"))
    assert weighting(stats, MASK.to("meta")).shape == (B, T)
    packed = W.PackedSequences(
        schemes._moved(CASES[name][0], lambda _, tensor: tensor[:2].reshape(1, -1).to("meta")), (5, 0, 17)
    )
    one = TokenStats(**{f.name: torch.zeros(1, 2 * T, device="meta") for f in fields(TokenStats)})
    assert packed(one, torch.ones(1, 2 * T, dtype=torch.bool, device="meta")).shape == (1, 2 * T)


# ---------------------------------------------------------------- edges of single schemes


def row_stats(**columns):
    """Return (statistics, mask) of one sequence; missing columns are 0."""
    given = {name: torch.tensor([values], dtype=torch.float64) for name, values in columns.items()}
    zeros = torch.zeros_like(next(iter(given.values())))
    return TokenStats(**{f.name: zeros for f in fields(TokenStats)} | given), torch.ones_like(
        zeros, dtype=torch.bool
    )


@pytest.mark.parametrize(
    "d, weights",
    [
        ([0.0, 0.0, 0.0], [1.5, 1.5, 1.5]),
        (
            [1.0, math.inf, 1.0, math.inf, 3.0],
            [1.5, 1.5, 1.25, 1.25, 1.0],
        ),  # the limit of large equal numbers
        ([1.0, math.nan, 1.0], [1.5, 1.25, 1.25]),
        ([1.0, -5.0, 1.0], [1.5, 1.25, 1.25]),
    ],
    ids=["zero", "infinite", "nan", "negative"],
)
def test_prefix_discrepancy_is_total(d, weights):
    stats, mask = row_stats(divergence=d)
    assert_same_bits(
        W.PrefixDiscrepancy(of="divergence")(stats, mask)[0], torch.tensor(weights, dtype=torch.float64)
    )


def test_gates_and_ratios_at_the_ends_of_the_scale():
    inf = math.inf
    stats, mask = row_stats(
        student_logprob=[-inf, -inf, -1.0, -1e4, 0.0], teacher_logprob=[-inf, -1.0, -inf, 0.0, -1e4]
    )
    assert W.TrustGate(0.5)(stats, mask).tolist() == [[0, 1, 0, 1, 0]]
    assert W.TrustGate(1)(
        *row_stats(student_logprob=[-1.0, -1.0], teacher_logprob=[-1.0, -1.1])
    ).tolist() == [[1, 0]]
    old = torch.tensor([[-inf, 0.0, -inf, 0.0, math.nan]], dtype=torch.float64)
    weights = W.ImportanceRatio(old, clip=1e30)(stats, mask)
    expected = torch.tensor([[0.0, -20.0, 20.0, -20.0, math.nan]], dtype=torch.float64).exp()
    assert_same_bits(weights.isnan(), expected.isnan())
    assert_one_rounding(weights[:, :4], expected[:, :4], torch.float64)


def test_mean_one_of_nothing_is_zero():
    closed = W.EntropyGate("student", above=100.0)
    assert (W.MeanOne(closed)(make_stats(MASK), MASK) == 0).all()
    means = W.MeanOne(W.Sigmoid(0, 0.5, 0.1))(None, MASK).sum(1)
    assert_one_rounding(means, MASK.sum(1).double(), torch.float64)


def test_zero_tokens_and_zero_sequences():
    for shape in ((0, 5), (3, 0)):
        mask = torch.ones(shape, dtype=torch.bool)
        stats = make_stats(mask)
        for name, (weighting, _, _) in CASES.items():
            assert (
                schemes._moved(weighting, lambda _, tensor, shape=shape: tensor.new_zeros(shape))(
                    stats, mask
                ).shape
                == shape
            ), name
