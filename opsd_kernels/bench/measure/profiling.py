"""Where the op's time goes: a torch.profiler trace, and a table by kind of work."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from ..providers import PROVIDERS, stepper
from ..report.tables import Table
from ..shapes import Setting, make_case
from .context import Context, describe

WARM_UP, STEPS = 2, 3
# By the name of a kernel on CUDA, of an operator on a CPU; the first match counts.
KINDS = (
    ("GEMMs", re.compile(r"gemm|::mm|addmm|matmul|cutlass|nvjet|cublas|sm\d+_xmma", re.I)),
    ("row sweeps", re.compile(r"row_(stats|dot|grad|fused)|_row_|sweep", re.I)),
    (
        "copies and fills",
        re.compile(r"copy|_to_copy|fill|zero|memcpy|memset|::index|gather|scatter|cat", re.I),
    ),
    ("the op itself", re.compile(r"opsd_kernels::linear_divergence|WeightedSum|PerRow", re.I)),
)
OTHER = "other operators"


def kind_of(name: str) -> str:
    """Return the kind of work of a kernel or operator."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), OTHER)


def settings(context: Context) -> list[Setting]:
    """Return the settings that `--profile` traces."""
    dtypes = context.chosen_dtypes("bfloat16")
    return [context.setting(shape, dtype) for shape in context.headline() for dtype in dtypes]


def profile(setting: Setting, directory: Path, provider: str = "opsd") -> tuple[Path, Table]:
    """Write the trace of a few steps; return its file and the time of one step by kind.

    On a CPU, GEMMs that the op calls in the math library itself count as the op's.
    """
    step = stepper(PROVIDERS[provider].make(setting), make_case(setting), setting)
    for _ in range(WARM_UP):
        step()
    on_cuda = setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    directory.mkdir(parents=True, exist_ok=True)
    trace = directory / f"trace-{setting.N}x{setting.H}x{setting.V}-{setting.dtype}.json.gz"
    profiler.export_chrome_trace(str(trace))
    return trace, _table(profiler, setting)


def _table(profiler: torch.profiler.profile, setting: Setting) -> Table:
    """Sum the profiler's self times by kind of work."""
    calls: Counter[str] = Counter()
    micros: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # by kind and name
    for event in profiler.key_averages():
        on_device = setting.device == "cuda"
        if on_device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # an operator's device time is that of its kernels, which have rows of their own
        kind = kind_of(event.key)
        calls[kind] += event.count
        micros[kind][event.key] += event.self_device_time_total if on_device else event.self_cpu_time_total
    spent = {kind: sum(names.values()) for kind, names in micros.items()}
    total = sum(spent.values()) or 1.0
    rows = []
    for kind in sorted(spent, key=lambda kind: spent[kind], reverse=True):
        largest = max(micros[kind], key=lambda name: micros[kind][name])
        time, share = f"{spent[kind] / STEPS / 1e3:.3g}", f"{spent[kind] / total:.0%}"
        rows.append([kind, time, share, str(calls[kind] // STEPS), largest[:80]])
    return Table(f"Where a step goes: {describe(setting)}", ["kind", "ms", "share", "calls", "mostly"], rows)
