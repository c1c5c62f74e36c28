"""The numeric gates, with every tolerance of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .cases import Case, Outcome, evaluate, invariant_variants, plain_outcomes
from .reference import linear_divergence_reference

# All tolerances. A test that needs another number gives its reason here.
FP32_ARITHMETIC = 2e-6  # of the largest number that a row's sums pass through, or of 1
FP64_ARITHMETIC = 1e-13  # the same for float64 buffers; the truth itself carries about this much
TIMES_PLAIN = 2.0
OF_LARGEST = 1e-5
GROWTH = 1.5
# Relative Frobenius error against float64, for near and far teachers; "loss" is a relative error of the mean.
# "captured": hidden states of a real model at its default settings.
TARGETS = {"default": 2e-2, "captured": 6e-3, "fp32_logits": 3e-3, "loss": 5e-3}
# Largest error in nats of a label's log-prob from 16-bit logits, on the same hidden states.
LOGPROB_NATS = 2e-2
# Of a log-sum-exp whose row has no label, or an unlikely one. With sampled tokens it is LOGPROB_NATS.
LOGSUMEXP_NATS = 5e-2

Checkable = Tensor | Outcome | dict[str, Tensor]


def _named(*checked: Checkable) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Yield (name, the tensors of that name), for tensors, outcomes and dicts of tensors alike."""
    tensors = tuple(value for value in checked if isinstance(value, Tensor))
    if tensors:
        assert len(tensors) == len(checked), "expected tensors or outcomes, got both"
        yield "tensor", tensors
        return
    columns = [
        outcome if isinstance(outcome, dict) else dict(outcome.named())
        for outcome in checked
        if not isinstance(outcome, Tensor)
    ]
    for column in columns[1:]:
        assert column.keys() == columns[0].keys(), (
            f"one outcome has {sorted(columns[0])}, another {sorted(column)}"
        )
    for name in columns[0]:
        yield name, tuple(column[name] for column in columns)


def _where(excess: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape)) if excess.dim() else ()


def _error(actual: Tensor, truth: Tensor, name: str) -> Tensor:
    """Return |actual - truth| in float64. Entries that are not finite must be equal."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    wrong = ~same & ~(actual.isfinite() & truth.isfinite())
    if wrong.any():
        at = _where(wrong.double())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries differ in being finite; "
            f"at {at} got {actual[at]}, truth {truth[at]}"
        )
    return torch.where(same, 0.0, (actual - truth).abs())


def assert_one_rounding(
    actual: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    interpreter: bool = False,
    *,
    magnitude: Tensor | float | None = None,
    name: str = "output",
) -> None:
    """Assert that an output is the float64 result of the same rounded inputs, rounded once to `dtype`.

    Allows half an ulp (a whole one for bf16 under Triton's interpreter, which truncates) plus 2e-6 of
    `magnitude`, the size of the numbers that cancel in the output. Default: the largest magnitude of truth's
    row (last dimension of a matrix; the entry itself of a vector), at least 1.
    """
    info = torch.finfo(dtype)
    error, exact = _error(actual, truth, name), truth.detach().double().cpu()
    size = torch.where(exact.isfinite(), exact.abs(), 0.0)
    if magnitude is None:
        magnitude = (size.amax(-1, keepdim=True) if size.dim() > 1 else size).clamp(min=1)
    ulps = 1.0 if interpreter and dtype == torch.bfloat16 else 0.5
    arithmetic = FP64_ARITHMETIC if dtype == torch.float64 else FP32_ARITHMETIC
    bound = (
        ulps * (info.eps * size + info.tiny * info.eps)
        + arithmetic * torch.as_tensor(magnitude).double().cpu()
    )
    excess = error - bound
    if (excess > 0).any():
        at = _where(excess)
        got, limit = actual.detach().double().cpu()[at], bound.expand_as(error)[at]
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} entries are further than one rounding of "
            f"{dtype} from the truth; worst at {at}: got {got:.9g}, truth {exact[at]:.9g}, "
            f"error {error[at]:.2e}, bound {limit:.2e}"
        )


def assert_no_worse(actual: Checkable, peer: Checkable | Sequence[Checkable], truth: Checkable) -> None:
    """Assert a largest error against float64 `truth` of at most twice `peer`'s plus 1e-5 of the largest.

    `peer` is plain PyTorch at the same dtype with fp32 logits. Of several peers (`plain_outcomes`) the one
    with the largest error counts.
    """
    peers = peer if isinstance(peer, (list, tuple)) else (peer,)
    for name, (a, t, *others) in _named(actual, truth, *peers):
        error = _error(a, t, name)
        if error.numel() == 0:
            continue
        plain = max(_error(other, t, f"plain PyTorch's {name}").max().item() for other in others)
        largest = torch.where(t.isfinite(), t.abs(), 0.0).max().item()
        bound = TIMES_PLAIN * plain + OF_LARGEST * largest
        at = _where(error)
        assert error[at] <= bound, (
            f"{name}: error {error[at]:.3e} at {at} (truth {t[at]:.6g}), bound {bound:.3e} = "
            f"{TIMES_PLAIN} x plain PyTorch's {plain:.3e} + {OF_LARGEST} x {largest:.3g}"
        )


def assert_same_bits(actual: Checkable, expected: Checkable) -> None:
    """Assert equality bit for bit, NaN included."""
    for name, (a, e) in _named(actual, expected):
        assert a.dtype == e.dtype and a.shape == e.shape, (
            f"{name}: {a.dtype} {tuple(a.shape)}, expected {e.dtype} {tuple(e.shape)}"
        )
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        differ = a.detach().cpu().view(bits) != e.detach().cpu().view(bits)
        if differ.any():
            raise AssertionError(
                f"{name}: {int(differ.sum())} of {differ.numel()} entries differ in their bits; "
                f"first at {_where(differ.double())}"
            )


def relative_error(actual: Tensor, truth: Tensor, name: str = "value") -> float:
    """Return the Frobenius norm of the difference over that of the truth."""
    return (
        _error(actual, truth, name).norm() / truth.detach().double().cpu().norm().clamp(min=1e-300)
    ).item()


def assert_no_growth(many: Checkable, one: Checkable, truth: Checkable) -> None:
    """Assert that the relative error with many chunks is at most 1.5 times that with one.

    Half a unit of the dtype passes in any case: one chunk may be right by luck.
    """
    for name, (m, o, t) in _named(many, one, truth):
        grown, base = relative_error(m, t, name), relative_error(o, t, f"{name} with one chunk")
        bound = max(GROWTH * base, torch.finfo(m.dtype).eps / 2)
        assert grown <= bound, (
            f"{name}: relative error {grown:.3e} with many chunks against {base:.3e} with one; "
            f"bound {bound:.3e}"
        )


def assert_on_target(actual: Checkable, truth: Checkable, target: str) -> None:
    """Assert a relative error within TARGETS["loss"] for the loss and TARGETS[target] for gradients."""
    for name, (a, t) in _named(actual, truth):
        bound = TARGETS["loss" if name == "loss" else target]
        error = relative_error(a, t, name)
        assert error <= bound, f"{name}: relative error {error:.3%}, target {bound:.2%}"


def assert_invariant(op: Callable, case: Case, **options: object) -> None:
    """Assert that `op` keeps its accuracy where a softmax sees no change.

    `op` takes the arguments of `linear_divergence`, with `options` beside those of `case`. It runs on cases
    with the same distributions: all logits moved by 32, -32, -300, 1000 or -1000, through a hidden unit and
    through the biases; hidden states times 4 and 1/4, undone by the temperature or by the logit scales; the
    vocabulary in another order. Each is compared with the float64 reference of the changed case: 16-bit
    inputs by `assert_on_target` ("default"), others by `assert_no_worse` with plain PyTorch on the changed
    case. An error names the change.
    """
    for name, changed, told in invariant_variants(case, options):
        actual = evaluate(op, changed, **told)
        truth = evaluate(linear_divergence_reference, changed.double(), **told)
        try:
            if changed.student_hidden.dtype.itemsize == 2:
                assert_on_target(actual, truth, "default")
            else:
                assert_no_worse(actual, plain_outcomes(changed, **told), truth)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
