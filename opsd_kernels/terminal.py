"""Shared by the subcommands of `opsd`: a console, one-line errors, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


def fail(message: object, code: int = 2) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"opsd: error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """Turn `errors`, the user's mistakes, into one line on stderr; other exceptions keep their traceback."""
    try:
        yield
    except errors as error:
        fail(error)


def needs_extra(extra: str, *modules: str) -> None:
    """Raise ModuleNotFoundError, with the command that installs it, for the first missing module."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"{module} is not installed: pip install 'opsd_kernels[{extra}]'")


def new_table(title: str, *headers: str) -> Table:
    """Return an empty table; empty headers are not shown."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
