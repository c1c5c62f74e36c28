"""The row sweeps of each backend against the copy bandwidth, which bounds them, and the predicted time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ...spec import Divergence, RowSpec
from ..internals import backends, resolve_logits, sweep_times
from ..measure import ceilings
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import check
from ..measure.timing import Variant, interleave, noise, ratio, reason_of
from ..providers import PROVIDERS
from ..report.results import Row
from ..shapes import Setting

# Buffers touched: each sweep reads student and teacher once; the gradient overwrites the student.
TOUCHED = {"row_stats": 2, "row_dot": 2, "row_grad_": 3, "row_fused_": 3}
COPY = "copy"
MOST_ROWS = 1024


def sweeps_of(
    setting: Setting, backend: str, S: torch.Tensor, T: torch.Tensor, difference: bool
) -> dict[str, Callable[[], object]]:
    """Return the sweeps of a backend over the logits S and T, by name."""
    spec = RowSpec(Divergence.parse(setting.divergence), difference=difference)
    rows = backends.select(backend, S.device)
    stats = rows.row_stats(S, T, spec, None, None, False)
    _, A = rows.row_dot(S, T, stats, spec, None, None)
    factor = torch.ones_like(A)
    calls = {
        "row_stats": lambda: rows.row_stats(S, T, spec, None, None, False),
        "row_dot": lambda: rows.row_dot(S, T, stats, spec, None, None),
        "row_grad_": lambda: rows.row_grad_(S, T, stats, A, factor, spec, None, None, S),
        "row_fused_": lambda: rows.row_fused_(S, T, factor, spec, None, None, False, S),
    }
    return {name: call for name, call in calls.items() if not (name == "row_dot" and spec.one_sweep)}


def predicted_ms(setting: Setting, backend: str, sweep: str, rows: int, buffer: torch.dtype) -> float | None:
    """Return the time of a fused call by the model of its machine code, in ms.

    None for other sweeps, and for GPUs and backends that the model does not know.
    """
    if setting.device != "cuda" or sweep != "row_fused_":
        return None
    device = torch.cuda.get_device_name()
    gpu = next((gpu for gpu in sweep_times.GPUS if gpu.device == device), None)
    kind = Divergence.parse(setting.divergence).kind
    made = sweep_times.predict(backend, kind, buffer, rows, setting.V, gpu) if gpu else []
    return 1e3 * made[-1].seconds if made else None


def compare_sweeps(setting: Setting, effort: Effort) -> list[Row]:
    """Time every sweep of every backend in turn with a copy of the logits."""
    buffer, difference = resolve_logits(setting.torch_dtype, "auto", setting.head == "shared")
    C, gen = min(setting.plan().rows, MOST_ROWS), torch.Generator(setting.device).manual_seed(0)
    logits = (4 * torch.randn(C, setting.V, generator=gen, device=setting.device)).to(buffer)
    other = (0.4 * torch.randn(C, setting.V, generator=gen, device=setting.device)).to(buffer)
    T = other if difference else logits + other
    S, copied = logits.clone(), torch.empty_like(logits)
    variants = {COPY: Variant(lambda: copied.copy_(logits))}
    rows: dict[str, Row] = {}
    for name in backends.NAMES:
        provider = PROVIDERS[f"opsd-{name}"]
        made = blank("sweeps", provider.name, setting, rows=C)
        reason = provider.unsupported(setting) or check(provider, setting).failure
        try:
            calls = {} if reason else sweeps_of(setting, name, S, T, difference)
        except Exception as error:
            reason = reason_of(error)
        if reason:
            rows[name] = replace(made, variant="every sweep", reason=reason)
            continue
        for sweep, call in calls.items():
            predicted = predicted_ms(setting, name, sweep, C, buffer)
            rows[f"{name} {sweep}"] = replace(made, variant=sweep, predicted_ms=predicted)
            # A sweep in place leaves gradients in S: the setup restores the logits.
            variants[f"{name} {sweep}"] = Variant(call, setup=lambda: S.copy_(logits))
    interleave(variants, COPY, setting.device, **effort)
    nbytes = logits.numel() * logits.element_size()
    done = [_timed(row, variants.get(name), variants[COPY], nbytes, setting) for name, row in rows.items()]
    del variants
    free()
    return done


def _timed(row: Row, variant: Variant | None, copy: Variant, nbytes: int, setting: Setting) -> Row:
    """Return the row with time, ratio to the copy and bandwidth, or with the reason why it has none."""
    if variant is None or variant.failure or not variant.times:
        failure = variant.failure if variant is not None else None
        return replace(row, reason=row.reason or failure or "not measured")
    sample = variant.sample()
    rate = TOUCHED[row.variant] * nbytes / (sample.median / 1e3)
    return replace(
        row,
        ms=sample,
        ratio=ratio(variant, copy),
        base=COPY,
        gbs=rate / 1e9,
        ceiling=rate / ceilings.copy_rate(setting.device),
        noise=noise(variant, copy),
    )


def sweeps(context: Context) -> list[Task]:
    """Return a task for each dtype, head and divergence."""
    wanted = [("bfloat16", "shared", "reverse_kl"), ("bfloat16", "shared", "jsd")]
    wanted += (
        []
        if context.quick
        else [
            ("bfloat16", "shared", "forward_kl"),
            ("float32", "shared", "reverse_kl"),
            ("bfloat16", "two heads", "reverse_kl"),
        ]
    )
    settings = [
        context.setting(shape, dtype, head=head, divergence=divergence)
        for shape in context.centre()
        for dtype, head, divergence in wanted
    ]
    settings = [s for s in settings if not context.dtypes or s.dtype in context.dtypes]
    return [Task(describe(s), partial(compare_sweeps, s, context.effort())) for s in settings]
