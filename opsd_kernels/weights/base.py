"""The contract of token weightings, its checks, and the base class of the schemes in schemes.py.

A weighting is any object with `scope` and `__call__(stats, mask)` that returns (B, T) floating-point weights.

* `mask` (B, T) bool is True at valid tokens. Padding may be left, right or in between. Each row is a
  sequence, and a position counts its valid tokens only: t = 1..T. A (T,) mask is one sequence.
* `stats` holds (B, T) tensors under the names of `TokenStats`, 0 at invalid tokens. Without labels
  `student_logprob` and `teacher_logprob` are None.
* `scope` bounds what a token's weight may depend on. "index": the mask alone (`stats` is None, except inside
  a product or another wrapper). "row": also the token's own statistics. "sequence": also those of its whole
  sequence. Rows, or sequences, that are not computed yet hold zeros or unfinished numbers: a weighting must
  not fail on them, nor let them change the weights of others.

Optional attributes: `needs_labels`, True if it reads the log-probs; `needs_metrics`, False if of the other
statistics it reads the divergence alone; `lengths`, those of the sequences in one packed row
(`PackedSequences`); `exchanges`, True if calling it issues a collective (`AcrossRanks`).

The schemes here promise more: a masked token has weight 0 and influences nothing, even if its statistics are
NaN; no gradient flows; no host sync; the same bits in every run. They compute and return float64, since there
are few numbers and the op rounds them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import SCOPES, check_choice, check_number, check_tensor, expect


def check_weighting(weighting: Any, argument: str = "token_weights") -> Any:
    """Return `weighting`, a callable with a known scope. Raises TypeError or ValueError otherwise."""
    expect(
        callable(weighting) and hasattr(weighting, "scope"),
        argument,
        "a callable with a scope",
        type(weighting).__name__,
        TypeError,
    )
    check_choice(f"{argument}.scope", weighting.scope, SCOPES)
    return weighting


def check_weights(weights: Any, shape: Sequence[int]) -> Tensor:
    """Return the weights of a weighting.

    Raises TypeError if they are no floating-point tensor, ValueError if their shape is not the mask's.
    """
    expect(
        isinstance(weights, Tensor),
        "token_weights",
        "a weighting that returns a tensor",
        type(weights).__name__,
        TypeError,
    )
    expect(
        weights.is_floating_point(),
        "token_weights",
        "a weighting that returns floating-point numbers",
        weights.dtype,
        TypeError,
    )
    expect(
        weights.shape == torch.Size(shape),
        "token_weights",
        f"a weighting that returns shape {tuple(shape)}",
        tuple(weights.shape),
    )
    return weights


def needs_labels(weighting: Any) -> bool:
    """True if a weighting reads the log-probs of the sampled tokens."""
    return bool(getattr(weighting, "needs_labels", False))


def statistic(stats: Any, name: str, mask: Tensor, reader: object) -> Tensor:
    """Return one statistic in float64, 0 at invalid tokens."""
    scheme = type(reader).__name__
    expect(stats is not None, "stats", f"token statistics, which {scheme} reads", None)
    value = getattr(stats, name)
    missing = (
        ("labels", "the sampled tokens, whose log-probs")
        if name.endswith("logprob")
        else ("token_weights", f"a whole teacher, whose {name}")
    )
    expect(value is not None, missing[0], f"{missing[1]} {scheme} reads", None)
    return torch.where(mask, value.double(), 0.0)


def of_tokens(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """Reshape a per-token tensor of the hidden states' leading shape to the mask's shape.

    The op folds all but the last dimension of the leading shape into rows.
    """
    fits = value.numel() == mask.numel() and value.shape[-1:] == mask.shape[-1:]
    expect(fits, name, f"shape {tuple(mask.shape)}, one entry per token", tuple(value.shape))
    expect(
        value.device == mask.device, name, f"a tensor on {mask.device}, as the hidden states", value.device
    )
    return value.reshape(mask.shape)


def running_sum(values: Tensor, segments: Tensor | None = None) -> Tensor:
    """Sum inclusively along the last dimension, from zero again where `segments` (ascending numbers) changes.

    Doubling takes log2(T) additions. torch.cumsum of floats on CUDA may differ from run to run, and a
    difference of two running sums loses small segments.
    """
    step = 1
    while step < values.shape[-1]:
        earlier = F.pad(values[..., :-step], (step, 0))
        if segments is not None:
            earlier = torch.where(F.pad(segments[..., :-step], (step, 0), value=-1) == segments, earlier, 0.0)
        values, step = values + earlier, 2 * step
    return values


class Scheme:
    """Base class of the schemes: masks the weights, stops gradients and multiplies with `*`.

    A subclass defines `scope` and `values`.
    """

    # True if it reads entropies, largest probabilities or the agreement
    reads_metrics: ClassVar[bool] = False
    # attributes that are tensors of one entry per token
    per_token: ClassVar[tuple[str, ...]] = ()
    # attributes that are weightings themselves
    parts: ClassVar[tuple[str, ...]] = ()

    @property
    def scope(self) -> str:
        raise AttributeError(f"{type(self).__name__} defines no scope")

    @property
    def needs_labels(self) -> bool:
        """True if it reads the log-probs of the sampled tokens."""
        return False

    @property
    def needs_metrics(self) -> bool:
        """True if it, or a part of it, reads statistics beside log-probs and divergence."""
        return self.reads_metrics or any(
            getattr(getattr(self, part), "needs_metrics", True) for part in self.parts
        )

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        """Return (B, T) float64 weights. Those of masked tokens do not matter."""
        raise NotImplementedError(f"{type(self).__name__} defines no values")

    def __call__(self, stats: Any, mask: Tensor) -> Tensor:
        expect(mask.dtype == torch.bool, "mask", "dtype bool", mask.dtype, TypeError)
        with torch.no_grad():
            return torch.where(mask, self.values(stats, mask), 0.0)

    def __mul__(self, other: Any) -> Product:
        right = _factor(other)
        return NotImplemented if right is None else Product(self, right)

    def __rmul__(self, other: Any) -> Product:
        left = _factor(other)
        return NotImplemented if left is None else Product(left, self)


if TYPE_CHECKING:

    class TokenWeighting(Protocol):
        """The objects that `token_weights=` takes beside tensors, as a type checker sees them."""

        @property
        def scope(self) -> str: ...

        def __call__(self, stats: Any, mask: Tensor) -> Tensor:
            # A body, for a subclass inherits one: at run time the name is the base class.
            return mask

else:
    TokenWeighting = Scheme


def _factor(other: Any) -> TokenWeighting | None:
    """Convert a factor to a weighting: a number, a tensor or a weighting. None for anything else."""
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return Constant(other)
    if isinstance(other, Tensor):
        return Given(other)
    return other if callable(other) and hasattr(other, "scope") else None


@dataclass(frozen=True, eq=False)
class Wrapper(Scheme):
    """Base class of the weightings that are made from another one, `inner`."""

    inner: TokenWeighting
    parts: ClassVar[tuple[str, ...]] = ("inner",)

    def __post_init__(self) -> None:
        check_weighting(self.inner, "inner")

    @property
    def needs_labels(self) -> bool:
        return needs_labels(self.inner)

    def inner_values(self, stats: Any, mask: Tensor) -> Tensor:
        """Return inner's weights in float64, 0 at masked tokens."""
        return torch.where(mask, check_weights(self.inner(stats, mask), mask.shape).double(), 0.0)


@dataclass(frozen=True, eq=False)
class Product(Scheme):
    """`left * right`. Its scope is the wider of the two. Either may be any object that keeps the contract."""

    left: TokenWeighting
    right: TokenWeighting
    parts: ClassVar[tuple[str, ...]] = ("left", "right")

    def __post_init__(self) -> None:
        check_weighting(self.left)
        check_weighting(self.right)
        lengths = [
            getattr(factor, "lengths", None)
            for factor in (self.left, self.right)
            if factor.scope == self.scope
        ]
        # otherwise a factor needs the whole row
        if lengths[0] is not None and lengths[0] == lengths[-1]:
            object.__setattr__(self, "lengths", lengths[0])

    @property
    def scope(self) -> str:
        return max(self.left.scope, self.right.scope, key=SCOPES.index)

    @property
    def needs_labels(self) -> bool:
        return needs_labels(self.left) or needs_labels(self.right)

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        left, right = (
            check_weights(factor(stats, mask), mask.shape).double() for factor in (self.left, self.right)
        )
        return left * right


class Schedule(Scheme):
    """Base class of the weights by position alone. A subclass defines `at`."""

    scope: ClassVar[str] = "index"

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        """Return the weights at positions t = 1..T of sequences of T >= 1 tokens; all in float64."""
        raise NotImplementedError(f"{type(self).__name__} defines no weights at a position")

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        return self.at(mask.cumsum(-1).double(), mask.sum(-1, keepdim=True).clamp(min=1).double())


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight for every valid token: the number in `0.5 * weighting`."""

    value: float

    def __post_init__(self) -> None:
        check_number("value", self.value)

    def at(self, t: Tensor, T: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


@dataclass(frozen=True, eq=False)
class Given(Scheme):
    """Weights from a tensor of one entry per token: the tensor in `weighting * tensor`."""

    weights: Tensor = field(repr=False)
    scope: ClassVar[str] = "index"
    per_token: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        check_tensor("weights", self.weights)
        expect(
            self.weights.is_floating_point(),
            "weights",
            "a floating-point tensor",
            self.weights.dtype,
            TypeError,
        )

    def values(self, stats: Any, mask: Tensor) -> Tensor:
        return of_tokens("weights", self.weights, mask).double()
