"""Error of loss and gradient against float64 as the teacher approaches the student, for every provider."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from torch import Tensor

from ...cached import cache_forward_kl, linear_cached_forward_kl
from ...testing import Case, hard_case, relative_error
from ..measure.context import Context, Task, blank, describe
from ..measure.gate import outcome_of, reference
from ..measure.timing import reason_of
from ..providers import CACHED, LABELS, PROVIDERS, SLOW, Op, Provider
from ..report.results import Row
from ..shapes import Setting

KLS = (2.0, 1e-1, 1e-2, 1e-3, 1e-4)
WIDTHS = {"normal": 4.0, "wide": 16.0}  # largest |logit|
N, H = 48, 64
VOCABULARY = {True: 2048, False: 16384}


def _cached(setting: Setting) -> Op:
    def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
        return linear_cached_forward_kl(h, W, cache_forward_kl(t, Wt, W))

    return op


# Beside this package's own ops, for the forward KL alone.
THROUGH_CACHE = Provider(CACHED, LABELS[CACHED], _cached, lambda setting: None, exact=True)


@functools.lru_cache(maxsize=4)
def near_case(setting: Setting, kl: float, width: str) -> Case:
    """Return a case at a forward KL of `kl`, without the ignored rows of `hard_case`.

    Those rows hold inf and NaN, which most other implementations do not accept.
    """
    case = hard_case(
        setting.N,
        setting.V,
        setting.H,
        setting.torch_dtype,
        shared_head=setting.head == "shared",
        masked_entry=None,
        near=kl,
        largest_logit=WIDTHS[width],
        widths=(1.0,),
        bias=False,
        seed=1,
        views=False,
    )
    assert case.mask is not None and case.labels is not None
    keep = case.mask & (case.labels != -100)
    return replace(
        case,
        student_hidden=case.student_hidden[keep].contiguous(),
        teacher_hidden=case.teacher_hidden[keep].contiguous(),
        mask=None,
        labels=None,
        token_weights=None,
        trainable=("student_hidden",),
    ).to(setting.device)


def errors(setting: Setting, providers: tuple[Provider, ...], kl: float, width: str) -> list[Row]:
    """Return one row per provider with its errors at one case."""
    case = near_case(setting, kl, width)
    actual_kl = outcome_of(reference(setting.at(divergence="forward_kl")), case.double()).loss.item()
    setting = setting.at(N=case.student_hidden.shape[0])
    truth = outcome_of(reference(setting), case.double())
    rows = []
    for provider in providers:
        row = blank("accuracy", provider.name, setting, variant=f"KL {kl:g}, {width} logits")
        reason = provider.unsupported(setting)
        # Rounding hidden states to 16 bits moves the teacher as well.
        if not reason and not kl / 2 < actual_kl < 2 * kl:
            reason = f"the KL of the case is {actual_kl:.2g}"
        if reason:
            rows.append(replace(row, reason=reason))
            continue
        try:
            actual = outcome_of(provider.make(setting), case)
        except Exception as error:
            rows.append(replace(row, reason=reason_of(error)))
            continue
        assert actual.student_hidden is not None and truth.student_hidden is not None
        found = (
            relative_error(actual.student_hidden, truth.student_hidden),
            relative_error(actual.loss, truth.loss),
        )
        known = [None if math.isnan(value) else value for value in found]
        rows.append(
            replace(
                row,
                gradient_error=known[0],
                loss_error=known[1],
                reason="not a number" if None in known else None,
            )
        )
    return rows


def accuracy(context: Context) -> list[Task]:
    """Return a task for each setting, width of the logits, and KL."""
    providers = (*context.without(*SLOW, "cce", "opsd-fp32"), PROVIDERS["opsd-fp32"])
    own = (*(provider for provider in providers if provider.exact), THROUGH_CACHE)
    size = Setting(N, H, VOCABULARY[context.quick], device=context.device)
    cases = [("bfloat16", "shared")] + (
        [] if context.quick else [("bfloat16", "two heads"), ("float32", "shared")]
    )
    tasks = []
    for dtype, head in cases:
        if context.dtypes and dtype not in context.dtypes:
            continue
        for divergence in (
            ("reverse_kl", "forward_kl") if context.quick else ("reverse_kl", "jsd", "forward_kl")
        ):
            setting = size.at(dtype=dtype, head=head, divergence=divergence)
            served = own if divergence == "forward_kl" else providers
            for width in WIDTHS:
                for kl in KLS:
                    label = f"KL {kl:g}, {width}, {describe(setting)}"
                    tasks.append(Task(label, functools.partial(errors, setting, served, kl, width)))
    return tasks
