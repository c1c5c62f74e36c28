"""From a setting and providers to rows: gate, time in turn, ratio to the bare GEMMs, share of the ceiling.

Every timing suite goes through here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ...testing import Case
from ..providers import BASE, WHOLE_ROWS, Op, Provider, bare_gemms, stepper
from ..report.results import Row
from ..shapes import Setting, make_case
from . import ceilings
from .context import blank, free
from .gate import check
from .memory import PLANNED, cuda_peak
from .timing import Variant, interleave, noise, ratio


def compare_providers(
    suite: str,
    setting: Setting,
    providers: Iterable[Provider],
    *,
    rounds: tuple[int, int],
    seconds: float,
    variant: str = "",
    target: float | None = None,
) -> list[Row]:
    """Return one row for each provider and for the bare GEMMs, timed in turn.

    `target` is the upper limit of this package's ratio. A provider that cannot serve, or fails its gate, gets
    a row with the reason.
    """
    admitted, refused = _gated(suite, setting, providers, variant, target)
    free()
    case = make_case(setting)
    variants = {
        BASE: Variant(bare_gemms(case, setting, setting.plan().rows)),
        "whole": Variant(bare_gemms(case, setting, WHOLE_ROWS[setting.device])),
    }
    ops = {provider.name: provider.make(setting) for provider, _ in admitted}
    variants |= {name: Variant(stepper(op, case, setting)) for name, op in ops.items()}
    interleave(variants, BASE, setting.device, rounds=rounds, seconds=seconds)
    rows = [
        blank(suite, BASE, setting, variant=variant, rows=setting.plan().rows),
        blank(suite, "whole", setting, variant=variant),
    ]
    for provider, row in admitted:
        # On a CPU the peak takes a process of its own: suite `memory`.
        if setting.device == "cuda":
            row = with_peak(row, variants[provider.name], ops[provider.name], case, setting)
        rows.append(row)
    done = [timed_row(row, variants, setting) for row in rows]
    del variants, case
    free()
    return done + refused


def _gated(
    suite: str, setting: Setting, providers: Iterable[Provider], variant: str, target: float | None
) -> tuple[list[tuple[Provider, Row]], list[Row]]:
    """Return the providers that passed their gate, each with its row, and the rows of those that did not."""
    admitted: dict[str, tuple[Provider, Row]] = {}
    refused: dict[str, Row] = {}
    for provider in providers:
        row = blank(
            suite, provider.name, setting, variant=variant, target=target if provider.name == "opsd" else None
        )
        reason = provider.unsupported(setting)
        if reason is None:
            verdict = check(provider, setting)
            reason = verdict.failure
            row = replace(row, gradient_error=verdict.gradient_error, loss_error=verdict.loss_error)
        if reason is None:
            admitted[provider.name] = (
                provider,
                replace(row, rows=setting.plan().rows if provider.exact else None),
            )
        else:
            refused[provider.name] = replace(row, reason=reason, target=None)
    return list(admitted.values()), list(refused.values())


def with_peak(row: Row, variant: Variant, op: Op, case: Case, setting: Setting) -> Row:
    """Return the row with the op's peak memory, over leaves that have no gradients yet."""
    if variant.failure is not None:
        return row
    try:
        peak = cuda_peak(stepper(op, case, setting))
    except torch.OutOfMemoryError:  # it fitted before, beside fewer gradients of other providers
        free()
        return row
    return replace(
        row, peak_bytes=peak, predicted_bytes=setting.plan().peak_bytes if row.provider in PLANNED else None
    )


def timed_row(row: Row, variants: dict[str, Variant], setting: Setting) -> Row:
    """Return the row with its times, or with the reason why it has none."""
    mine, base, whole = variants[row.provider], variants[BASE], variants.get("whole")
    if mine.failure or not mine.times:
        return replace(row, reason=mine.failure or "not measured", target=None)
    sample = mine.sample()
    seconds = sample.median / 1e3
    row = replace(row, ms=sample, tflops=setting.flops / seconds / 1e12, gbs=setting.bytes / seconds / 1e9)
    if not base.times:
        return replace(row, noise=f"no ratio: the bare GEMMs failed: {base.failure}", target=None)
    shared_rounds = whole is not None and whole.times.keys() & mine.times.keys()
    return replace(
        row,
        ratio=ratio(mine, base),
        base=BASE,
        whole=ratio(mine, whole).median if whole is not None and shared_rounds else None,
        noise=None if row.provider == BASE else noise(mine, base),
        ceiling=ceilings.ceiling(setting).floor_seconds(setting.flops, setting.bytes) / seconds,
    )


def part_row(row: Row, variants: dict[str, Variant], name: str, base: str) -> Row:
    """Return the row with the time of variant `name` and its ratio to `base`, or with a reason."""
    mine, whole = variants[name], variants[base]
    if mine.failure or not mine.times or not whole.times:
        return replace(row, reason=mine.failure or whole.failure or "not measured", target=None)
    return replace(
        row,
        ms=mine.sample(),
        ratio=ratio(mine, whole),
        base=base,
        noise=None if name == base else noise(mine, whole),
    )
