"""Where a run writes: a live bar on a terminal and plain lines otherwise, metrics.jsonl, TensorBoard if it is installed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from opsd_kernels.train.types import StepMetrics

LINE_EVERY_SECONDS = 10.0


class Progress:
    """Speaks to the user. On a terminal a bar follows the work; elsewhere a line every ten seconds."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int | None, start: int = 0) -> Iterator[PlainBar | LiveBar]:
        """Work of `total` steps; None where nobody knows how many it will be."""
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
    """A line every ten seconds, and one at the end: a log file should not grow by a line a step."""

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
    """A bar with the latest values behind it."""

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
    """metrics.jsonl, one object a step, and samples.jsonl. `offset` is where a checkpoint ends: what a killed run wrote after it is cut off."""

    def __init__(self, path: Path, offset: int = 0):
        path.touch()
        # A kill may have left lines of steps that will be made again, or half a line.
        os.truncate(path, min(offset, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Puts every line on the disk; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class Scalars:
    """The numbers of each step for TensorBoard; nothing where it is switched off or not installed. An earlier process's from `first_step` on are hidden."""

    def __init__(self, folder: Path, wanted: bool, first_step: int):
        self._writer = None
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
            # One event a step: add_scalar makes one of each number, .9 ms instead of .09.
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            self._writer.file_writer.add_summary(self._summary(value=values), metrics["step"])

    def flush(self) -> None:
        """The writer keeps up to two minutes in memory: a run that is killed would lack them up to its checkpoint, and no later process writes those steps."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """Its complete lines: the last one of a run in progress may be half there."""
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def offset_after(path: Path, step: int) -> int:
    """Length in bytes of the lines up to `step`, of a file whose lines carry their steps in order; 0 for a file that is not there."""
    offset = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        offset += len(line)
    return offset
