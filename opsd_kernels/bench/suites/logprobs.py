"""Time of `linear_logprobs` and of torch's fused cross-entropy, against the bare GEMMs of one head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import check_label_loss
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave
from ..providers import BASE, LABEL_PROVIDERS, WHOLE_ROWS, Provider, bare_gemms, stepper
from ..report.results import Row
from ..shapes import Setting, labelled_case

WHAT = "log-prob"  # in place of a divergence


def compare_label_losses(setting: Setting, providers: Iterable[Provider], effort: Effort) -> list[Row]:
    """Return one row for each provider and for the bare GEMMs, timed in turn."""
    rows = {BASE: replace(blank("logprobs", BASE, setting), divergence=WHAT)}
    admitted: list[Provider] = []
    for provider in providers:
        reason = provider.unsupported(setting)
        verdict = None if reason else check_label_loss(provider, setting)
        row = replace(blank("logprobs", provider.name, setting), divergence=WHAT)
        if verdict is not None:
            reason = verdict.failure
            row = replace(row, gradient_error=verdict.gradient_error, loss_error=verdict.loss_error)
        rows[provider.name] = replace(row, reason=reason)
        admitted += [] if reason else [provider]
    case = labelled_case(setting)
    variants = {BASE: Variant(bare_gemms(case, setting, WHOLE_ROWS[setting.device], teacher=False))}
    variants |= {p.name: Variant(stepper(p.make(setting), case, setting)) for p in admitted}
    interleave(variants, BASE, setting.device, **effort)
    done = [part_row(row, variants, name, BASE) if name in variants else row for name, row in rows.items()]
    del variants, case
    free()
    return done


def logprobs(context: Context) -> list[Task]:
    """Return a task for each shape, dtype and mode, with all of LABEL_PROVIDERS."""
    settings = [
        context.setting(shape, dtype, mode=mode)
        for shape in context.headline()
        for dtype in context.chosen_dtypes(*(("bfloat16",) if context.quick else ("float32", "bfloat16")))
        for mode in ("trainable", "frozen")
    ]
    providers = tuple(LABEL_PROVIDERS.values())
    return [
        Task(f"log-probs, {describe(s)}", partial(compare_label_losses, s, providers, context.effort()))
        for s in settings
    ]
