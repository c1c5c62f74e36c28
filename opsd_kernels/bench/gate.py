"""What a provider must show before it gets a number: the gates of the unit tests (opsd_kernels/testing/gates.py), on a case of the setting's own head.

This package answers to its own promises: 16-bit inputs within the target of their logits (2 % or 0.3 %), wider ones no worse than twice plain PyTorch. Others
answer for computing the same function, in fp32 within 0.3 %, as in tests/peers; how far off they are at the setting's dtype is part of their row.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._core.planner import resolve_logits
from ..spec import Divergence
from ..testing import Case, Outcome, assert_no_worse, assert_on_target, evaluate, hard_case, relative_error
from ..testing.reference import linear_divergence_reference
from .providers import Provider
from .shapes import Setting, make_case
from .timing import reason_of

TOKENS = 64
CHECKED_ROWS = 4096  # of dW: all of them in float64 would take longer than the measurement, and every entry of the sum is in each


@dataclass(frozen=True)
class Verdict:
    """Relative errors against float64, Frobenius; `failure` is why there is no number."""

    gradient_error: float | None = None
    loss_error: float | None = None
    failure: str | None = None


def reference(setting: Setting) -> Callable[..., Tensor]:
    reduction = "none" if setting.mode == "recompute" else "mean"
    return functools.partial(linear_divergence_reference, divergence=setting.divergence, reduction=reduction)


def outcome_of(op: Callable, case: Case) -> Outcome:
    """Mean loss, gradient of the hidden states, and some rows of the head's, spread over the vocabulary. The targets are those of a mean."""
    result = evaluate(op, case)
    result = replace(result, loss=result.loss.mean())
    if result.student_weight is None:
        return result
    step = max(1, result.student_weight.shape[0] // CHECKED_ROWS)
    return replace(result, student_weight=result.student_weight[::step].clone())


@functools.lru_cache(maxsize=1)  # one truth may hold gigabytes
def _judged(setting: Setting) -> tuple[Case, Outcome, Outcome]:
    """(case, truth, plain PyTorch's outcome at the setting's dtype)."""
    case = make_case(setting)
    return case, outcome_of(reference(setting), case.double()), outcome_of(reference(setting), case)


def check(provider: Provider, setting: Setting) -> Verdict:
    """Whether `provider` may be measured at `setting`, and its errors there."""
    return _checked(
        provider, setting.at(N=TOKENS, masked=0.0)
    )  # of fewer tokens, the roundings of a bf16 loss would not average out


@functools.cache
def _checked(provider: Provider, setting: Setting) -> Verdict:
    try:
        return _own(provider, setting) if provider.exact else _peer(provider, setting)
    except AssertionError as error:
        return Verdict(failure=f"wrong, so no number: {reason_of(error)}")
    except Exception as error:  # a peer may raise what it likes: that is its row
        return Verdict(failure=reason_of(error))
    finally:
        gc.collect()


def _own(provider: Provider, setting: Setting) -> Verdict:
    case, truth, plain = _judged(setting)
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
    """The worse one of the gradients."""
    named, true = dict(actual.named()), dict(truth.named())
    gradients = [relative_error(named[name], true[name]) for name in named if name != "loss"]
    return Verdict(max(gradients, default=None), relative_error(actual.loss, true["loss"]))


def _peer(provider: Provider, setting: Setting) -> Verdict:
    if not provider.same_loss:
        return Verdict()
    narrow = setting.at(N=29, V=211, H=24, dtype="float32", head="two heads")
    case = hard_case(29, 211, 24, torch.float32, masked_entry=None, views=False, bias=False, seed=1).to(
        setting.device
    )
    clean = {
        name: getattr(case, name).nan_to_num(0.3, 0.3, 0.3) for name in ("student_hidden", "teacher_hidden")
    }
    leaves = tuple(name for name in make_case(setting.at(N=1, V=2, H=1)).trainable)
    case = replace(case, **clean, mask=None, labels=None, token_weights=None, trainable=leaves)
    assert_on_target(
        outcome_of(provider.make(narrow), case), outcome_of(reference(narrow), case.double()), "fp32_logits"
    )
    case, truth, _ = _judged(setting)
    return _errors(outcome_of(provider.make(setting), case), truth)
