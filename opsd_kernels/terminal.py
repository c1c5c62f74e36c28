"""What every subcommand of `opsd` needs: a console, errors of one line, tables."""

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
    """Ends the command with one line on stderr."""
    typer.echo(f"opsd: error: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """The user's own mistakes end in one line; anything else keeps its traceback."""
    try:
        yield
    except errors as error:
        fail(error)


def needs_extra(extra: str, *modules: str) -> None:
    """Raises ModuleNotFoundError, with the command that installs it, for a module that is missing."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"{module} is not installed: pip install 'opsd_kernels[{extra}]'")


def new_table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(headers))
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
