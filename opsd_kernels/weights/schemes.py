"""Token weightings: how much each token of a rollout counts.

    weights = FirstFraction(0.3) * EntropyGate("teacher", below=2.0)
    loss = linear_divergence(..., token_weights=weights)

The contract of a weighting, and what the schemes here promise beyond it: base.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..spec import check_choice, check_number, expect
from .base import Schedule, TokenWeighting, Wrapper, check_weights, of_tokens, running_sum, statistic

# ---------------------------------------------------------------- scope "index"


# p * T of a decimal p misses a tie by its rounding error, which is far below this for any sequence that fits a machine.
_TIE = 2.0**-20


@dataclass(frozen=True)
class _Share(Schedule):
    p: float

    def __post_init__(self) -> None:
        expect(0 < check_number("p", self.p) <= 1, "p", "a share in (0, 1]", self.p)


class FirstFraction(_Share):
    """1 inside the first share `p` of a sequence's valid tokens, else 0; 0 < p <= 1.

    Token t is inside if (t - 1/2) / T < p: p * T tokens, rounded, and exact where p * T is whole. So a sequence with p * T <= 1/2 has none.
    Ties (p * T = k + 1/2) are rounded down; `LastFraction(1 - p)` rounds them up and is the exact complement.
    """

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return (t - 0.5 < self.p * T - _TIE).double()


class LastFraction(_Share):
    """1 inside the last share `p` of a sequence's valid tokens, else 0; 0 < p <= 1. Token t is inside if (t - 1/2) / T >= 1 - p; see `FirstFraction`."""

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return (t - 0.5 >= (1 - self.p) * T - _TIE).double()


@dataclass(frozen=True)
class LinearDecay(Schedule):
    """From 1 at the first valid token to `end` >= 0 at the last, linear in (t - 1) / (T - 1). A single token weighs 1. `end` > 1 is a growth."""

    end: float

    def __post_init__(self) -> None:
        expect(check_number("end", self.end) >= 0, "end", "a number >= 0", self.end)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        x = (t - 1) / (T - 1).clamp(min=1)
        return (1 - x) + self.end * x  # exact at both ends


@dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """exp(-rate * t / T), t = 1..T: close to 1 at the first valid token, exp(-rate) at the last. rate >= 0."""

    rate: float

    def __post_init__(self) -> None:
        expect(check_number("rate", self.rate) >= 0, "rate", "a number >= 0", self.rate)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return torch.exp(-self.rate * (t / T))


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """w_min + (1 - w_min) * sigmoid((u - center) / width) with u = (t - 1/2) / T: position weights of PW-OPD (arXiv:2605.21606).

    0 <= w_min <= 1. A positive `width` favours late tokens, a negative one early tokens.
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
class ImportanceRatio(TokenWeighting):
    """min(exp(clamp(log s(y) - old, -20, 20)), clip): how much likelier the sampled token is now than when it was sampled (SDPO, arXiv:2601.20802).

    `old_logprobs`: log-probs (nats) under the sampling policy, of the leading shape of the hidden states; masked tokens may hold anything.
    Equal log-probs give 1, both -inf included. A NaN at a valid token stays NaN, so that it shows.
    """

    old_logprobs: Tensor = field(repr=False)
    clip: float = 2.0
    scope: ClassVar[str] = "row"
    needs_labels: ClassVar[bool] = True
    per_token: ClassVar[tuple[str, ...]] = ("old_logprobs",)

    def __post_init__(self) -> None:
        old = self.old_logprobs
        expect(isinstance(old, Tensor), "old_logprobs", "a tensor", type(old).__name__, TypeError)
        expect(old.is_floating_point(), "old_logprobs", "a floating-point tensor", old.dtype, TypeError)
        check_number("clip", self.clip, positive=True)

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        now = statistic(stats, "student_logprob", mask, self)
        old = torch.where(mask, of_tokens("old_logprobs", self.old_logprobs, mask).double(), 0.0)
        gap = torch.where(now == old, 0.0, now - old)
        return gap.clamp(-20, 20).exp().clamp(max=self.clip)


@dataclass(frozen=True)
class EntropyGate(TokenWeighting):
    """1 where the entropy (nats) of the `of` side, "student" or "teacher", is < `below`, or > `above`; else 0. Exactly one bound is given."""

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
        check_number(
            "above" if self.below is None else "below", self.above if self.below is None else self.below
        )

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        entropy = statistic(stats, f"{self.of}_entropy", mask, self)
        return (entropy > self.above if self.below is None else entropy < self.below).double()


@dataclass(frozen=True)
class TrustGate(TokenWeighting):
    """1 where min(t(y) / s(y), 1) >= threshold for the sampled token y, else 0: the trust region of TrOPD (arXiv:2606.01249). 0 < threshold <= 1.

    Compared as log t(y) - log s(y) >= log(threshold), which no ratio overflows. Where both probabilities are 0 the gate is closed.
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
class PrefixDiscrepancy(TokenWeighting):
    """w_t = 1 + gamma * (1 - sum_{k<t} d_k / sum_k d_k): IW-OPD (arXiv:2606.22600, Algorithm 1), tokens after little accumulated discrepancy count more.

    d_k = |log s(y_k) - log t(y_k)| of the sampled token with of="logprob", the token's divergence (at least 0) with of="divergence", our full-vocabulary form.
    A total of 0 leaves the ratio 0 / 0 at 0: weight 1 + gamma. Infinite d_k outweigh all finite ones and share the total equally, the limit of equally large
    numbers; NaN counts as 0. gamma >= -1 keeps the weights >= 0; a negative one favours late tokens.
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
    """Each token gets the mean of `inner` over the valid tokens of its segment: the step-level form of MOPD (arXiv:2605.12652).

    `boundaries`: bool of the leading shape of the hidden states, True at the first token of each segment, masked or not; a segment reaches to the next
    True or the end of the sequence, and the first starts with the sequence in any case.
    """

    boundaries: Tensor = field(repr=False)
    scope: ClassVar[str] = "sequence"
    per_token: ClassVar[tuple[str, ...]] = ("boundaries",)

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(
            isinstance(self.boundaries, Tensor),
            "boundaries",
            "a tensor",
            type(self.boundaries).__name__,
            TypeError,
        )
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
        ends = (
            torch.searchsorted(segments, segments, right=True) - 1
        )  # each token's last neighbour in its segment
        total, count = (running_sum(x, segments).gather(-1, ends) for x in (inner, mask.double()))
        return total / count.clamp(min=1)


class MeanOne(Wrapper):
    """`inner` divided by its mean over the valid tokens of the sequence, so that a weight does not change the step size. A mean of 0 gives weights of 0.

    An inner of scope "row" makes this "sequence": its mean needs the statistics of all tokens of the sequence. Of scope "index" it stays "index".
    """

    @property
    def scope(self) -> str:
        return "index" if self.inner.scope == "index" else "sequence"

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        inner = self.inner_values(stats, mask)
        mean = inner.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(mean == 0, 0.0, inner / torch.where(mean == 0, 1.0, mean))


class _Layout(NamedTuple):
    """Where the N tokens of a packed row stand in (sequences, longest), and back."""

    source: Tensor  # (S, L) int64 index into the packed row; 0 where there is no token
    inside: Tensor  # (S, L) bool, whether there is one
    target: Tensor  # (N,) int64 index into the flat (S, L)

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | None) -> _Layout:
        sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
        columns = torch.arange(max(lengths, default=0), device=device)
        inside = columns < sizes[:, None]
        starts = (sizes.cumsum(0) - sizes)[:, None]
        return cls(torch.where(inside, starts + columns, 0), inside, inside.flatten().nonzero().flatten())

    def pad(self, packed: Tensor) -> Tensor:
        return torch.where(
            self.inside,
            packed.reshape(-1)[self.source],
            torch.zeros((), dtype=packed.dtype, device=packed.device),
        )


class _PaddedStats:
    """Token statistics of a packed row, each padded when it is read."""

    def __init__(self, stats: Any, layout: _Layout) -> None:
        self._stats, self._layout = stats, layout

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stats, name)
        return self._layout.pad(value) if isinstance(value, Tensor) else value


def _moved(weighting: Any, move: Callable[[str, Tensor], Tensor]) -> Any:
    """A weighting with its tensors of one entry per token moved; a user's object stays as it is."""
    if not isinstance(weighting, TokenWeighting):
        return weighting
    changes = {name: move(name, getattr(weighting, name)) for name in weighting.per_token}
    changes |= {name: _moved(getattr(weighting, name), move) for name in weighting.parts}
    return replace(weighting, **changes) if changes else weighting


@dataclass(frozen=True, eq=False)
class PackedSequences(Wrapper):
    """`inner` over sequences that stand one behind the other in a packed row: mask and statistics are (1, N) or (N,), N = sum(lengths).

    `inner` sees them padded to (len(lengths), longest). Tensors of one entry per token that its schemes hold (`old_logprobs`, `boundaries`) have the
    packed shape too and are padded with them. Other wrappers belong inside: outside, the row is one sequence. Lengths may be 0.
    Raises ValueError at the call where the lengths do not add up to N.
    """

    lengths: tuple[
        int, ...
    ]  # given as ints or as a 1-D tensor of them: it is read once, here, and the index tensors stay on its device
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
        layout = _Layout(
            *(index.to(mask.device, non_blocking=True) for index in self._layout)
        )  # a blocking copy waits for the device
        inner = _moved(self.inner, lambda name, tensor: layout.pad(of_tokens(name, tensor, mask)))
        padded = inner(None if stats is None else _PaddedStats(stats, layout), layout.pad(mask))
        return (
            check_weights(padded, layout.inside.shape).double().flatten()[layout.target].reshape(mask.shape)
        )


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
    """Statistics of whole sequences, gathered when they are read."""

    def __init__(self, stats: Any, gather: Callable[[Tensor], Tensor]) -> None:
        self._stats, self._gather = stats, gather

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._stats, name)
        return None if value is None else self._gather(value)


@dataclass(frozen=True, eq=False)
class AcrossRanks(Wrapper):
    """`inner` on sequences whose tokens are spread over the ranks of `group` (context parallelism): rank r holds the r-th part of every sequence.

    All ranks hold (B, T) tokens, padded where a sequence ends before, and weigh them as one process weighs (B, ranks * T). What `inner` reads is gathered,
    the mask and a number or two per token; a weight of scope "row" reads nothing of others. The op computes all statistics first: six GEMM passes, not four.
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
        """(B, ranks * T) of (B, T)."""
        sent = values.to(torch.uint8) if values.dtype == torch.bool else values.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.group.size())]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, dim=1).to(values.dtype)
