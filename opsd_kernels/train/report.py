"""What is left of a run for the eye: curves.png and the closing table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opsd_kernels.train.types import StepMetrics

PANELS = (
    ("accuracy", ("reward", "held_out_accuracy", "self_teacher_accuracy", "untrained_skill")),
    ("divergence, nats", ("divergence", "divergence_p95")),
    ("entropy, nats", ("student_entropy", "teacher_entropy")),
    ("sampled log-prob gap, nats", ("sampled_logprob_gap",)),
)


def draw_curves(path: Path, metrics: list[StepMetrics]) -> None:
    """Four panels over the steps. A value that only some steps have is drawn as points with a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            if points:
                sparse = len(points) < len(metrics) / 2
                axes.plot(*zip(*points, strict=True), marker="o" if sparse else None, linewidth=1.2, label=name.replace("_", " "))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def print_table(console: Console, summary: dict[str, Any], out: Path) -> None:
    """Before and after, in percent, and where everything lies."""
    table = Table(title=f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    rows = (
        ("held-out accuracy", "held_out_accuracy_before", "held_out_accuracy_after"),
        ("self-teacher, with its context", "self_teacher_accuracy_before", "self_teacher_accuracy_after"),
        ("untrained skill", "untrained_skill_before", "untrained_skill_after"),
    )
    for label, before, after in rows:
        if summary[before] is not None:  # an environment without an untrained skill
            table.add_row(label, f"{summary[before]:.1%}", f"{summary[after]:.1%}")
    console.print(table)
    for name in ("summary.json", "metrics.jsonl", "curves.png", "checkpoint"):
        console.print(f"{out / name}", soft_wrap=True)
