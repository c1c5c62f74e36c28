"""The `opsd` command, one function per subcommand.

torch and transformers are imported inside them, so that `opsd --help` stays quick.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer

    from .terminal import console, new_table, one_line
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"opsd: error: the command line needs {missing.name}: pip install 'opsd_kernels[cli]' "
        "(or [train] for opsd train)"
    ) from None

from .train import commands
from .version import __version__

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)

MOST_THREADS = 4096  # torch does not survive a hundred thousand
BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
PLAN_LABELS = {
    "rows": "rows per chunk",
    "part_rows": "rows projected at once",
    "difference": "difference GEMM",
    "centred": "logits relative to a constant of their row",
    "passes": "GEMM passes",
    "flops": "work",
    "workspace_bytes": "logit buffers, packed rows",
    "scratch_bytes": "scratch of the math library",
    "accumulator_bytes": "fp32 gradient of the head",
    "gradient_bytes": "gradients returned",
    "vector_bytes": "losses and statistics",
    "peak_bytes": "peak above the inputs",
    "sweep_bytes": "traffic of the logits",
    "head_bytes": "traffic of the head's gradient",
    "tile_share": "GEMM waves filled",
}


def main() -> None:
    """Run the command."""
    app(prog_name="opsd")


def print_version(value: bool) -> None:
    """Print the version and end the command, for `--version`."""
    if value:
        typer.echo(f"opsd_kernels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused loss head for on-policy self-distillation.

    The trainer and its experiments, the planner, benchmarks and a check of this machine.
    """


for command in commands.ALL:
    app.command()(command)


# ---------------------------------------------------------------- plan


@app.command()
def plan(
    tokens: Annotated[int, typer.Option("--tokens", "-N", help="Valid tokens in one call.")] = 8192,
    vocab: Annotated[int, typer.Option("--vocab", "-V", help="Rows of the LM head.")] = 151936,
    hidden: Annotated[int, typer.Option("--hidden", min=1, help="Hidden size of the student.")] = 4096,
    teacher_hidden: Annotated[
        int | None, typer.Option("--teacher-hidden", min=1, help="Hidden size of the teacher, if another.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16, float32 or float64.")
    ] = "bfloat16",
    shared_head: Annotated[
        bool, typer.Option("--shared-head/--two-heads", help="Whether both sides share one head.")
    ] = True,
    frozen: Annotated[bool, typer.Option("--frozen", help="The head gets no gradient.")] = False,
    workspace: Annotated[str | None, typer.Option("--workspace", help="Byte budget, such as 256MiB.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    divergence: Annotated[
        str, typer.Option("--divergence", help="All KLs need one sweep less, tvd takes fp32 logits.")
    ] = "reverse_kl",
    softcap: Annotated[bool, typer.Option("--softcap/--no-softcap", help="Logits have a softcap.")] = False,
    factor: Annotated[float, typer.Option("--factor", help="The larger logit scale / temperature.")] = 1.0,
    gradient_tolerance: Annotated[float | None, typer.Option(min=0, max=1, help="Share left out.")] = None,
    student_rank: Annotated[int, typer.Option("--student-rank", min=0, help="Rank of its adapter.")] = 0,
    teacher_rank: Annotated[int, typer.Option("--teacher-rank", min=0, help="Rank of its adapter.")] = 0,
    teacher_vocab: Annotated[int | None, typer.Option(help="Its head's rows, if --vocab are ids.")] = None,
    student_head: Annotated[str, typer.Option(help="whole, sliced (of another dtype), quantised.")] = "whole",
    teacher_head: Annotated[str, typer.Option(help="The same, of the teacher's.")] = "whole",
    teacher_dtype: Annotated[str | None, typer.Option(help="Of the teacher's products, if another.")] = None,
    listed: Annotated[
        int, typer.Option("--listed", min=0, help="Plan linear_topk with that many tokens per position.")
    ] = 0,
    vocab_ranks: Annotated[
        int, typer.Option("--vocab-ranks", min=1, help="Ranks that share the head: the plan is one rank's.")
    ] = 1,
    data_ranks: Annotated[
        int, typer.Option("--data-ranks", min=1, help="Ranks that share the tokens: the plan is one rank's.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory and work of one call.

    Chunks, buffers, peak, floating-point operations and memory traffic of linear_divergence at the given
    sizes; of a GPU's row kernels the launch, and the time by a model of their machine code. Runs nothing.
    """
    from . import plan as make_plan
    from .doctor import row_kernels
    from .spec import Divergence, check_number

    with one_line(ValueError, TypeError):
        budget = None if workspace is None else parse_bytes(workspace)
        kind = Divergence.parse(divergence)
        tokens, vocab = -(-tokens // data_ranks), -(-vocab // vocab_ranks)  # the largest share of a rank
        form = teacher_form(teacher_head, teacher_vocab, vocab, vocab_ranks > 1 or listed > 0)
        made = make_plan(
            tokens,
            vocab,
            hidden,
            0 if listed else teacher_hidden,
            parse_dtype(dtype),
            shared_head=shared_head and teacher_vocab is None,
            heads=(student_head, form),
            teacher_dtype=None if teacher_dtype is None else parse_dtype(teacher_dtype, "--teacher-dtype"),
            trainable_head=not frozen,
            workspace_bytes=budget,
            device_type=parse_device(device),
            logits_dtype="float32" if kind.kinked or listed else "auto",
            grad=not listed,
            listed=listed,
            one_sweep=kind.one_sweep,
            softcap=softcap,
            factor=check_number("--factor", factor, positive=True),
            gradient_tolerance=gradient_tolerance,
            ranks=(student_rank, teacher_rank),
        )
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=2))
        return
    kernels = row_kernels(tokens, vocab, made.logits_dtype, kind) if tokens and device == "cuda" else {}
    show_plan("linear_topk" if listed else "linear_divergence", made.as_dict(), kernels)


def teacher_form(form: str, rows: int | None, vocab: int, other: bool) -> str:
    """Return how a call reads a teacher's head of `rows`, None for as many as the student's `vocab`.

    `other` options have no ids.
    """
    from .spec import expect

    if rows is None:
        return form
    expect(not other, "--teacher-vocab", "no --vocab-ranks and no --listed", "one of them")
    expect(rows >= vocab, "--teacher-vocab", f"at least --vocab, {vocab}", rows)
    return "sliced" if form == "whole" else form


def show_plan(op: str, fields: dict[str, object], kernels: dict[str, str]) -> None:
    """Print a plan, and the texts of a GPU's row kernels, as a table."""
    table = new_table(f"{op}, predicted", "", "")
    for name, value in fields.items():
        if name == "tile_share" and not fields["tokens"]:
            continue  # of no products
        table.add_row(PLAN_LABELS.get(name, name.replace("_", " ")), readable(name, value))
    for name, text in kernels.items():
        table.add_row(name, text)
    console.print(table)


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 268435456, 256MiB or 1.5GiB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in BYTE_UNITS:
        raise ValueError(
            f"--workspace: expected a number of bytes such as 268435456, 256MiB or 1.5GiB, got {text!r}"
        )
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def parse_dtype(text: str, option: str = "--dtype") -> Any:
    """Return the torch dtype of a name."""
    import torch

    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    name = names.get(text, text)
    if name not in names.values():
        raise ValueError(f"{option}: expected one of {', '.join(names.values())}, got {text!r}")
    return getattr(torch, name)


def parse_device(text: str) -> str:
    """Return the device type, checked."""
    if text not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {text!r}")
    return text


def readable(name: str, value: object) -> str:
    """Return a field of the plan with a unit that its name implies."""
    if name.endswith("_bytes") and isinstance(value, int):
        unit, size = next(
            ((u, s) for u, s in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)) if value >= s),
            ("B", 1),
        )
        return f"{value / size:.4g} {unit}"
    if name == "tile_share":
        return f"{value:.1%}"
    if name == "flops" and isinstance(value, int):
        return f"{value / 1e12:.4g} TFLOP"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---------------------------------------------------------------- bench

bench_app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.add_typer(bench_app, name="bench", invoke_without_command=True)


@bench_app.callback()
def bench(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="ratios, latency, memory, accuracy, masked, weights, sparse, logprobs, forms, heads, "
            "sweeps, scaling, step.",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="A head such as qwen3-8b, or N=1024,H=512,V=32000. Repeatable."),
    ] = None,
    providers: Annotated[
        list[str] | None,
        typer.Option("--provider", help="opsd, torch, compiled, trl, liger-chunked, ... Repeatable."),
    ] = None,
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Repeatable.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; default: cuda if available.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller sizes, fewer rounds: minutes instead of half an hour.")
    ] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Write PNG plots into this directory.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile", help="Instead of measuring, write a torch.profiler trace into this directory."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=MOST_THREADS, help="CPU threads.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit to record in a copy without git.")
    ] = None,
) -> None:
    """Measure time, memory and accuracy, beside the other libraries that are installed.

    Runs all suites without --suite. Every number is checked for a correct result first; a row without a
    number gives the reason.
    """
    if context.invoked_subcommand is not None:
        return
    import torch

    from .bench import command, runner

    if threads is not None:
        torch.set_num_threads(threads)
    with one_line(ValueError, ModuleNotFoundError):
        chosen = runner.make_context(device, quick, shapes, providers, dtypes)
        if profile is not None:
            command.profile(chosen, profile)
        else:
            command.bench(suites or list(runner.SUITES), chosen, as_json, plots, sys.argv[2:], commit)


@bench_app.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="Report of the older run.")],
    after: Annotated[Path, typer.Argument(help="Report of the newer run.")],
) -> None:
    """List what got slower, larger or less exact between two reports, beyond their noise.

    Exits with status 1 if there is a regression.
    """
    from .bench import command

    with one_line(ValueError, OSError):
        worse = command.compare_files(before, after)
    raise typer.Exit(1 if worse else 0)


# ---------------------------------------------------------------- doctor


@app.command()
def doctor() -> None:
    """Show what is usable on this machine.

    Versions, devices, row backends with the reasons of those that cannot serve, environment variables in
    force.
    """
    from .doctor import sections

    for title, headers, rows in sections():
        table = new_table(title, *headers)
        for row in rows:
            table.add_row(*row)
        console.print(table)
