"""PNG plots of a report: latency bars against the ceiling, memory against N, error against KL, roofline.

Each carries machine, versions, commit and command.
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..providers import BASE, LABELS
from .results import Report, Row

COLOURS = {
    "opsd": "#0b6e4f",
    "gemms": "#999999",
    "torch": "#c44536",
    "compiled": "#e08e45",
    "trl": "#3a6ea5",
    "liger-chunked": "#8e5ea2",
    "liger-compiled": "#b48ec4",
    "liger-triton": "#5b3758",
    "unsloth": "#b8a038",
}


def draw(report: Report, directory: Path) -> list[Path]:
    """Draw the plots for which the report has rows; return their files.

    Raises ModuleNotFoundError, with the extra to install, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("matplotlib is not installed: pip install 'opsd_kernels[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (suites, plot) in PLOTS.items():
        rows = [row for row in report.rows if row.suite in suites and row.reason is None]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        plot(axes, rows, report)
        footer = textwrap.fill(f"{report.where}; {report.command}", 150)
        figure.text(0.01, 0.005, footer, fontsize=6, color="#555555", va="bottom")
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        written.append(path)
    return written


def _by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Group rows by a key, in the order of its first appearance."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def latency_bars(axes: Any, rows: list[Row], report: Report) -> None:
    """Draw ratios to the bare GEMMs as bars with quartiles; the line at 1 is the ceiling."""
    settings = _by(rows, lambda r: f"{r.dtype}, {r.head}\n{r.mode}, {r.divergence}")
    providers = [
        name for name in LABELS if any(row.provider == name for row in rows) and name not in (BASE, "whole")
    ]
    width = 0.8 / max(1, len(providers))
    for i, provider in enumerate(providers):
        places, heights, errors = [], [], []
        for place, group in enumerate(settings.values()):
            ratio = next((r.ratio for r in group if r.provider == provider and r.ratio), None)
            if ratio:
                places.append(place + i * width - 0.4)
                heights.append(ratio.median)
                errors.append((max(0.0, ratio.median - ratio.q1), max(0.0, ratio.q3 - ratio.median)))
        if places:
            axes.bar(
                places,
                heights,
                width,
                label=LABELS[provider],
                color=COLOURS.get(provider),
                yerr=list(zip(*errors, strict=True)),
                error_kw={"lw": 0.8},
            )
    axes.axhline(1, color="black", lw=1, ls="--", label="bare GEMMs: the ceiling")
    axes.set_xticks(range(len(settings)), settings.keys(), fontsize=7)
    axes.set_ylabel("time / bare GEMMs")
    axes.set_yscale("log")
    axes.set_title("Forward and backward; lower is better")
    axes.legend(fontsize=7)


def memory_lines(axes: Any, rows: list[Row], report: Report) -> None:
    """Draw peak memory against N, with the planner's prediction for this package."""
    for (provider, dtype), group in _by(rows, lambda r: (r.provider, r.dtype)).items():
        peaks = sorted((r.N, r.peak_bytes / 2**20) for r in group if r.peak_bytes)
        axes.plot(
            [N for N, _ in peaks],
            [peak for _, peak in peaks],
            "-" if dtype == "bfloat16" else ":",
            marker="o",
            color=COLOURS.get(provider),
            label=f"{LABELS[provider]}, {dtype}",
        )
        planned = sorted(
            (r.N, r.predicted_bytes / 2**20) for r in group if r.peak_bytes and r.predicted_bytes
        )
        if planned and provider == "opsd":
            axes.plot(
                [N for N, _ in planned],
                [peak for _, peak in planned],
                "x",
                color="black",
                label=f"planner's prediction, {dtype}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak MiB above the inputs")
    axes.set_title(f"Peak memory, V={rows[0].V}, H={rows[0].H}")
    axes.legend(fontsize=7)


def _kl_of(row: Row) -> float:
    """Return the KL that suite `accuracy` wrote into the variant."""
    match = re.search(r"KL ([\d.e-]+)", row.variant)
    assert match is not None, row.variant
    return float(match[1])


def error_lines(axes: Any, rows: list[Row], report: Report) -> None:
    """Draw the error of the hidden gradient against the KL of the case."""
    chosen = [
        r
        for r in rows
        if r.dtype == "bfloat16" and r.head == "shared" and r.divergence == "reverse_kl" and r.gradient_error
    ]
    for (provider, wide), group in _by(chosen, lambda r: (r.provider, "wide" in r.variant)).items():
        points = sorted((_kl_of(r), r.gradient_error) for r in group)
        axes.plot(
            *zip(*points, strict=True),
            "--" if wide else "-",
            marker="o",
            color=COLOURS.get(provider),
            label=f"{LABELS[provider]}{', wide logits' * wide}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("KL between teacher and student, nats")
    axes.set_ylabel("relative error of the hidden gradient")
    axes.set_title("bf16, shared head, reverse KL, against float64")
    axes.legend(fontsize=7)


def roofline(axes: Any, rows: list[Row], report: Report) -> None:
    """Draw TFLOP/s by FLOP per byte of unavoidable traffic, under the measured ceilings."""
    spots = {
        provider: [(1e3 * r.tflops / r.gbs, r.tflops) for r in group if r.tflops and r.gbs]
        for provider, group in _by(rows, lambda r: r.provider).items()
    }
    intensities = [intensity for points in spots.values() for intensity, _ in points]
    low, high = min(intensities) / 4, max(intensities) * 4
    for name, rate in report.ceilings.items():
        if name.startswith("gemm "):
            copy, grid = report.ceilings["copy"], [low * (high / low) ** (i / 99) for i in range(100)]
            axes.plot(
                grid,
                [min(rate, x * copy) / 1e12 for x in grid],
                lw=1,
                label=f"ceiling, {name.removeprefix('gemm ')}",
            )
    for provider, points in spots.items():
        if points:
            color = COLOURS.get(provider)
            axes.plot(*zip(*points, strict=True), "o", ms=4, color=color, label=LABELS[provider])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of unavoidable traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Roofline")
    axes.legend(fontsize=7)


PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Any, list[Row], Report], None]]] = {
    "latency": (("ratios",), latency_bars),
    "memory": (("memory",), memory_lines),
    "accuracy": (("accuracy",), error_lines),
    "roofline": (("ratios", "latency"), roofline),
}
