"""Token weightings against loops over Python numbers, one sequence at a time, written from the formulas alone."""

import math
from dataclasses import fields, replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_kernels import TokenStats
from opsd_kernels import weights as W
from opsd_kernels.testing import assert_one_rounding, assert_same_bits
from opsd_kernels.weights import base, schemes
from opsd_kernels.weights.base import check_weighting

few = settings(max_examples=25, deadline=None, derandomize=True)
B, T = 8, 11
LAYOUTS = [
    "00011111111",
    "11111110000",
    "11011001110",
    "11111111111",
    "00000000000",
    "00001000000",
    "10000000001",
    "01010101010",
]
MASK = torch.tensor([[c == "1" for c in row] for row in LAYOUTS])


def make_stats(mask, seed=0, dtype=torch.float32, masked=math.nan):
    """Statistics of every size, `masked` where a token is not valid."""
    gen = torch.Generator().manual_seed(seed)
    drawn = {f.name: torch.rand(mask.shape, generator=gen, dtype=torch.float64) for f in fields(TokenStats)}
    drawn |= {name: -4 * x for name, x in drawn.items() if name.endswith("logprob")}
    return TokenStats(**{name: torch.where(mask, x.to(dtype), masked) for name, x in drawn.items()})


def per_token(seed, shape=(B, T)):
    return -4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


OLD = torch.where(MASK, per_token(7), math.nan)
STARTS = per_token(8) > -1.2  # at masked tokens too


# ---------------------------------------------------------------- the loops: (valid tokens of one sequence as dicts) -> their weights


def share(p, last=False):
    def loop(tokens):
        places = [Fraction(2 * t - 1, 2 * len(tokens)) for t in range(1, len(tokens) + 1)]
        return [float(u >= 1 - Fraction(str(p)) if last else u < Fraction(str(p))) for u in places]

    return loop


def by_position(formula):
    return lambda tokens: [formula(t, len(tokens)) for t in range(1, len(tokens) + 1)]


def linear(end):
    return by_position(lambda t, T: 1.0 if T == 1 else 1 + (end - 1) * (t - 1) / (T - 1))


def sigmoid(w_min, center, width):
    return by_position(lambda t, T: w_min + (1 - w_min) / (1 + math.exp(-((t - 0.5) / T - center) / width)))


def by_token(formula):
    return lambda tokens: [formula(token) for token in tokens]


def ratio(clip):
    return by_token(lambda y: min(math.exp(max(-20.0, min(20.0, y["student_logprob"] - y["old"]))), clip))


def trust(threshold):
    return by_token(
        lambda y: float(
            min(math.exp(y["teacher_logprob"]) / math.exp(y["student_logprob"]), 1.0) >= threshold
        )
    )


def prefix(gamma, of):
    def loop(tokens):
        d = [
            abs(y["student_logprob"] - y["teacher_logprob"]) if of == "logprob" else max(y["divergence"], 0.0)
            for y in tokens
        ]
        return [
            1 + gamma * (1 - (math.fsum(d[:t]) / math.fsum(d) if math.fsum(d) else 0.0))
            for t in range(len(d))
        ]

    return loop


def segment_mean(inner):
    def loop(tokens):
        weights = inner(tokens)
        return [
            mean([w for w, z in zip(weights, tokens, strict=True) if z["segment"] == y["segment"]])
            for y in tokens
        ]

    return loop


def mean_one(inner):
    def loop(tokens):
        weights = inner(tokens)
        return [w / mean(weights) if mean(weights) else 0.0 for w in weights]

    return loop


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def times(left, right):
    return lambda tokens: [a * b for a, b in zip(left(tokens), right(tokens), strict=True)]


CASES = {
    "first": (W.FirstFraction(0.3), share(0.3), "index"),
    "last": (W.LastFraction(0.3), share(0.3, last=True), "index"),
    "all": (W.FirstFraction(1), share(1), "index"),
    "linear": (W.LinearDecay(0.2), linear(0.2), "index"),
    "exponential": (W.ExponentialDecay(3.0), by_position(lambda t, T: math.exp(-3.0 * t / T)), "index"),
    "sigmoid": (W.Sigmoid(0.1, 0.4, 0.07), sigmoid(0.1, 0.4, 0.07), "index"),
    "sigmoid down": (W.Sigmoid(0.1, 0.4, -0.07), sigmoid(0.1, 0.4, -0.07), "index"),
    "ratio": (W.ImportanceRatio(OLD), ratio(2.0), "row"),
    "ratio clip": (W.ImportanceRatio(OLD, clip=0.5), ratio(0.5), "row"),
    "below": (
        W.EntropyGate("student", below=0.5),
        by_token(lambda y: float(y["student_entropy"] < 0.5)),
        "row",
    ),
    "above": (
        W.EntropyGate("teacher", above=0.3),
        by_token(lambda y: float(y["teacher_entropy"] > 0.3)),
        "row",
    ),
    "trust": (W.TrustGate(0.4), trust(0.4), "row"),
    "prefix": (W.PrefixDiscrepancy(), prefix(0.5, "logprob"), "sequence"),
    "prefix divergence": (W.PrefixDiscrepancy(-0.7, of="divergence"), prefix(-0.7, "divergence"), "sequence"),
    "segments": (W.SegmentMean(W.ImportanceRatio(OLD), STARTS), segment_mean(ratio(2.0)), "sequence"),
    "mean one of index": (W.MeanOne(W.LinearDecay(0.2)), mean_one(linear(0.2)), "index"),
    "mean one of row": (W.MeanOne(W.TrustGate(0.4)), mean_one(trust(0.4)), "sequence"),
    "product": (
        0.5 * W.LinearDecay(0.2) * W.ImportanceRatio(OLD),
        times(times(by_token(lambda y: 0.5), linear(0.2)), ratio(2.0)),
        "row",
    ),
    "wide product": (
        W.PrefixDiscrepancy() * W.TrustGate(0.4) * 2,
        times(times(prefix(0.5, "logprob"), trust(0.4)), by_token(lambda y: 2)),
        "sequence",
    ),
}
READERS = {name: weighting for name, (weighting, _, scope) in CASES.items() if scope != "index"}


def run_loop(loop, stats, mask, starts=STARTS):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        tokens = [{f.name: getattr(stats, f.name)[b, t].item() for f in fields(TokenStats)} for t in valid]
        for t, token in zip(valid, tokens, strict=True):
            token |= {"old": OLD[b, t].item(), "segment": starts[b, : t + 1].sum().item()}
        for t, weight in zip(valid, loop(tokens), strict=True):
            out[b, t] = weight
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_loop(name, dtype):
    """Left, right and interior padding, an empty sequence, one token; NaN at masked tokens."""
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
    """Also where p * T is whole or a tie, which the floating-point product misses by a rounding error."""
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
    """The op fills the statistics chunk by chunk; later rows hold zeros."""
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
    """On the meta device there is nothing to read: `.item()` and branches on data raise."""
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
    """(statistics, mask) of one sequence; the columns that are not given are 0."""
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


# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("rows", [1, None], ids=["(1, N)", "(N,)"])
@pytest.mark.parametrize("name", CASES)
def test_packed_rows_match_the_loop(name, rows):
    """Sequences without their padding behind each other; in one of them masked tokens stay."""
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
    """On the right of `*`: on the left a tensor answers first, and refuses."""
    given = torch.linspace(0.1, 2.0, MASK.numel()).reshape(MASK.shape)
    product = W.FirstFraction(0.5) * given
    assert product.scope == "index"
    assert_same_bits(product(None, MASK), W.FirstFraction(0.5)(None, MASK) * given.double())
    with pytest.raises(TypeError, match="weights: expected a floating-point tensor"):
        W.FirstFraction(0.5) * MASK
