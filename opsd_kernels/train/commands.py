"""The training subcommands of `opsd`.

They import torch and transformers inside, so that `opsd --help` stays quick.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import fail, needs_extra, one_line

if TYPE_CHECKING:
    from .config import TrainConfig


def train(
    config: Annotated[
        Path | None, typer.Argument(help="JSON or YAML file; without it, the defaults.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; without it, a new one under runs/.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    write_config: Annotated[
        Path | None,
        typer.Option("--write-config", help="Write the settings to this YAML file, with comments, and stop."),
    ] = None,
) -> None:
    """Train a model on its own answers.

    The teacher is the model itself with feedback on the answer in its prompt. The defaults, without CONFIG
    and --set, learn on a CPU in minutes.
    """
    if resume and out is None:
        fail("--resume: expected --out DIR, the run to continue, got none")
    claimed = out / "config.json" if resume and out is not None else None
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib")
    from .config import ConfigError, load_config
    from .types import CheckpointError, NonFiniteLoss

    with one_line(ValueError, TypeError, OSError):
        recorded = claimed if claimed is not None and claimed.is_file() else None
        parsed = load_config(config or recorded, overrides or [])
    if write_config is not None:
        write_settings(parsed, write_config)
        return
    # After the settings, so that a typo in a key is reported before transformers loads.
    from . import loop

    out = out or new_run_directory(parsed.env)
    try:
        with one_line(FileExistsError, FileNotFoundError, CheckpointError, ConfigError, NonFiniteLoss):
            loop.train(parsed, out, resume)
    except KeyboardInterrupt as interrupt:
        typer.echo(
            f"\n{str(interrupt) or 'stopped at once; the last checkpoint counts'}\n    {resume_command(out)}",
            err=True,
        )
        raise typer.Exit(128 + getattr(interrupt, "number", signal.SIGINT)) from None


def write_settings(config: TrainConfig, path: Path) -> None:
    """Write the settings to a new file.

    An existing one is never overwritten: it may hold the user's comments.
    """
    from .config.commented_file import commented_yaml

    if path.suffix not in (".yaml", ".yml"):
        fail(f"--write-config: expected a file that ends in .yaml, got {path}")
    with one_line(OSError), path.open("x", encoding="utf-8") as file:
        file.write(commented_yaml(config))
    typer.echo(path)


def new_run_directory(env_name: str) -> Path:
    """Return runs/<environment>-<time>, with a number appended if that exists."""
    stem = Path("runs") / f"{env_name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def resume_command(out: Path) -> str:
    """Return the command that resumes a run, with the program as called if `opsd` is not on the PATH."""
    program = "opsd" if shutil.which("opsd") else sys.argv[0]
    return shlex.join([program, "train", "--out", str(out), "--resume"])


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(
            help="sdpo, discovery, mopd, iw_opd, law, variance, or for hours sdpo_python or law_python."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory of the results and of the cells they are made from; a second run goes on there.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed and few steps: shows that it runs, proves nothing.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of one thread each.")] = 2,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Master seed of all base models and runs; another one reruns."),
    ] = 0,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against", help="JSON of another run of the study: how many intervals hold this run's?"
        ),
    ] = None,
) -> None:
    """Put the claims of a paper to the test on toys.

    Seeds, controls, equal budgets; a JSON, a figure and a page that says which claims held.
    """
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib", "scipy")
    from .studies import command

    name = f"reproduce-{paper}{f'-seed-{seed}' if seed else ''}{'-quick' if quick else ''}"
    with one_line(ValueError, FileNotFoundError):
        command.reproduce(paper, out or Path("runs") / name, quick, workers, sys.argv[1:], seed, against)


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run, complete or in progress.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; without it, RUN_DIR/report.html. curves.png goes beside it."),
    ] = None,
) -> None:
    """Draw the curves of a run, and a page of its curves, tables and samples.

    The page is one file without scripts or requests. The run may still be in progress.
    """
    with one_line(ModuleNotFoundError):
        needs_extra("train", "matplotlib")
    from .records import report as reports
    from .records.report_page import page

    out = out or run / "report.html"
    with one_line(OSError):
        record = reports.read_run(run)
        out.write_bytes(page(record))
        reports.draw_curves(out.with_name("curves.png"), record.metrics)
    typer.echo(f"{out}\n{out.with_name('curves.png')}")


def probe(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CONFIG]", help="JSON or YAML file; with --fit, directories of finished runs."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting. Repeatable.")
    ] = None,
    contexts: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            metavar="KIND",
            help="A kind of feedback; settings of the view after commas: none,siblings=true. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Answers per accuracy; without it, eval_samples.")
    ] = None,
    law: Annotated[
        Path | None, typer.Option("--law", help="A law that was fitted: predict the improvement.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the law to finished runs that differ in context and seeds.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the probes, or the law, here as JSON.")
    ] = None,
) -> None:
    """Measure what a context is worth before training.

    The gap is the self-teacher's accuracy minus that of a second try without the context. A law fitted to
    finished runs predicts the improvement by training from it.
    """
    if fit and (overrides or contexts or law):
        fail("--fit: expected directories of runs alone, got --set, --context or --law beside it")
    if not fit and len(paths or []) > 1:
        fail(f"CONFIG: expected one file, got {len(paths or [])}; directories of runs go with --fit")
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib", "scipy")
    from .config import load_config
    from .studies import probe as probing

    with one_line(ValueError, TypeError, OSError):
        if fit:
            probing.fit_command(paths or [], samples, out)
        else:
            config = load_config(paths[0] if paths else None, overrides or [])
            configs = [probing.with_context(config, text) for text in contexts or []] or [config]
            probing.probe_command(configs, samples, law, out)


def discover(
    config: Annotated[
        Path | None,
        typer.Argument(help="JSON or YAML file; without it, the environment mastermind unless --set says."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting. Repeatable.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, help="How many held-out questions.")] = 24,
    below: Annotated[
        float,
        typer.Option(
            "--below",
            help="Only questions that one attempt of the base model solves with a chance below this.",
        ),
    ] = 0.01,
    attempts: Annotated[
        int,
        typer.Option("--attempts", min=1, help="Answers to a question that each method may have verified."),
    ] = 256,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Attempts that an optimisation step learns from.")
    ] = 8,
    window: Annotated[
        int, typer.Option("--window", min=1, help="Past failures that the multi-turn prompt shows.")
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory of the results; without it, a new one under runs/."),
    ] = None,
) -> None:
    """Search for first right answers at test time.

    The model learns from the feedback on its failures at one hard question. Best-of-k and a multi-turn prompt
    get as many attempts.
    """
    with one_line(ModuleNotFoundError):
        needs_extra("train", "transformers", "safetensors", "matplotlib")
    from .config import ConfigError, load_config
    from .types import NonFiniteLoss

    with one_line(ValueError, TypeError, OSError):
        parsed = load_config(config, [*([] if config else ["env=mastermind"]), *(overrides or [])])
    from .studies import discover_run

    budget = discover_run.Budget(attempts, batch, window)
    try:
        with one_line(FileExistsError, ConfigError, ValueError, NonFiniteLoss):
            discover_run.discover(
                parsed, out or new_run_directory(f"discover-{parsed.env}"), questions, below, budget
            )
    except KeyboardInterrupt:
        typer.echo("\nstopped; a search is not resumed", err=True)
        raise typer.Exit(130) from None


ALL = (train, report, reproduce, probe, discover)
