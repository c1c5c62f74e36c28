"""The check behind every number: the gates of the unit tests (opsd_kernels.testing) on the setting's head.

This package has to keep its own promises: with 16-bit inputs the target of their logits (2 % or 0.3 %), with
wider inputs at most twice the error of plain PyTorch. Other libraries have to compute the same function, in
fp32 within 0.3 %, as in tests/peers; their error at the setting's dtype is part of their row.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...spec import Divergence
from ...testing import (
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    evaluate,
    hard_case,
    relative_error,
)
from ...testing.reference import linear_divergence_reference
from ..internals import resolve_logits
from ..providers import Provider
from ..shapes import Setting, make_case
from .timing import reason_of

# With fewer tokens the rounding errors of a bf16 loss would not average out.
TOKENS = 64
# Rows of dW that are compared. All of them in float64 would take longer than the measurement, and each row
# sums over all tokens.
CHECKED_ROWS = 4096


@dataclass(frozen=True)
class Verdict:
    """Relative errors against float64, Frobenius norm; `failure` is the reason for a missing number."""

    gradient_error: float | None = None
    loss_error: float | None = None
    failure: str | None = None


def reference(setting: Setting) -> Callable[..., object]:
    """Return the dense definition of the setting's loss."""
    reduction = "none" if setting.mode == "recompute" else "mean"
    return functools.partial(linear_divergence_reference, divergence=setting.divergence, reduction=reduction)


def outcome_of(op: Callable[..., object], case: Case) -> Outcome:
    """Return mean loss, hidden-state gradient, and CHECKED_ROWS rows of dW spread over the vocabulary.

    The mean of per-token losses is taken because the targets are those of a mean.
    """
    result = evaluate(op, case)
    result = replace(result, loss=result.loss.mean())
    if result.student_weight is None:
        return result
    step = max(1, result.student_weight.shape[0] // CHECKED_ROWS)
    return replace(result, student_weight=result.student_weight[::step].clone())


@functools.lru_cache(maxsize=1)  # one float64 outcome may hold gigabytes
def _truth_and_peer(setting: Setting) -> tuple[Case, Outcome, Outcome]:
    """Return (case, float64 outcome, plain PyTorch's outcome at the setting's dtype)."""
    case = make_case(setting)
    return case, outcome_of(reference(setting), case.double()), outcome_of(reference(setting), case)


def check(provider: Provider, setting: Setting) -> Verdict:
    """Run the gate of `provider` at `setting`, with TOKENS unmasked tokens; its errors, or the failure."""
    return _checked(provider, setting.at(N=TOKENS, masked=0.0))


@functools.cache
def _checked(provider: Provider, setting: Setting) -> Verdict:
    try:
        return _own(provider, setting) if provider.exact else _peer(provider, setting)
    except AssertionError as error:
        return Verdict(failure=f"wrong, so no number: {reason_of(error)}")
    except Exception as error:  # other libraries raise many types; each becomes a row
        return Verdict(failure=reason_of(error))
    finally:
        gc.collect()


def _own(provider: Provider, setting: Setting) -> Verdict:
    """Check this package against its own targets."""
    case, truth, plain = _truth_and_peer(setting)
    actual = outcome_of(provider.make(setting), case)
    buffer, _ = resolve_logits(
        setting.torch_dtype, "float32" if provider.name == "opsd-fp32" else "auto", setting.head == "shared"
    )
    if Divergence.parse(setting.divergence).kinked and buffer.itemsize == 2:
        buffer = torch.float32
    if setting.torch_dtype.itemsize == 2:
        assert_on_target(actual, truth, "default" if buffer.itemsize == 2 else "fp32_logits")
    else:
        assert_no_worse(actual, plain, truth)
    return _errors(actual, truth)


def _errors(actual: Outcome, truth: Outcome) -> Verdict:
    """Return the error of the loss and the largest error of a gradient."""
    named, true = dict(actual.named()), dict(truth.named())
    gradients = [relative_error(named[name], true[name]) for name in named if name != "loss"]
    return Verdict(max(gradients, default=None), relative_error(actual.loss, true["loss"]))


def _peer(provider: Provider, setting: Setting) -> Verdict:
    """Check that another library computes the same function, in fp32 on a small case without ignored rows."""
    if not provider.same_loss:
        return Verdict()
    narrow = setting.at(N=29, V=211, H=24, dtype="float32", head="two heads")
    case = hard_case(29, 211, 24, torch.float32, masked_entry=None, views=False, bias=False, seed=1).to(
        setting.device
    )
    leaves = tuple(name for name in make_case(setting.at(N=1, V=2, H=1)).trainable)
    case = replace(
        case,
        student_hidden=case.student_hidden.nan_to_num(0.3, 0.3, 0.3),
        teacher_hidden=case.teacher_hidden.nan_to_num(0.3, 0.3, 0.3),
        mask=None,
        labels=None,
        token_weights=None,
        trainable=leaves,
    )
    assert_on_target(
        outcome_of(provider.make(narrow), case), outcome_of(reference(narrow), case.double()), "fp32_logits"
    )
    case, truth, _ = _truth_and_peer(setting)
    return _errors(outcome_of(provider.make(setting), case), truth)
