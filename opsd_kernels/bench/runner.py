"""The engine behind `opsd bench`: runs suites task by task and collects their rows into a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..spec import check_choice, expect
from .measure import ceilings
from .measure.context import Context, Task, free
from .providers import parse_providers
from .report.results import Report, new_report
from .shapes import DEVICES, parse_shape
from .suites.accuracy import accuracy
from .suites.forms import forms
from .suites.heads import heads
from .suites.latency import latency, masked, ratios
from .suites.logprobs import logprobs
from .suites.space import memory_suite, scaling
from .suites.sparse import sparse
from .suites.step import step
from .suites.sweeps import sweeps
from .suites.weights import weights

SUITES: dict[str, Callable[[Context], list[Task]]] = {
    "ratios": ratios,
    "latency": latency,
    "memory": memory_suite,
    "accuracy": accuracy,
    "masked": masked,
    "weights": weights,
    "sparse": sparse,
    "logprobs": logprobs,
    "forms": forms,
    "heads": heads,
    "sweeps": sweeps,
    "scaling": scaling,
    "step": step,
}
DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[str, int, int], None]  # (label of the running task, tasks done, number of tasks)


def make_context(
    device: str | None = None,
    quick: bool = False,
    shapes: list[str] | None = None,
    providers: list[str] | None = None,
    dtypes: list[str] | None = None,
) -> Context:
    """Check the options. Raises ValueError for an unknown name or a device that the machine lacks."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_choice("device", device, DEVICES)
    expect(
        device == "cpu" or torch.cuda.is_available(),
        "device",
        "'cpu' on a machine without a usable NVIDIA GPU",
        repr(device),
    )
    for dtype in dtypes or ():
        check_choice("dtype", dtype, DTYPES)
    chosen = tuple(parse_shape(text) for text in shapes or ())
    return Context(device, quick, tuple(parse_providers(providers, quick)), chosen, tuple(dtypes or ()))


def run(
    suites: list[str],
    context: Context,
    command: str,
    progress: Progress | None = None,
    commit: str | None = None,
    path: Path | None = None,
) -> Report:
    """Run `suites`; the report is also written to `path` after each task.

    An exception of a provider becomes a row; one of a task itself is raised.
    """
    for name in suites:
        check_choice("suite", name, tuple(SUITES))
    report = new_report(context.device, command, context.quick, suites, commit)
    began = time.monotonic()
    tasks = [task for name in suites for task in SUITES[name](context)]
    for i, task in enumerate(tasks):
        if progress is not None:
            progress(task.label, i, len(tasks))
        report.rows += task.run()
        report.seconds = round(time.monotonic() - began, 1)
        if path is not None:
            report.save(path)
        free()
    for dtype in sorted({row.dtype for row in report.rows if row.ms is not None}):
        report.ceilings[f"gemm {dtype}"] = ceilings.gemm_rate(getattr(torch, dtype), context.device)
    report.ceilings["copy"] = ceilings.copy_rate(context.device)
    report.seconds = round(time.monotonic() - began, 1)
    if path is not None:
        report.save(path)
    if progress is not None:
        progress("done", len(tasks), len(tasks))
    return report


def on_a_terminal() -> bool:
    """Return whether stderr is a terminal."""
    return sys.stderr.isatty()
