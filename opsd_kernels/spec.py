"""The options of a call as frozen values, with their validation and error texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Buffer, Parameter, is_lazy

Adapter = tuple[Tensor, Tensor, float]  # of a head (V, H): A (r, H), B (V, r), scaling


class Kind(IntEnum):
    """The divergences. csrc/row_args.h and triton_math.py have the same numbers."""

    REVERSE_KL = 0
    FORWARD_KL = 1
    JSD = 2
    SKEW_REVERSE_KL = 3
    SKEW_FORWARD_KL = 4
    TVD = 5
    MIXED_KL = 6


CLIPS = ("entry_clip", "token_clip")  # options that bound a term of the sum, and the sum
KIND_NAMES = {kind.name.lower(): kind for kind in Kind}
# What a token's weight may depend on, the narrowest first.
SCOPES = ("index", "row", "sequence")
SUPPORT_SIDES = ("student", "teacher")
TAILS = ("bucket", "renormalize", "none")
REDUCTIONS = ("mean", "sum", "none", "sequence_mean")
BACKWARDS = ("auto", "in_forward", "recompute")


def expect(
    condition: bool, argument: str, expected: str, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `condition` holds, in the one form of an argument error: name, expected, got."""
    if not condition:
        raise error(f"{argument}: expected {expected}, got {got}")


# Classes of plain tensors. torch.compile sees a buffer in one of its own, and reads little of the last two.
PLAIN = (Tensor, Parameter, Buffer)
# Subclasses with a dispatch of their own that stand for plain tensors: of tracing, and of collectives.
_STAND_INS = ("torch._subclasses.", "torch.distributed._functional_collectives")


def check_tensor(argument: str, value: object, expected: str = "a tensor") -> Tensor:
    """Return `value`, a dense tensor. Raises TypeError for anything else.

    A sparse, nested, masked, quantised or distributed tensor has no rows that a kernel could read.
    """
    kind: Any = type(value)
    came = None
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected {expected}, got {kind.__name__}")
    if kind not in PLAIN and is_lazy(value):
        came = kind.__name__
    elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(
        _STAND_INS
    ):
        # Nested tensors of the jagged layout are a subclass.
        came = f"a nested tensor ({kind.__name__})" if "nested" in kind.__module__ else kind.__name__
    elif value.is_nested:
        came = "a nested tensor"
    elif value.layout is not torch.strided:
        came = f"a tensor of layout {value.layout}"
    if came is not None:
        raise TypeError(f"{argument}: expected {expected}, dense and of a plain type, got {came}")
    return value


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        expect(False, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_number(argument: str, value: object, *, positive: bool = False) -> float:
    """Return a finite real number as a float.

    Raises TypeError for other types, numpy's numbers aside, and ValueError for other numbers.
    """
    if not isinstance(value, (int, float, Real)) or isinstance(value, bool):
        raise TypeError(f"{argument}: expected a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    # A traced number (SymFloat) has neither isfinite nor, in a text, a value.
    if not abs(number) < math.inf or (positive and number <= 0):
        raise ValueError(f"{argument}: expected a {'positive ' * positive}finite number, got {value!r}")
    return number


def _mixture_weight(name: str, beta: float, hints: dict[float, str]) -> float:
    if not 0 < beta < 1:
        expected = f"a number strictly between 0 and 1 for divergence={name!r}{hints.get(beta, '')}"
        raise ValueError(f"beta: expected {expected}, got {beta!r}")
    return beta


@dataclass(frozen=True)
class Divergence:
    """A divergence between teacher p and student q.

    `beta` is the mixture's weight on the teacher or, of the mixed KL, the weight of the forward KL.
    """

    kind: Kind
    beta: float = 0.5

    @classmethod
    def parse(cls, name: str, beta: float = 0.5) -> Divergence:
        check_choice("divergence", name, tuple(KIND_NAMES))
        kind = KIND_NAMES[name]
        beta = check_number("beta", beta)
        if kind == Kind.MIXED_KL:
            expect(0 <= beta <= 1, "beta", "a number in [0, 1] for divergence='mixed_kl'", beta)
            # At an end one KL has no part in the sum, even if it is infinite.
            return cls(Kind.REVERSE_KL if beta == 0 else Kind.FORWARD_KL if beta == 1 else kind, beta)
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
        """True if the statistics sweep alone yields the value: for the two plain KLs and their sum."""
        return self.kind in (Kind.REVERSE_KL, Kind.FORWARD_KL, Kind.MIXED_KL)

    @property
    def omitted(self) -> float:
        """The c in the term c * q that u of a sweep leaves out of the derivative: mathematics.md, clips."""
        return {Kind.REVERSE_KL: 1.0, Kind.MIXED_KL: 1 - 2 * self.beta}.get(self.kind, 0.0)


def interpolation(beta: float) -> dict[str, Any]:
    """Return the options for the generalised JSD of GKD (arXiv:2306.13649) as libraries define it.

    At 0 and 1 these are the KLs, which are not its limits.
    """
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {"divergence": ends[beta]} if beta in ends else {"divergence": "jsd", "beta": beta}


def of_tokens(name: str, kind: str, given: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that broadcasts to the tokens (...) of `hidden` (..., H), flat and detached: (N,).

    A 0-dim tensor may lie on another device. Raises ValueError, where the argument `name` may be a `kind`.
    """
    leading, device = hidden.shape[:-1], hidden.device
    pairs = zip(reversed(given.shape), reversed(leading), strict=False)
    fits = given.dim() <= len(leading) and all(size in (1, whole) for size, whole in pairs)
    if not fits or (given.dim() and given.device != device):
        expected = f"{kind} on {device} that broadcasts to {tuple(leading)}"
        expect(False, name, expected, f"shape {tuple(given.shape)} on {given.device}")
    # A copy from the host needs no sync.
    moved = given.detach().to(device, dtype, non_blocking=given.device.type == "cpu")
    return moved.expand(leading).reshape(-1).contiguous()  # of a 0-dim one all rows are one entry


@dataclass(frozen=True)
class LogitTransform:
    """Raw logit z -> softcap(scale * (z + bias)) / temperature, with softcap(y) = c * tanh(y / c).

    The temperature is a number, or a tensor (n, 1) that holds one for each row.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    temperature_name: str = field(default="temperature", compare=False)  # of the argument, for errors

    @classmethod
    def parse(
        cls, side: str, scale: float, softcap: float | None, temperature_name: str, temperature: object
    ) -> LogitTransform:
        """Check the arguments. A tensor of temperatures keeps its shape; `of_tokens` makes it (N, 1)."""
        prefix = f"{side}_" if side else ""
        scale = check_number(f"{prefix}logit_scale", scale)
        if softcap is not None:
            softcap = check_number(f"{prefix}softcap", softcap, positive=True)
        if isinstance(temperature, Tensor):
            real = temperature.dtype != torch.bool and not temperature.is_complex()
            expect(real, temperature_name, "a tensor of real numbers", temperature.dtype, TypeError)
            return cls(scale, softcap, check_tensor(temperature_name, temperature), temperature_name)
        number = check_number(temperature_name, temperature, positive=True)
        return cls(scale, softcap, number, temperature_name)

    def of_tokens(self, hidden: Tensor, valid: Tensor | None = None) -> LogitTransform:
        """Return the transform of the tokens (...) of `hidden` (..., H): a tensor of temperatures as (N, 1).

        It is detached, and 1 where `valid` (N,) is False. Raises ValueError if it does not broadcast to
        (...), or is on another device.
        """
        if not isinstance(self.temperature, Tensor):
            return self
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        name, kind = self.temperature_name, "a number, or a tensor"
        flat = of_tokens(name, kind, self.temperature, hidden, wide)[:, None]
        return replace(self, temperature=flat if valid is None else torch.where(valid[:, None], flat, 1.0))

    def at(self, rows: slice | Tensor) -> LogitTransform:
        """Return the transform of some of the rows."""
        given = self.temperature
        return replace(self, temperature=given[rows]) if isinstance(given, Tensor) else self

    def __eq__(self, other: object) -> bool:
        """Compare the values. Tensors of temperatures are equal if they are one object: no host sync."""
        if not isinstance(other, LogitTransform):
            return NotImplemented
        mine, theirs = self.temperature, other.temperature
        one = mine is theirs if isinstance(mine, Tensor) or isinstance(theirs, Tensor) else mine == theirs
        return one and (self.scale, self.softcap) == (other.scale, other.softcap)

    @property
    def factor(self) -> float | Tensor:
        """The factor of a raw logit without a softcap: a number, or (n, 1)."""
        return self.scale / self.temperature

    @property
    def of_rows(self) -> Tensor | None:
        """The temperatures of the rows, (n,), or None where a number serves all."""
        return self.temperature.reshape(-1) if isinstance(self.temperature, Tensor) else None


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
    """The arguments of a row sweep beside the logits, their biases and factors.

    With `difference`, the teacher buffer holds raw teacher logits minus raw student logits (mathematics.md:
    the difference GEMM). `teacher_mix` a makes the teacher's transformed logits (1 - a) * t + a * s, s held
    constant. `entry_clip` clips each term of the sum, `token_clip` the sum; inf clips nothing. `z_loss` c
    adds c * logsumexp(s)**2 to a row's loss; no sweep reads it.
    """

    divergence: Divergence
    # torch.compile of 2.10 and 2.11 cannot trace an object as a default.
    student: LogitTransform = field(default_factory=LogitTransform)
    teacher: LogitTransform = field(default_factory=LogitTransform)
    difference: bool = False
    teacher_mix: float = 0.0
    entry_clip: float = math.inf
    token_clip: float = math.inf
    z_loss: float = 0.0

    @property
    def of_rows(self) -> bool:
        """True if a side has a temperature for each row."""
        return isinstance(self.student.temperature, Tensor) or isinstance(self.teacher.temperature, Tensor)

    def of_tokens(self, hidden: Tensor, valid: Tensor | None) -> RowSpec:
        """Return the arguments for the tokens of `hidden` (..., H): see LogitTransform.of_tokens."""
        if not self.of_rows:
            return self
        student = self.student.of_tokens(hidden, valid)
        if self.teacher.temperature is self.student.temperature:
            teacher = replace(self.teacher, temperature=student.temperature)
        else:
            teacher = self.teacher.of_tokens(hidden, valid)
        return replace(self, student=student, teacher=teacher)

    def at(self, rows: slice | Tensor) -> RowSpec:
        """Return the arguments of some of the rows: where temperatures are tensors, theirs."""
        if not self.of_rows:
            return self
        student, teacher = self.student.at(rows), self.teacher.at(rows)
        if self.student.temperature is self.teacher.temperature:
            # One tensor for both sides stays one: linear_difference.
            teacher = replace(teacher, temperature=student.temperature)
        return replace(self, student=student, teacher=teacher)

    def linear_difference(self, same_bias: bool) -> bool:
        """True if the difference of the *transformed* logits is `factor` times the difference buffer.

        The buffer then keeps its digits: it is never added to the logits.
        """
        s, t = self.student, self.teacher
        of_rows = isinstance(s.temperature, Tensor) or isinstance(t.temperature, Tensor)
        alike = s.temperature is t.temperature if of_rows else bool(s.temperature == t.temperature)
        straight = s.softcap is None and t.softcap is None and s.scale == t.scale
        return self.difference and same_bias and alike and straight

    def scalars(self, linear: bool) -> tuple[float, ...]:
        """Return all values flat, in the order of csrc/row_binding.h; a softcap of 0 is none.

        A temperature of 0 stands for a tensor of them. `linear` is that of `linear_difference`.
        """
        s, t = self.student, self.teacher
        numbers = [0.0 if isinstance(x.temperature, Tensor) else x.temperature for x in (s, t)]
        return (
            int(self.divergence.kind), self.divergence.beta,
            s.scale, s.softcap or 0.0, numbers[0], t.scale, t.softcap or 0.0, numbers[1],
            self.difference, linear, self.teacher_mix, self.entry_clip, self.token_clip,
        )  # fmt: skip

    @classmethod
    def from_scalars(cls, values: Sequence[float], temperatures: Sequence[Tensor | None]) -> RowSpec:
        """Rebuild a spec from `scalars`, the z-loss and each side's tensor of temperatures.

        None for the teacher's, where its number is 0, stands for the student's.
        """
        kind, beta, *transforms, difference, _, mix, entry_clip, token_clip, z_loss = values
        of_student, of_teacher = temperatures
        tensors = of_student, of_student if of_teacher is None else of_teacher
        student, teacher = (
            LogitTransform(scale, softcap or None, number if tensor is None or number else tensor, name)
            for (scale, softcap, number), tensor, name in zip(
                (transforms[:3], transforms[3:]), tensors, ("temperature", "teacher_temperature"), strict=True
            )
        )
        divergence = Divergence(Kind(int(kind)), beta)
        return cls(divergence, student, teacher, bool(difference), mix, entry_clip, token_clip, z_loss)

    @property
    def clips(self) -> bool:
        """True if a term or the sum has an upper bound."""
        return min(self.entry_clip, self.token_clip) < math.inf

    @property
    def one_sweep(self) -> bool:
        """True if the statistics sweep alone yields the value: for KLs without an entry clip."""
        return self.divergence.one_sweep and self.entry_clip == math.inf

    @property
    def kinked(self) -> bool:
        """True if the gradient jumps at p = q or at the entry clip, which calls for fp32 logits."""
        return self.divergence.kinked or self.entry_clip < math.inf
