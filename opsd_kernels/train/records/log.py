"""Report a run in progress: a live bar or plain lines, metrics.jsonl, and TensorBoard if installed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from opsd_kernels.train.types import StepMetrics

LINE_EVERY_SECONDS = 10.0


class Progress:
    """Messages to the user. On a terminal a bar shows the progress; elsewhere a line every ten seconds."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int | None, start: int = 0) -> Iterator[PlainBar | LiveBar]:
        """Show the progress of `total` steps, None for an unknown number."""
        if not self.console.is_terminal:
            yield PlainBar(self, title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console) as live:
            yield LiveBar(live, live.add_task(title, total=total, completed=start, values=""))


class PlainBar:
    """A line every ten seconds, and one at the end: a log file must not grow by a line per step."""

    def __init__(self, progress: Progress, title: str, total: int | None):
        self._progress, self._title, self._total = progress, title, total
        self._last = -math.inf

    def update(self, done: int, **values: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SECONDS or done == self._total:
            self._last = now
            of = "" if self._total is None else f"/{self._total}"
            self._progress.say(f"{self._title} {done}{of}  {describe(values)}")


class LiveBar:
    """A bar followed by the latest values."""

    def __init__(self, live: RichProgress, task: TaskID):
        self._live, self._task = live, task

    def update(self, done: int, **values: float | None) -> None:
        self._live.update(self._task, completed=done, values=describe(values))


def describe(values: dict[str, float | None]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in values.items())


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


class MetricsLog:
    """An appended JSONL file: metrics.jsonl, with one object per step, or samples.jsonl.

    `offset` is the length at the checkpoint; lines that a killed run wrote after it are cut off.
    """

    def __init__(self, path: Path, offset: int = 0):
        path.touch()
        # A kill may have left lines of steps that will be repeated, or half a line.
        os.truncate(path, min(offset, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush every line to the disk; return the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    """Return `value` with null for infinities and NaN, which JSON lacks.

    A divergence may be infinite at a token that weights or a clip keep out of the loss.
    """
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Scalars:
    """The numbers of each step for TensorBoard; a no-op if it is switched off or not installed.

    Numbers of an earlier process from `first_step` on are hidden.
    """

    def __init__(self, folder: Path, wanted: bool, first_step: int):
        self._writer: Any = None
        if not wanted:
            return
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer, self._summary = SummaryWriter(str(folder), purge_step=first_step), Summary

    def write(self, metrics: StepMetrics) -> None:
        if self._writer is not None:
            numbers = {
                name: value
                for name, value in metrics.items()
                if isinstance(value, (int, float)) and name != "step"
            }
            # One event per step: add_scalar makes one per number, .9 ms instead of .09.
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            self._writer.file_writer.add_summary(self._summary(value=values), metrics["step"])

    def flush(self) -> None:
        """Write out the events that TensorBoard's writer keeps in memory for up to two minutes.

        Without this a killed run would lack those before its checkpoint, and no later process repeats their
        steps.
        """
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """Read the complete lines of a file: the last one of a run in progress may be partial."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def offset_after(path: Path, step: int) -> int:
    """Return the length in bytes of a file's lines up to `step`; 0 for a missing file.

    Lines are in order of steps.
    """
    offset = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        offset += len(line)
    return offset
