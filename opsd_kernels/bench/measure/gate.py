"""The check behind every number: the gates of the unit tests (opsd_kernels.testing) on the setting's head.

This package has to keep its own promises: with 16-bit inputs the target of their logits (2 % or 0.3 %), with
wider inputs at most twice the error of plain PyTorch. Other libraries have to compute the same function, in
fp32 within 0.3 %, as in tests/peers; their error at the setting's dtype is part of their row. A call with
`gradient_tolerance` has to leave out no more than it reports, and nothing else: `check_tolerance`.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...divergence import linear_divergence
from ...spec import Divergence, expect
from ...testing import (
    TARGETS,
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    evaluate,
    hard_case,
    relative_error,
)
from ...testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    reference_divergence,
)
from ..internals import resolve_logits
from ..providers import Provider
from ..shapes import Setting, labelled_case, make_case
from .timing import reason_of

# With fewer tokens the rounding errors of a bf16 loss would not average out.
TOKENS = 64
# Rows of dW that are compared. All of them in float64 would take longer than the measurement, and each row
# sums over all tokens.
CHECKED_ROWS = 4096
# The true share of what is left out over the reported one: 16-bit logits round the small columns of a
# gradient by up to this much.
SHARE_ROUNDING = {"float32": 1.001, "bfloat16": 1.1, "float16": 1.1}


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
    """Run the gate of `provider` at `setting`, with TOKENS valid tokens; its errors, or the failure."""
    return _checked(provider, setting.at(N=math.ceil(TOKENS / (1 - setting.masked))))


@functools.cache
def _checked(provider: Provider, setting: Setting) -> Verdict:
    return verdict_of(lambda: _own(provider, setting) if provider.exact else _peer(provider, setting))


def verdict_of(run: Callable[[], Verdict]) -> Verdict:
    """Return the result of a check; where it raises, the failure."""
    try:
        return run()
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
    return errors_of(actual, truth)


def errors_of(actual: Outcome, truth: Outcome) -> Verdict:
    """Return the error of the loss and the largest error of a gradient."""
    named, true = dict(actual.named()), dict(truth.named())
    gradients = [relative_error(named[name], true[name]) for name in named if name != "loss"]
    return Verdict(max(gradients, default=None), relative_error(actual.loss, true["loss"]))


def _peer(provider: Provider, setting: Setting) -> Verdict:
    """Check that another library computes the same function, in fp32 on a small case."""
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
        labels=make_case(narrow).labels,
        token_weights=None,
        trainable=leaves,
    )
    assert_on_target(
        outcome_of(provider.make(narrow), case), outcome_of(reference(narrow), case.double()), "fp32_logits"
    )
    case, truth, _ = _truth_and_peer(setting)
    return errors_of(outcome_of(provider.make(setting), case), truth)


# ---------------------------------------------------------------- losses of labels


def label_loss(
    h: torch.Tensor, W: torch.Tensor, *teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean of -log p(label), by its definition."""
    logprobs = linear_logprobs_reference(h, W, labels)
    assert isinstance(logprobs, torch.Tensor)
    return -logprobs.mean()


def check_label_loss(provider: Provider, setting: Setting) -> Verdict:
    """Run the gate of a provider of LABEL_PROVIDERS, with TOKENS tokens; other libraries are held in fp32."""
    setting = setting.at(N=TOKENS)

    def errors(setting: Setting) -> Verdict:
        case = labelled_case(setting)
        found, truth = outcome_of(provider.make(setting), case), outcome_of(label_loss, case.double())
        if provider.exact and setting.torch_dtype.itemsize > 2:
            assert_no_worse(found, outcome_of(label_loss, case), truth)
        elif provider.exact or setting.torch_dtype.itemsize > 2:
            assert_on_target(found, truth, "fp32_logits")
        return errors_of(found, truth)

    def run() -> Verdict:
        if not provider.exact:
            errors(setting.at(dtype="float32"))
        return errors(setting)

    return verdict_of(run)


# ---------------------------------------------------------------- gradient_tolerance


def part_of(case: Case, rows: slice) -> Case:
    """Return the case of some rows. Raises ValueError for one with a mask or token weights."""
    expect(
        case.mask is None and case.token_weights is None, "case", "hidden states, heads and labels", "more"
    )
    labels = None if case.labels is None else case.labels[rows]
    hidden, teacher = case.student_hidden[rows], case.teacher_hidden[rows]
    return replace(case, student_hidden=hidden, teacher_hidden=teacher, labels=labels)


def check_tolerance(setting: Setting, case: Case, tolerance: float) -> Verdict:
    """Check a call with `gradient_tolerance` on the first TOKENS rows of `case`, which are one chunk.

    The rows of dW that are not zero belong to the columns that were kept: they are as exact as without a
    tolerance. The other columns hold a share of the float64 gradient that is at most the reported one, and
    that one is at most the tolerance. dh is no further from the truth than the products of the kept columns
    alone, which lack the correction by the mean row.
    """
    return verdict_of(lambda: _within_tolerance(setting, part_of(case, slice(TOKENS)), tolerance))


def _within_tolerance(setting: Setting, case: Case, tolerance: float) -> Verdict:
    case = replace(case, trainable=("student_hidden", "student_weight"))
    options = {"divergence": setting.divergence, "return_stats": True, "workspace_bytes": 1 << 36}
    found = evaluate(linear_divergence, case, gradient_tolerance=tolerance, **options)
    assert found.student_weight is not None and found.student_hidden is not None
    kept = found.student_weight.ne(0).any(1)
    dropped = found.stats.gradient_dropped.item()  # type: ignore[attr-defined]
    wide = case.double()
    logits = (wide.student_hidden @ wide.student_weight.t()).requires_grad_()
    teacher = wide.teacher_hidden @ wide.teacher_weight.t()
    loss = reference_divergence(logits, teacher, Divergence.parse(setting.divergence)).mean()
    (G,) = torch.autograd.grad(
        loss, logits, torch.as_tensor(case.upstream, dtype=loss.dtype, device=loss.device)
    )
    share = (G[:, ~kept].norm() / G.norm()).item()
    # Columns may also be zero because a probability underflows.
    limit = SHARE_ROUNDING[setting.dtype] * dropped + 1e-9
    assert share <= limit, f"{share:.2e} of the gradient was left out, {dropped:.2e} reported"
    assert dropped <= tolerance, f"{dropped:.2e} of the gradient was left out, allowed {tolerance:.0e}"
    with torch.no_grad():
        truth = Outcome(loss.detach(), G @ wide.student_weight, G.t()[kept] @ wide.student_hidden)
    exact = "default" if setting.torch_dtype.itemsize == 2 else "fp32_logits"
    part = Outcome(found.loss, student_weight=found.student_weight[kept])
    assert_on_target(part, replace(truth, student_hidden=None), exact)
    assert truth.student_hidden is not None
    plain = (G[:, ~kept] @ wide.student_weight[~kept]).norm() / truth.student_hidden.norm()
    error, bound = relative_error(found.student_hidden, truth.student_hidden), plain.item() + TARGETS[exact]
    assert error <= bound, (
        f"gradient of student_hidden: error {error:.3%}, without its correction {bound:.3%}"
    )
    return Verdict(error, relative_error(found.loss, truth.loss))
