"""`opsd bench` after its options are parsed: progress, tables, files."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from .. import env
from . import runner
from .measure import profiling
from .measure.context import Context
from .report import compare, plots, tables
from .report.results import Report, load

# Environment variables that change the measurement: part of the command that repeats it.
VARIABLES = (
    "OMP_NUM_THREADS",
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
    "CUBLAS_WORKSPACE_CONFIG",
    *(variable.name for variable in env.VARIABLES),
)

OUTPUTS = ("--json", "--plots")


def without_outputs(arguments: list[str]) -> list[str]:
    """Return the arguments without the files that are written, which are not part of the measurement."""
    kept = [
        a
        for before, a in zip(["", *arguments], arguments, strict=False)
        if before not in OUTPUTS and a not in OUTPUTS
    ]
    return [a for a in kept if not a.startswith(tuple(f"{name}=" for name in OUTPUTS))]


@contextmanager
def shown_progress() -> Iterator[runner.Progress]:
    """Yield a progress callback: a bar on a terminal, otherwise one line for each comparison.

    It writes to stderr, so that the table can be piped.
    """
    errors = Console(stderr=True, highlight=False)
    if not runner.on_a_terminal():
        began = time.monotonic()
        yield lambda label, done, total: errors.print(
            f"{time.monotonic() - began:4.0f} s, {done}/{total} done; {label}", soft_wrap=True
        )
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


def show(table: tables.Table, console: Console) -> None:
    """Print a table. On a terminal rich folds wide ones; in a pipe they keep their width."""
    out = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        out.add_column(column, overflow="fold")
    for row in table.rows:
        out.add_row(*row)
    console.print(out)


def bench(
    suites: list[str],
    context: Context,
    path: Path | None,
    plots_dir: Path | None,
    arguments: list[str],
    commit: str | None,
) -> Report:
    """Run the suites, print their tables, and write the report to `path` and plots to `plots_dir`."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    command = shlex.join([*variables, "opsd", "bench", *without_outputs(arguments)])
    with shown_progress() as progress:
        report = runner.run(suites, context, command, progress, commit, path)
    console = Console(highlight=False) if runner.on_a_terminal() else Console(highlight=False, width=240)
    for suite in report.suites:
        table = tables.table(suite, report.rows)
        if table.rows:
            show(table, console)
    noisy = sum(row.noise is not None for row in report.rows)
    mark = f"; {noisy} ratios marked {tables.NOISY_MARK} are not known within 10 %" if noisy else ""
    console.print(f"{report.where}\n{report.command}: {report.seconds:.0f} s, {len(report.rows)} rows{mark}")
    if path is not None:
        console.print(f"wrote {path}")
    for file in plots.draw(report, plots_dir) if plots_dir is not None else ():
        console.print(f"wrote {file}")
    return report


def profile(context: Context, directory: Path) -> None:
    """Trace each setting, and print where its time goes."""
    console = Console(highlight=False)
    for setting in profiling.settings(context):
        trace, table = profiling.profile(setting, directory)
        show(table, console)
        console.print(f"wrote {trace}")


def compare_files(before: Path, after: Path) -> bool:
    """Print the changes between two reports; return whether there is a regression."""
    console = Console(highlight=False)
    old, new = load(before), load(after)
    for note in compare.comparable(old, new):
        console.print(f"note: {note}")
    changes = compare.changes_of(old, new)
    if changes:
        show(compare.change_table(changes), console)
    matched = len({row.key for row in old.rows} & {row.key for row in new.rows})
    worse = [change for change in changes if change.bad]
    console.print(
        f"{matched} rows compared, {len(worse)} worse, {len(changes) - len(worse)} otherwise changed"
    )
    return bool(worse)
