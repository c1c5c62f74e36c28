"""The options of a call as frozen values, with their validation and error texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Kind(IntEnum):
    """The divergences. csrc/divergence.h and triton_math.py branch on the same numbers."""

    REVERSE_KL = 0
    FORWARD_KL = 1
    JSD = 2
    SKEW_REVERSE_KL = 3
    SKEW_FORWARD_KL = 4
    TVD = 5


CLIPS = ("entry_clip", "token_clip")  # options that bound a term of the sum, and the sum
KIND_NAMES = {kind.name.lower(): kind for kind in Kind}
# What a token's weight may depend on, the narrowest first.
SCOPES = ("index", "row", "sequence")
SUPPORT_SIDES = ("student", "teacher")
TAILS = ("bucket", "renormalize", "none")
REDUCTIONS = ("mean", "sum", "none", "sequence_mean")
# Of logits held in 16 bits. At V = 8192 and |z| to 16 without labels, the gradient is off by 1.0 % at 4 and
# by 2.4 % at 10.
LARGEST_FACTOR = 4.0
BACKWARDS = ("auto", "in_forward", "recompute")


def expect(
    condition: bool, argument: str, expected: str, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `condition` holds, in the one form of an argument error: name, expected, got."""
    if not condition:
        raise error(f"{argument}: expected {expected}, got {got}")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        expect(False, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_number(argument: str, value: object, *, positive: bool = False) -> float:
    """Return a finite number as a float. Raises TypeError for other types, ValueError for other numbers."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a number, got {value!r} of type {type(value).__name__}")
    # A traced number (SymFloat) has neither isfinite nor, in a text, a value.
    if not abs(value) < math.inf or (positive and value <= 0):
        raise ValueError(f"{argument}: expected a {'positive ' * positive}finite number, got {value!r}")
    return float(value)


def _mixture_weight(name: str, beta: float, hints: dict[float, str]) -> float:
    if not 0 < beta < 1:
        expected = f"a number strictly between 0 and 1 for divergence={name!r}{hints.get(beta, '')}"
        raise ValueError(f"beta: expected {expected}, got {beta!r}")
    return beta


@dataclass(frozen=True)
class Divergence:
    """A divergence between teacher p and student q. `beta` is the mixture's weight on the teacher."""

    kind: Kind
    beta: float = 0.5

    @classmethod
    def parse(cls, name: str, beta: float = 0.5) -> Divergence:
        check_choice("divergence", name, tuple(KIND_NAMES))
        kind = KIND_NAMES[name]
        beta = check_number("beta", beta)
        if kind == Kind.JSD:
            hints = {0.0: "; for beta=0 use divergence='forward_kl'"}
            hints[1.0] = "; for beta=1 use divergence='reverse_kl'"
            return cls(kind, _mixture_weight(name, beta, hints))
        return cls(kind, _mixture_weight(name, beta, {}) if cls(kind).mixes else beta)

    @property
    def name(self) -> str:
        return self.kind.name.lower()

    @property
    def mixes(self) -> bool:
        """True if its formula has the mixture m = beta * p + (1 - beta) * q."""
        return self.kind in (Kind.JSD, Kind.SKEW_REVERSE_KL, Kind.SKEW_FORWARD_KL)

    @property
    def kinked(self) -> bool:
        """True if the gradient jumps at p = q.

        Logits rounded to 16 bits would flip its sign there: 2-7 % error instead of 1 %.
        """
        return self.kind == Kind.TVD

    @property
    def one_sweep(self) -> bool:
        """True if the statistics sweep alone yields the value: for the two plain KLs."""
        return self.kind in (Kind.REVERSE_KL, Kind.FORWARD_KL)


def interpolation(beta: float) -> dict[str, Any]:
    """Return the options for the generalised JSD of GKD (arXiv:2306.13649) as libraries define it.

    At 0 and 1 these are the KLs, which are not its limits.
    """
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {"divergence": ends[beta]} if beta in ends else {"divergence": "jsd", "beta": beta}


@dataclass(frozen=True)
class LogitTransform:
    """Raw logit z -> softcap(scale * (z + bias)) / temperature, with softcap(y) = c * tanh(y / c)."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def parse(
        cls, side: str, scale: float, softcap: float | None, temperature_name: str, temperature: float
    ) -> LogitTransform:
        prefix = f"{side}_" if side else ""
        scale = check_number(f"{prefix}logit_scale", scale)
        if softcap is not None:
            softcap = check_number(f"{prefix}softcap", softcap, positive=True)
        return cls(scale, softcap, check_number(temperature_name, temperature, positive=True))

    @property
    def factor(self) -> float:
        """The factor of a raw logit without a softcap."""
        return self.scale / self.temperature


@dataclass(frozen=True)
class Support:
    """The K entries per token that a divergence is restricted to.

    They are the K largest logits of `side` or, with None, the entries that the call lists. `tail` says how
    the remaining mass counts: as one more entry, by renormalisation, or not at all.
    """

    k: int
    side: str | None
    tail: str

    @classmethod
    def parse(cls, k: int | None, side: str, tail: str, tail_name: str = "topk_tail") -> Support | None:
        check_choice("topk_support", side, SUPPORT_SIDES)
        check_choice(tail_name, tail, TAILS)
        if k is None:
            return None
        expect(
            isinstance(k, int) and not isinstance(k, bool),
            "topk",
            "an int or None",
            type(k).__name__,
            TypeError,
        )
        expect(k >= 1, "topk", "at least 1", k)
        return cls(k, side, tail)


@dataclass(frozen=True)
class RowSpec:
    """The arguments of a row sweep beside its tensors.

    With `difference`, the teacher buffer holds raw teacher logits minus raw student logits (mathematics.md:
    the difference GEMM). `teacher_mix` a makes the teacher's transformed logits (1 - a) * t + a * s, s held
    constant. `entry_clip` clips each term of the sum, `token_clip` the sum; inf clips nothing.
    """

    divergence: Divergence
    # torch.compile of 2.10 and 2.11 cannot trace an object as a default.
    student: LogitTransform = field(default_factory=LogitTransform)
    teacher: LogitTransform = field(default_factory=LogitTransform)
    difference: bool = False
    teacher_mix: float = 0.0
    entry_clip: float = math.inf
    token_clip: float = math.inf

    def linear_difference(self, same_bias: bool) -> bool:
        """True if the difference of the *transformed* logits is `factor` times the difference buffer.

        The buffer then keeps its digits: it is never added to the logits.
        """
        return self.difference and same_bias and self.student == self.teacher and self.student.softcap is None

    def scalars(self, linear: bool) -> tuple[float, ...]:
        """Return all values flat, in the order of csrc/row_binding.h; a softcap of 0 is none.

        `linear` is that of `linear_difference`.
        """
        s, t = self.student, self.teacher
        return (
            int(self.divergence.kind), self.divergence.beta,
            s.scale, s.softcap or 0.0, s.temperature, t.scale, t.softcap or 0.0, t.temperature,
            self.difference, linear, self.teacher_mix, self.entry_clip, self.token_clip,
        )  # fmt: skip

    @classmethod
    def from_scalars(cls, values: Sequence[float]) -> RowSpec:
        """Rebuild a spec from `scalars`."""
        kind, beta, *transforms, difference, _, mix, entry_clip, token_clip = values
        student, teacher = (
            LogitTransform(scale, softcap or None, temperature)
            for scale, softcap, temperature in (transforms[:3], transforms[3:])
        )
        divergence = Divergence(Kind(int(kind)), beta)
        return cls(divergence, student, teacher, bool(difference), mix, entry_clip, token_clip)

    @property
    def clips(self) -> bool:
        """True if a term or the sum has an upper bound."""
        return min(self.entry_clip, self.token_clip) < math.inf

    @property
    def one_sweep(self) -> bool:
        """True if the statistics sweep alone yields the value: for a plain KL without an entry clip."""
        return self.divergence.one_sweep and self.entry_clip == math.inf

    @property
    def digits_lost(self) -> bool:
        """True if 16-bit logits would cost too many digits.

        The gradient jumps at p = q or at an entry clip; a softcap needs the logits themselves, not relative
        to a constant of their row; a factor above LARGEST_FACTOR multiplies what is left of their rounding.
        """
        return (
            self.divergence.kinked
            or self.entry_clip < math.inf
            or any(
                side.softcap is not None or not 0 < side.scale / side.temperature <= LARGEST_FACTOR
                for side in (self.student, self.teacher)
            )
        )
