"""Token weightings: how much each token of a rollout counts.

    weights = FirstFraction(0.3) * EntropyGate("teacher", below=2.0)
    loss = linear_divergence(..., token_weights=weights)

base.py has the contract of a weighting, and the promises of these schemes beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..spec import check_choice, check_number, check_tensor, expect
from .base import (
    Schedule,
    Scheme,
    TokenWeighting,
    Wrapper,
    check_weights,
    of_tokens,
    running_sum,
    statistic,
)

# ---------------------------------------------------------------- scope "index"


# p * T of a decimal p misses a tie by its rounding error, which is far below this for any practical length.
_TIE = 2.0**-20


@dataclass(frozen=True)
class _Share(Schedule):
    p: float

    def __post_init__(self) -> None:
        expect(0 < check_number("p", self.p) <= 1, "p", "a share in (0, 1]", self.p)


class FirstFraction(_Share):
    """1 inside the first share `p` of a sequence's valid tokens, else 0; 0 < p <= 1.

    Token t is inside if (t - 1/2) / T < p: p * T tokens, rounded, and exact where p * T is whole. A sequence
    with p * T <= 1/2 has none. Ties (p * T = k + 1/2) are rounded down; `LastFraction(1 - p)` rounds them up
    and is the exact complement.
    """

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return (t - 0.5 < self.p * T - _TIE).double()


class LastFraction(_Share):
    """1 inside the last share `p` of a sequence's valid tokens, else 0; 0 < p <= 1.

    Token t is inside if (t - 1/2) / T >= 1 - p. See `FirstFraction`.
    """

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return (t - 0.5 >= (1 - self.p) * T - _TIE).double()


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """1 at the first valid token, `end` >= 0 at the last, linear in (t - 1) / (T - 1).

    A single token has weight 1. `end` > 1 lets the weights grow.
    """

    end: float

    def __post_init__(self) -> None:
        expect(check_number("end", self.end) >= 0, "end", "a number >= 0", self.end)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        x = (t - 1) / (T - 1).clamp(min=1)
        return (1 - x) + self.end * x  # exact at both ends


@dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """exp(-rate * t / T), t = 1..T, rate >= 0: near 1 at the first valid token, exp(-rate) at the last."""

    rate: float

    def __post_init__(self) -> None:
        expect(check_number("rate", self.rate) >= 0, "rate", "a number >= 0", self.rate)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return torch.exp(-self.rate * (t / T))


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """w_min + (1 - w_min) * sigmoid((u - center) / width) with u = (t - 1/2) / T.

    The position weights of PW-OPSD (arXiv:2605.21606). 0 <= w_min <= 1. A positive `width` favours late
    tokens, a negative one early tokens.
    """

    w_min: float
    center: float
    width: float

    def __post_init__(self) -> None:
        expect(0 <= check_number("w_min", self.w_min) <= 1, "w_min", "a number in [0, 1]", self.w_min)
        check_number("center", self.center)
        expect(check_number("width", self.width) != 0, "width", "a number other than 0", self.width)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return self.w_min + (1 - self.w_min) * torch.sigmoid(((t - 0.5) / T - self.center) / self.width)


# ---------------------------------------------------------------- scope "row"


@dataclass(frozen=True, eq=False)
class ImportanceRatio(Scheme):
    """min(exp(clamp(log s(y) - old, -20, 20)), clip), the importance ratio of SDPO (arXiv:2601.20802).

    `old_logprobs` are log-probs (nats) under the sampling policy, of the leading shape of the hidden states;
    masked tokens may hold anything. Equal log-probs give 1, both -inf included. A NaN at a valid token stays
    NaN, so that it shows.
    """

    old_logprobs: Tensor = field(repr=False)
    clip: float = 2.0
    scope: ClassVar[str] = "row"
    needs_labels: ClassVar[bool] = True
    per_token: ClassVar[tuple[str, ...]] = ("old_logprobs",)

    def __post_init__(self) -> None:
        old = check_tensor("old_logprobs", self.old_logprobs)
        expect(old.is_floating_point(), "old_logprobs", "a floating-point tensor", old.dtype, TypeError)
        check_number("clip", self.clip, positive=True)

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        now = statistic(stats, "student_logprob", mask, self)
        old = torch.where(mask, of_tokens("old_logprobs", self.old_logprobs, mask).double(), 0.0)
        gap = torch.where(now == old, 0.0, now - old)
        return gap.clamp(-20, 20).exp().clamp(max=self.clip)


@dataclass(frozen=True)
class EntropyGate(Scheme):
    """1 where an entropy (nats) is < `below`, or > `above`; else 0. Exactly one bound is given.

    `of` names the side, "student" or "teacher".
    """

    of: str
    below: float | None = None
    above: float | None = None
    scope: ClassVar[str] = "row"
    reads_metrics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("of", self.of, ("student", "teacher"))
        expect(
            (self.below is None) != (self.above is None),
            "below, above",
            "exactly one of the two",
            f"below={self.below}, above={self.above}",
        )
        name = "above" if self.below is None else "below"
        check_number(name, getattr(self, name))

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        entropy = statistic(stats, f"{self.of}_entropy", mask, self)
        if self.below is not None:
            return (entropy < self.below).double()
        assert self.above is not None
        return (entropy > self.above).double()


@dataclass(frozen=True)
class TrustGate(Scheme):
    """1 where min(t(y) / s(y), 1) >= threshold for the sampled token y, else 0; 0 < threshold <= 1.

    The trust region of TrOPD (arXiv:2606.01249), compared as log t(y) - log s(y) >= log(threshold), which
    cannot overflow. Where both probabilities are 0 the gate is closed.
    """

    threshold: float
    scope: ClassVar[str] = "row"
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect(
            0 < check_number("threshold", self.threshold) <= 1,
            "threshold",
            "a ratio in (0, 1]",
            self.threshold,
        )

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        teacher, student = (
            statistic(stats, f"{side}_logprob", mask, self) for side in ("teacher", "student")
        )
        return (teacher - student >= math.log(self.threshold)).double()


# ---------------------------------------------------------------- scope "sequence"


@dataclass(frozen=True)
class PrefixDiscrepancy(Scheme):
    """w_t = 1 + gamma * (1 - sum_{k<t} d_k / sum_k d_k): IW-OPD (arXiv:2606.22600, Algorithm 1).

    Tokens after little accumulated discrepancy count more. With of="logprob" d_k = |log s(y_k) - log t(y_k)|
    of the sampled token; with of="divergence", our full-vocabulary form, d_k is the token's divergence (at
    least 0). A total of 0 leaves the ratio 0 / 0 at 0: weight 1 + gamma. Infinite d_k outweigh all finite
    ones and share the total equally, the limit of equally large numbers; NaN counts as 0. gamma >= -1 keeps
    the weights >= 0; a negative gamma favours late tokens.
    """

    gamma: float = 0.5
    of: str = "logprob"
    scope: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        expect(check_number("gamma", self.gamma) >= -1, "gamma", "a number >= -1", self.gamma)
        check_choice("of", self.of, ("logprob", "divergence"))

    @property
    def needs_labels(self) -> bool:
        return self.of == "logprob"

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        sums = running_sum(F.pad(self._discrepancy(stats, mask), (1, 0)))
        before, total = sums[..., :-1], sums[..., -1:]
        ratio = before / torch.where(total > 0, total, 1.0)
        return 1 + self.gamma * (1 - ratio)

    def _discrepancy(self, stats: Any, mask: Tensor) -> Tensor:
        if self.of == "divergence":
            d = statistic(stats, "divergence", mask, self).clamp(min=0)
        else:
            d = (
                statistic(stats, "student_logprob", mask, self)
                - statistic(stats, "teacher_logprob", mask, self)
            ).abs()
        infinite = d == math.inf
        return torch.where(infinite.any(-1, keepdim=True), infinite.double(), torch.where(d.isnan(), 0.0, d))


@dataclass(frozen=True, eq=False)
class SegmentMean(Wrapper):
    """The mean of `inner` over the valid tokens of each segment: MOPD's step-level form (arXiv:2605.12652).

    `boundaries` is bool, of the leading shape of the hidden states, and True at the first token of each
    segment, masked or not. A segment reaches to the next True or the end of the sequence; the first one
    always starts with the sequence.
    """

    boundaries: Tensor = field(repr=False)
    scope: ClassVar[str] = "sequence"
    per_token: ClassVar[tuple[str, ...]] = ("boundaries",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensor("boundaries", self.boundaries)
        expect(
            self.boundaries.dtype == torch.bool,
            "boundaries",
            "dtype bool, True where a segment starts",
            self.boundaries.dtype,
            TypeError,
        )

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        segments = of_tokens("boundaries", self.boundaries, mask).cumsum(-1)
        inner = self.inner_values(stats, mask)
        # the last token of each token's segment
        ends = torch.searchsorted(segments, segments, right=True) - 1
        total, count = (running_sum(x, segments).gather(-1, ends) for x in (inner, mask.double()))
        return total / count.clamp(min=1)


class MeanOne(Wrapper):
    """`inner` divided by its mean over the valid tokens of the sequence, so that weights keep the step size.

    A mean of 0 gives weights of 0. With an inner of scope "row" the scope is "sequence": the mean needs the
    statistics of all tokens of the sequence. With one of scope "index" it stays "index".
    """

    @property
    def scope(self) -> str:
        return "index" if self.inner.scope == "index" else "sequence"

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        inner = self.inner_values(stats, mask)
        mean = inner.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(mean == 0, 0.0, inner / torch.where(mean == 0, 1.0, mean))


class _Layout(NamedTuple):
    """Indices from the N tokens of a packed row to (sequences, longest), and back."""

    source: Tensor  # (S, L) int64 index into the packed row; 0 where there is no token
    inside: Tensor  # (S, L) bool, True where there is a token
    target: Tensor  # (N,) int64 index into the flat (S, L)

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | None) -> _Layout:
        sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
        columns = torch.arange(max(lengths, default=0), device=device)
        inside = columns < sizes[:, None]
        starts = (sizes.cumsum(0) - sizes)[:, None]
        return cls(torch.where(inside, starts + columns, 0), inside, inside.flatten().nonzero().flatten())

    def pad(self, packed: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=packed.dtype, device=packed.device)
        return torch.where(self.inside, packed.reshape(-1)[self.source], zero)


class _PaddedStats:
    """The token statistics of a packed row, each padded on access."""

    def __init__(self, stats: Any, layout: _Layout) -> None:
        self._stats, self._layout = stats, layout

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stats, name)
        return self._layout.pad(value) if isinstance(value, Tensor) else value


def _moved(weighting: TokenWeighting, move: Callable[[str, Tensor], Tensor]) -> TokenWeighting:
    """Apply `move` to the per-token tensors of a scheme and its parts. A user's own object stays as it is."""
    if not isinstance(weighting, Scheme):
        return weighting
    changes: dict[str, Any] = {name: move(name, getattr(weighting, name)) for name in weighting.per_token}
    changes |= {name: _moved(getattr(weighting, name), move) for name in weighting.parts}
    return replace(cast(Any, weighting), **changes) if changes else weighting


@dataclass(frozen=True, eq=False)
class PackedSequences(Wrapper):
    """`inner` over the sequences of a packed row: mask and statistics are (1, N) or (N,), N = sum(lengths).

    `inner` gets them padded to (len(lengths), longest). The per-token tensors of its schemes (`old_logprobs`,
    `boundaries`) have the packed shape too and are padded with them. Other wrappers belong inside: outside,
    the row is one sequence. Lengths may be 0. Raises ValueError at the call if the lengths do not add up to
    N.
    """

    # Ints, or a 1-D tensor of them, which is read once, at construction; the index tensors stay on its
    # device.
    lengths: tuple[int, ...]
    _layout: _Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        device = self.lengths.device if isinstance(self.lengths, Tensor) else None
        object.__setattr__(self, "lengths", _parse_lengths(self.lengths))
        object.__setattr__(self, "_layout", _Layout.of(self.lengths, device))

    @property
    def scope(self) -> str:
        return self.inner.scope

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        expect(
            mask.dim() == 1 or (mask.dim() == 2 and mask.shape[0] == 1),
            "mask",
            "a packed row, (1, N) or (N,)",
            tuple(mask.shape),
        )
        expect(
            sum(self.lengths) == mask.numel(),
            "lengths",
            f"lengths that add up to the {mask.numel()} tokens of the packed row",
            sum(self.lengths),
        )
        # A blocking copy would sync.
        layout = _Layout(*(index.to(mask.device, non_blocking=True) for index in self._layout))
        inner = _moved(self.inner, lambda name, tensor: layout.pad(of_tokens(name, tensor, mask)))
        padded = inner(None if stats is None else _PaddedStats(stats, layout), layout.pad(mask))
        flat = check_weights(padded, layout.inside.shape).double().flatten()
        return flat[layout.target].reshape(mask.shape)


def _parse_lengths(lengths: Any) -> tuple[int, ...]:
    if isinstance(lengths, Tensor):
        expect(
            lengths.dim() == 1,
            "lengths",
            "a 1-D tensor or a sequence of ints",
            f"shape {tuple(lengths.shape)}",
        )
        lengths = lengths.tolist()
    expect(
        isinstance(lengths, (list, tuple)),
        "lengths",
        "a 1-D tensor or a sequence of ints",
        type(lengths).__name__,
        TypeError,
    )
    expect(
        all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in lengths),
        "lengths",
        "ints >= 0",
        lengths,
    )
    return tuple(lengths)


class _WholeStats:
    """The statistics of whole sequences, each gathered from all ranks on access."""

    def __init__(self, stats: Any, gather: Callable[[Tensor], Tensor]) -> None:
        self._stats, self._gather = stats, gather

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stats, name)
        return None if value is None else self._gather(value)


@dataclass(frozen=True, eq=False)
class AcrossRanks(Wrapper):
    """`inner` on sequences split over the ranks of `group` (context parallelism): rank r has the r-th part.

    Every rank holds (B, T) tokens, padded where a sequence ends earlier, and gets the weights that one
    process computes for (B, ranks * T). The mask and the statistics that `inner` reads, a number or two per
    token, are gathered; with scope "row" nothing is. The op computes all statistics first: six GEMM passes
    instead of four.
    """

    group: Any

    @property
    def scope(self) -> str:
        return self.inner.scope

    @property
    def exchanges(self) -> bool:
        return self.inner.scope != "row"

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        if not self.exchanges:
            return self.inner_values(stats, mask)
        whole = self._gathered(mask)
        weights = self.inner_values(None if stats is None else _WholeStats(stats, self._gathered), whole)
        return weights[:, self.group.rank() * mask.shape[1] :][:, : mask.shape[1]]

    def _gathered(self, values: Tensor) -> Tensor:
        """Gather (B, T) of every rank to (B, ranks * T)."""
        sent = values.to(torch.uint8) if values.dtype == torch.bool else values.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.group.size())]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, dim=1).to(values.dtype)
