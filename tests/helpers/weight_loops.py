"""Token weightings as loops over Python numbers, one sequence at a time, written from the formulas alone."""

import math
from dataclasses import fields
from fractions import Fraction

import torch
from hypothesis import settings

from opsd_kernels import TokenStats
from opsd_kernels import weights as W

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
    """Draw statistics of every size, with `masked` at invalid tokens."""
    gen = torch.Generator().manual_seed(seed)
    drawn = {f.name: torch.rand(mask.shape, generator=gen, dtype=torch.float64) for f in fields(TokenStats)}
    drawn |= {name: -4 * x for name, x in drawn.items() if name.endswith("logprob")}
    return TokenStats(**{name: torch.where(mask, x.to(dtype), masked) for name, x in drawn.items()})


def per_token(seed, shape=(B, T)):
    return -4 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


OLD = torch.where(MASK, per_token(7), math.nan)
STARTS = per_token(8) > -1.2  # at masked tokens too


# ---------------------------------------------------------------- loops over valid tokens


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
