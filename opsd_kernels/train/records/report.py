"""Read the record of a run from its directory, draw curves.png and print the final table.

The page: report_page.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opsd_kernels.train.records.log import read_metrics
from opsd_kernels.train.types import StepMetrics

PANELS = (
    ("accuracy", ("reward", "held_out_accuracy", "self_teacher_accuracy", "untrained_skill")),
    ("divergence, nats", ("divergence", "divergence_p95")),
    ("entropy, nats", ("student_entropy", "teacher_entropy")),
    ("sampled log-prob gap, nats", ("sampled_logprob_gap",)),
    ("shares", ("groups_with_success", "samples_in_loss", "top1_agreement", "gradient_dropped")),
    ("sampled tokens per second", ("tokens_per_second",)),
)
MEASURED = (
    ("held-out accuracy", "held_out_accuracy"),
    ("self-teacher, with its context", "self_teacher_accuracy"),
    ("untrained skill", "untrained_skill"),
)


@dataclass(frozen=True)
class Record:
    """The contents of a run's directory, complete or in progress."""

    name: str
    config: dict[str, Any]
    metrics: list[StepMetrics]
    samples: list[dict[str, Any]]
    facts: dict[str, Any]  # of summary.json; of the newest checkpoint for a run in progress
    complete: bool

    def before(self, name: str) -> float | None:
        return self.facts.get(f"{name}_before")

    def after(self, name: str) -> tuple[float | None, int]:
        """Return the value and its step: at the end, or of the latest probe of a run in progress."""
        if self.complete:
            return self.facts.get(f"{name}_after"), self.facts["steps"]
        return next(
            ((line[name], line["step"]) for line in reversed(self.metrics) if line.get(name) is not None),
            (None, 0),
        )


def read_run(folder: Path, summary: dict[str, Any] | None = None) -> Record:
    """Read a run's directory; `summary` replaces a summary.json that is not written yet.

    Raises FileNotFoundError for a directory without a run.
    """
    config, written = folder / "config.json", folder / "summary.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"RUN_DIR: expected the directory of a run, got {folder}, which holds no config.json"
        )
    if summary is None and written.is_file():
        summary = json.loads(written.read_text())
    lines = {
        name: read_metrics(folder / name) if (folder / name).is_file() else []
        for name in ("metrics.jsonl", "samples.jsonl")
    }
    facts = newest_facts(folder / "checkpoint") if summary is None else summary
    return Record(
        folder.resolve().name,
        json.loads(config.read_text()),
        lines["metrics.jsonl"],
        lines["samples.jsonl"],
        facts,
        summary is not None,
    )


def newest_facts(checkpoints: Path) -> dict[str, Any]:
    """Return the measurements before training from the newest checkpoint; empty without a checkpoint."""
    records = sorted(
        checkpoints.glob("step_*/state.json"), key=lambda path: int(path.parent.name.removeprefix("step_"))
    )
    return json.loads(records[-1].read_text())["facts"] if records else {}


def points_of(metrics: list[StepMetrics], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of the lines that have the value."""
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def draw_curves(path: Path, metrics: list[StepMetrics]) -> None:
    """Draw a panel for each of PANELS over the steps. A value of few steps is drawn as points with a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            points = points_of(metrics, name)
            if points:
                sparse = len(points) < len(metrics) / 2
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o" if sparse else None,
                    linewidth=1.2,
                    label=name.replace("_", " "),
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def print_table(console: Console, summary: dict[str, Any], out: Path) -> None:
    """Print the accuracies, the interval of the gain, the peak memory and the paths of the run's files."""
    table = Table(title=f"{summary['steps']} steps in {summary['seconds']:.0f} s")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for label, name in MEASURED:
        # None in an environment without an untrained skill.
        if summary[f"{name}_before"] is not None:
            table.add_row(label, f"{summary[f'{name}_before']:.1%}", f"{summary[f'{name}_after']:.1%}")
    console.print(table)
    low, high = summary["held_out_gain_interval"]
    memory = summary["peak_memory_bytes"]
    console.print(
        f"held-out accuracy: {low:+.1%} to {high:+.1%} at 95 %"
        + ("" if memory is None else f"; peak memory {memory / 2**30:.1f} GiB")
    )
    for name in ("summary.json", "metrics.jsonl", "samples.jsonl", "curves.png", "report.html", "checkpoint"):
        console.print(f"{out / name}", soft_wrap=True)
