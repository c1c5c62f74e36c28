"""Hard inputs, and the loss and gradients of an op on them.

`hard_case` draws from a generator of its own and leaves torch's random state alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..spec import Divergence, expect
from .reference import linear_divergence_reference, reference_divergence

LEAVES = ("student_hidden", "student_weight", "student_bias")


@dataclass(frozen=True)
class Case:
    """The tensors of one call, the names of the trainable ones, and the upstream gradient."""

    student_hidden: Tensor  # (..., H_s)
    student_weight: Tensor  # (V_s, H_s)
    teacher_hidden: Tensor  # (..., H_t)
    teacher_weight: Tensor  # (V_t, H_t)
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    token_weights: Tensor | None = None
    vocab_size: int | None = None
    upstream: float = 3.0
    trainable: tuple[str, ...] = LEAVES

    def _map(self, change: Callable[[Tensor], Tensor]) -> Case:
        # keyed by identity, so that a shared head stays shared
        done: dict[int, Tensor] = {}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {
            name: done.setdefault(id(t), change(t)) for name, t in values.items() if isinstance(t, Tensor)
        }
        return replace(self, **changed)

    def double(self) -> Case:
        """Convert to float64."""
        return self._map(lambda t: t.double() if t.is_floating_point() else t)

    def to(self, device: torch.device | str) -> Case:
        return self._map(lambda t: t.to(device))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def options(self) -> dict[str, object]:
        """Return the keyword arguments that are set."""
        names = ("student_bias", "teacher_bias", "mask", "labels", "token_weights", "vocab_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def leaves(self) -> Case:
        """Detach the trainable tensors into leaves with the same storage that require a gradient."""
        names = [name for name in self.trainable if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).detach().requires_grad_() for name in names})


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradients under the case's upstream gradient; None for frozen tensors."""

    loss: Tensor
    student_hidden: Tensor | None = None
    student_weight: Tensor | None = None
    student_bias: Tensor | None = None
    stats: object = None

    def value(self) -> Outcome:
        """Return the outcome with the loss alone."""
        return Outcome(self.loss)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("loss", *LEAVES):
            value = getattr(self, name)
            if value is not None:
                yield name if name == "loss" else f"gradient of {name}", value


def evaluate(op: Callable, case: Case, **options: object) -> Outcome:
    """Run `op` forward and backward. Per-token losses get a different upstream gradient for each token."""
    live = case.leaves()
    result = op(*live.inputs(), **{**live.options(), **options})
    loss, stats = result if isinstance(result, tuple) else (result, None)
    upstream = torch.full_like(loss, case.upstream)
    if loss.dim():
        upstream = upstream * torch.linspace(
            0.25, 1.0, loss.numel(), dtype=loss.dtype, device=loss.device
        ).view(loss.shape)
    names = [name for name in case.trainable if getattr(live, name) is not None]
    grads = torch.autograd.grad(loss, [getattr(live, name) for name in names], upstream) if names else ()
    return Outcome(loss.detach(), **dict(zip(names, grads, strict=True)), stats=stats)


def _reordered(case: Case, gen: torch.Generator) -> tuple[Case, Callable[[Outcome], Outcome]]:
    """Shuffle the hidden and vocabulary axes. Also returns a function that restores an outcome's order."""
    V, (rows, H) = case.vocab_size or case.student_weight.shape[0], case.student_weight.shape
    columns, states = torch.randperm(V, generator=gen), torch.randperm(H, generator=gen)
    teacher_states = (
        states
        if case.teacher_weight is case.student_weight
        else torch.randperm(case.teacher_weight.shape[1], generator=gen)
    )

    def order(size: int) -> Tensor:
        """Return the shuffled vocabulary, with the padding after it."""
        return torch.cat([columns, torch.arange(V, size)])

    back, back_states = order(rows).argsort(), states.argsort()
    weight = case.student_weight[order(rows)][:, states]
    teacher = (
        weight
        if case.teacher_weight is case.student_weight
        else case.teacher_weight[order(case.teacher_weight.shape[0])][:, teacher_states]
    )
    shuffled = replace(
        case,
        student_hidden=case.student_hidden[..., states],
        student_weight=weight,
        teacher_hidden=case.teacher_hidden[..., teacher_states],
        teacher_weight=teacher,
        student_bias=None if case.student_bias is None else case.student_bias[order(rows)],
        teacher_bias=None
        if case.teacher_bias is None
        else case.teacher_bias[order(case.teacher_bias.shape[0])],
        labels=None
        if case.labels is None
        else torch.where(case.labels < 0, case.labels, back[case.labels.clamp(min=0)]),
    )
    home = {
        "student_hidden": lambda grad: grad[..., back_states],
        "student_weight": lambda grad: grad[back][:, back_states],
        "student_bias": lambda grad: grad[back],
    }

    def restore(outcome: Outcome) -> Outcome:
        return replace(
            outcome,
            **{
                name: move(getattr(outcome, name))
                for name, move in home.items()
                if getattr(outcome, name) is not None
            },
        )

    return shuffled, restore


def plain_outcomes(case: Case, orders: int = 4, **options: object) -> tuple[Outcome, ...]:
    """Run plain PyTorch on `case` in `orders` different orders of its hidden and vocabulary axes.

    The largest error of one run over a few dozen numbers is luck: it may be a tenth of that in another order,
    or on another processor.
    """
    gen = torch.Generator().manual_seed(0)
    outcomes = [evaluate(linear_divergence_reference, case, **options)]
    for _ in range(orders - 1):
        shuffled, restore = _reordered(case, gen)
        outcomes.append(restore(evaluate(linear_divergence_reference, shuffled, **options)))
    return tuple(outcomes)


# ---------------------------------------------------------------- what a softmax does not see

OFFSETS = (32.0, -32.0, -300.0, 1000.0, -1000.0)  # each a bf16 number


def with_offset(case: Case, offset: float) -> Case:
    """Add a hidden unit that holds `offset` to both sides. Its weights are 1."""
    ones: dict[int, Tensor] = {}

    def widened(x: Tensor, value: float) -> Tensor:
        return torch.cat([x, x.new_full((*x.shape[:-1], 1), value)], -1)

    def head(weight: Tensor) -> Tensor:
        return ones.setdefault(id(weight), widened(weight, 1.0))  # a shared head stays shared

    return replace(
        case,
        student_hidden=widened(case.student_hidden, offset),
        teacher_hidden=widened(case.teacher_hidden, offset),
        student_weight=head(case.student_weight),
        teacher_weight=head(case.teacher_weight),
    )


def with_bias_offset(case: Case, offset: float) -> Case:
    """Add `offset` to all entries of both biases, in fp32 or fp64; without biases add one that holds it."""
    wide = torch.promote_types(case.student_weight.dtype, torch.float32)
    shared = case.teacher_weight is case.student_weight and case.teacher_bias is case.student_bias

    def moved(bias: Tensor | None, weight: Tensor) -> Tensor:
        return (
            weight.new_full(weight.shape[:1], offset, dtype=wide) if bias is None else bias.to(wide) + offset
        )

    student = moved(case.student_bias, case.student_weight)
    teacher = student if shared else moved(case.teacher_bias, case.teacher_weight)
    return replace(case, student_bias=student, teacher_bias=teacher)


def invariant_variants(case: Case, options: dict[str, Any]) -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """Yield (name, changed case, options) of calls with the same distributions as `case` under `options`.

    A common offset of the logits, through a hidden unit and through the biases; hidden states times a power
    of two, undone by temperature or logit scale; another order of the vocabulary and of the hidden units.
    The distributions are equal up to the rounding of logits and biases; gradients differ.
    """
    for offset in OFFSETS:
        yield f"a hidden unit adds {offset:g} to all logits", with_offset(case, offset), options
        yield f"the biases add {offset:g} to all logits", with_bias_offset(case, offset), options
    for factor in (4.0, 0.25):
        hidden = {name: getattr(case, name) * factor for name in ("student_hidden", "teacher_hidden")}
        names = ["temperature"] + ["teacher_temperature"] * (options.get("teacher_temperature") is not None)
        temperatures = {name: options.get(name, 1.0) * factor for name in names}
        scales = {
            name: options.get(name, 1.0) / factor for name in ("student_logit_scale", "teacher_logit_scale")
        }
        scaled = replace(case, **hidden)
        yield f"hidden states and temperature times {factor:g}", scaled, {**options, **temperatures}
        yield f"hidden states times {factor:g}, logit scales over it", scaled, {**options, **scales}
    shuffled, _ = _reordered(case, torch.Generator().manual_seed(0))
    yield "the vocabulary in another order", shuffled, options


# ---------------------------------------------------------------- the hard case


def _head(V: int, H: int, padding: int, gen: torch.Generator) -> Tensor:
    """Shape (V + padding, H) float64. Padded rows are large enough to take nearly all probability."""
    weight = torch.randn(V + padding, H, generator=gen, dtype=torch.float64) / math.sqrt(H)
    weight[V:] *= 50
    return weight


def _hidden(weight: Tensor, widths: Tensor, gen: torch.Generator) -> Tensor:
    """Shape (N, H). Row i's largest |logit| is widths[i]; every third row is peaked at one token."""
    N, (V, H) = widths.numel(), weight.shape
    hidden = torch.randn(N, H, generator=gen, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=gen)
    hidden[1::3] = weight[targets[1::3]]
    return hidden * (widths / (hidden @ weight.T).abs().amax(-1).clamp(min=1e-3))[:, None]


def _near_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | float, target: float, gen: torch.Generator
) -> Tensor:
    """Find teacher hidden states at forward KL `target` nats from the student's, by bisection in each row.

    The bisection runs on the logarithm of the step.
    """
    noise = torch.randn(hidden.shape, generator=gen, dtype=torch.float64)
    student = hidden @ weight.T + bias

    def gap(step: Tensor) -> Tensor:
        return reference_divergence(
            student, (hidden + step * noise) @ weight.T + bias, Divergence.parse("forward_kl")
        )[:, None]

    one = torch.ones(hidden.shape[0], 1, dtype=torch.float64)
    # In the other direction a peaked row may only sharpen, and never reach `target`.
    noise = torch.where(gap(100 * one) > gap(-100 * one), noise, -noise)
    low, high = (torch.full((hidden.shape[0], 1), exponent, dtype=torch.float64) for exponent in (-8.0, 2.0))
    for _ in range(20):
        middle = (low + high) / 2
        too_far = gap(10**middle) > target
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    return hidden + 10**low * noise


def _as_view(tensor: Tensor, column_stride: int) -> Tensor:
    """Copy to a view of a larger storage: odd offset, gaps between rows and columns, NaN in the gaps."""
    rows, columns = tensor.shape
    storage = tensor.new_full((rows + 1, column_stride * columns + 3), math.nan)
    view = storage[1:, 1 : 1 + column_stride * columns : column_stride]
    return view.copy_(tensor)


def _biases(
    V: int, padding: tuple[int, int], same: bool, masked_entry: str | None, gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(V + extra, generator=gen, dtype=torch.float64) / 2 for extra in padding)
    if same:
        teacher[:V] = student[:V]
    if masked_entry == "both" and V > 2:
        student[V // 2] = -math.inf
    if masked_entry is not None and V > 2:
        teacher[V // 2] = -math.inf
    return student, teacher


def _spoil(case: Case) -> Case:
    """Ignore one row by mask and one by label, both full of inf and NaN, and set one weight to zero.

    With a small N some of these are left out.
    """
    assert case.mask is not None and case.labels is not None and case.token_weights is not None
    flat_s, flat_t = case.student_hidden, case.teacher_hidden
    N = flat_s.shape[0]
    mask, labels, weights = case.mask.clone(), case.labels.clone(), case.token_weights.clone()
    ignored = ([N // 3] if N > 2 else []) + ([N // 2] if N > 4 else [])
    for row in ignored:
        flat_s[row], flat_t[row], weights[row] = math.inf, math.nan, math.nan
    if N > 2:
        mask[N // 3] = False
    if N > 4:
        labels[N // 2] = -100
    if N > 1:
        weights[N - 1] = 0
    return replace(case, mask=mask, labels=labels, token_weights=weights)


def hard_case(
    N: int,
    V: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_width: int | None = None,
    shared_head: bool = False,
    near: float | None = None,
    largest_logit: float = 40.0,
    widths: tuple[float, ...] = (1.0, 0.4, 0.1),
    bias: bool = True,
    masked_entry: str | None = "both",
    padding: int = 0,
    views: bool = True,
    frozen_head: bool = False,
    batch: int | None = None,
    seed: int = 0,
) -> Case:
    """Make inputs that expose planted bugs.

    Rows whose largest |logit| is `largest_logit` times each of `widths` in turn, every third one peaked;
    ignored rows that hold inf and NaN; a zero weight; biases with a -inf entry (`masked_entry`: "both" sides,
    "teacher" alone, None); `padding` columns that would take all probability; tensors that are offset,
    strided views of storages with NaN in the gaps; upstream gradient 3.

    With `near` the teacher is at that forward KL (nats) from the student: with the student's own head
    (`shared_head`), an equal one, or with `teacher_width` > H a wider one. `batch` gives hidden states
    (batch, N / batch, H).
    """
    expect(
        masked_entry in ("both", "teacher", None),
        "masked_entry",
        "'both', 'teacher' or None",
        repr(masked_entry),
    )
    H_t = teacher_width or H
    expect(H_t == H or not shared_head, "teacher_width", f"H = {H} for a shared head", H_t)
    expect(H_t >= H or near is None, "teacher_width", f"at least H = {H} for a near teacher", H_t)
    gen = torch.Generator().manual_seed(seed)
    extra = (padding, padding if shared_head or not padding else padding + 2)
    largest = largest_logit * torch.tensor(widths, dtype=torch.float64).repeat(N // len(widths) + 1)[:N]
    W_s = _head(V, H, extra[0], gen)
    h_s = _hidden(W_s[:V], largest, gen)
    W_t = W_s if shared_head else _head(V, H_t, extra[1], gen)
    b_s, b_t = _biases(V, extra, shared_head or near is not None, masked_entry, gen)
    if near is None:
        h_t = _hidden(W_t[:V], largest.roll(1), gen)
    else:
        if not shared_head:
            W_t[:V, :H] = W_s[:V]
        h_t = _near_hidden(
            torch.cat([h_s, h_s.new_zeros(N, H_t - H)], 1), W_t[:V], b_s[:V] if bias else 0.0, near, gen
        )

    cast = (lambda t, stride: _as_view(t.to(dtype), stride)) if views else (lambda t, stride: t.to(dtype))
    student_weight, student_bias = cast(W_s, 1), b_s.to(dtype)
    case = Case(
        student_hidden=cast(h_s, 2),
        student_weight=student_weight,
        teacher_hidden=cast(h_t, 1),
        teacher_weight=student_weight if shared_head else cast(W_t, 1),
        student_bias=student_bias if bias else None,
        teacher_bias=(student_bias if shared_head and masked_entry != "teacher" else b_t.to(dtype))
        if bias
        else None,
        mask=torch.ones(N, dtype=torch.bool),
        labels=torch.randint(max(1, V // 2), (N,), generator=gen),
        token_weights=torch.rand(N, generator=gen) + 0.5,
        vocab_size=V if padding else None,
        trainable=("student_hidden",) if frozen_head else LEAVES,
    )
    case = _spoil(case)
    if batch is None:
        return case
    per_token = ("student_hidden", "teacher_hidden", "mask", "labels", "token_weights")
    return replace(
        case, **{name: getattr(case, name).unflatten(0, (batch, N // batch)) for name in per_token}
    )
