"""The subcommands of `opsd` that train. torch and transformers are imported inside them, so that `opsd --help` stays quick."""

from __future__ import annotations

import shlex
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import fail, needs_extra, one_line


def train(
    config: Annotated[Path | None, typer.Argument(help="JSON or YAML file; without it, the defaults.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory; without it, a new one under runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a model on its own answers.

    The teacher is the model itself, with feedback on the answer in view. Without CONFIG and --set, the defaults learn on a CPU in minutes.
    """
    if resume and out is None:
        fail("--resume: expected --out DIR, the run to continue, got none")
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib")
    from .config import ConfigError, load_config
    from .types import CheckpointError, NonFiniteLoss

    with one_line(ValueError, TypeError, OSError):
        recorded = out / "config.json" if resume and (out / "config.json").is_file() else None
        parsed = load_config(config or recorded, overrides or [])
    from . import loop  # after the settings: a typo in a key need not wait for transformers

    out = out or new_run_directory(parsed.env)
    try:
        with one_line(FileExistsError, FileNotFoundError, CheckpointError, ConfigError, NonFiniteLoss):
            loop.train(parsed, out, resume)
    except KeyboardInterrupt as interrupt:
        typer.echo(f"\n{str(interrupt) or 'stopped at once; the last checkpoint counts'}\n    {resume_command(out)}", err=True)
        raise typer.Exit(130) from None


def new_run_directory(env_name: str) -> Path:
    """runs/<environment>-<time>; a second run in the same second gets a number."""
    stem = Path("runs") / f"{env_name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def resume_command(out: Path) -> str:
    """What to type to go on; the program as it was called, since .venv/bin need not be on the PATH."""
    program = "opsd" if shutil.which("opsd") else sys.argv[0]
    return shlex.join([program, "train", "--out", str(out), "--resume"])


def reproduce(
    paper: Annotated[str, typer.Argument(help="sdpo, discovery, mopd, iw_opd or law.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory of the results and of the cells they are made from; a second run goes on there.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and few steps: shows that it runs, proves nothing.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """Put the claims of a paper to the test on toys.

    Seeds, controls, equal budgets; a JSON, a figure and a page that says which claims held.
    """
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib", "scipy")
    from .reproduce import command

    out = out or Path("runs") / f"reproduce-{paper}{'-quick' if quick else ''}"
    with one_line(ValueError):
        command.reproduce(paper, out, quick, workers, sys.argv[1:])


ALL = (train, reproduce)
