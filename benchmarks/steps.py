"""Time and peak memory of a library's loss beside ours, at the vocabulary of Qwen2.5.

The engine of trl_steps.py, liger_steps.py and verl_steps.py. Each row is one process that holds both sides
and runs their steps in turn on one batch, so that other load on the machine affects both; each peak is
measured in a process of its own. A step is the loss and its backward pass; the optimiser is the library's on
both sides. Both losses are compared with the library's own in fp32 on the same weights; ours is not timed if
it is off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import report_json
from opsd_kernels.bench.report.results import script_report
from opsd_kernels.terminal import console, new_table
from opsd_kernels.testing import TARGETS, peak_bytes

V, HIDDEN, SEQUENCES, PROMPT = 151_936, 256, 4, 32
OURS = "opsd"

# Takes (row, side, dtype, folder, fp32). Returns the parameters that get gradients, and a function from a
# number of tokens to the loss of one batch. With `fp32` the weights are those of `dtype`, widened to fp32.
Build = Callable[[str, str, str, str, bool], tuple[list[Tensor], Callable[[int], Callable[[], Tensor]]]]


@dataclass(frozen=True)
class Integration:
    """A library whose loss is compared with ours."""

    side: str  # the library's name in reports
    label: str
    rows: dict[str, str]  # name of a measurement, and its loss
    build: Build
    # Tokens of the warm-up step before the measured peak; None: as many as in the measured step.
    warm_tokens: int | None = 4
    versions: dict[str, str] = field(default_factory=dict)  # beyond those that are installed


def lengths(tokens: int) -> Tensor:
    """Shape (SEQUENCES,): completion lengths of 1, 1/2, 3/4 and 1 times `tokens`."""
    return torch.tensor([tokens, tokens // 2, 3 * tokens // 4, tokens])


def stepper(
    built: tuple[list[Tensor], Callable[[int], Callable[[], Tensor]]], tokens: int
) -> Callable[[], Tensor]:
    """Return a step that clears gradients, computes the loss and runs backward."""
    parameters, losses = built
    loss_of = losses(tokens)

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def step() -> Tensor:
        clear()
        loss = loss_of()
        loss.backward()
        return loss.detach()

    clear()
    return step


def peak_step(integration: Integration, row: str, side: str, dtype: str, tokens: int) -> Callable[[], Tensor]:
    """Return the call that `testing.peak_bytes` measures, which allocates the gradients of all parameters."""
    built = integration.build(row, side, dtype, tempfile.mkdtemp(), False)
    stepper(built, integration.warm_tokens or tokens)()
    return stepper(built, tokens)


def true_loss(integration: Integration, row: str, dtype: str, tokens: int, folder: str) -> float:
    """Return the library's loss in fp32, on the weights of `dtype`."""
    _, losses = integration.build(row, integration.side, dtype, folder, True)
    loss = losses(tokens)().item()
    assert math.isfinite(loss)
    return loss


def times(integration: Integration, row: str, dtype: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Time both sides in turn: medians in milliseconds, wall and CPU."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            side: stepper(integration.build(row, side, dtype, folder, False), tokens)
            for side in (integration.side, OURS)
        }
        losses = {side: step().double().item() for side, step in sides.items()}
        true = (
            losses[integration.side]
            if dtype == "float32"
            else true_loss(integration, row, dtype, tokens, folder)
        )
        errors = {side: abs(loss - true) / abs(true) for side, loss in losses.items()}
        if not errors[OURS] <= TARGETS["default"]:
            raise SystemExit(
                f"{row}, {dtype}: the loss is {losses[OURS]}, {integration.label}'s in fp32 {true}: "
                f"{errors[OURS]:.2%} apart"
            )
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, step in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                taken[side].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    result: dict[str, Any] = {"losses": losses, "loss_errors": errors}
    for index, clock in enumerate(("wall", "cpu")):
        result |= {
            f"{side}_{clock}_ms": statistics.median(pair[index] for pair in taken[side]) for side in sides
        }
        result[f"{clock}_ratios"] = [
            theirs[index] / ours[index]
            for theirs, ours in zip(taken[integration.side], taken[OURS], strict=True)
        ]
        result[f"{clock}_ratio"] = statistics.median(result[f"{clock}_ratios"])
    return result


def measure(
    integration: Integration, row: str, dtype: str, tokens: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Return one row: times and losses by a process of its own, and both peaks."""
    load, began = os.getloadavg()[0], time.monotonic()
    program = [sys.executable, sys.argv[0], "--row", row, dtype, str(tokens), str(rounds), str(threads)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ROW")), None)
    if line is None:
        raise SystemExit(f"{row}, {dtype}: {done.stderr.strip()[-2000:]}")
    source = (
        f"from {Path(sys.argv[0]).stem} import INTEGRATION\nfrom steps import peak_step\n"
        "def make(*args): return peak_step(INTEGRATION, *args)"
    )
    peaks = {
        f"{side}_peak_bytes": peak_bytes(source, row, side, dtype, tokens, threads=threads)
        for side in (integration.side, OURS)
    }
    result = {
        "name": row,
        "loss": integration.rows[row],
        "dtype": dtype,
        "load": [load, os.getloadavg()[0]],
        **json.loads(line[3:]),
        **peaks,
    }
    console.print(f"{row}, {dtype}: {time.monotonic() - began:.0f} s", style="dim")
    return {**result, "peak_ratio": result[f"{integration.side}_peak_bytes"] / result[f"{OURS}_peak_bytes"]}


def show(integration: Integration, rows: list[dict[str, Any]]) -> None:
    """Print all rows as a table."""
    side, label = integration.side, integration.label
    table = new_table(
        "loss and gradients",
        "",
        "dtype",
        f"{label} ms",
        "ours ms",
        "ratio",
        "CPU ratio",
        f"{label} MiB",
        "ours MiB",
        "ratio",
        "load",
    )
    for row in rows:
        clocks = (
            f"{row[f'{side}_wall_ms']:.0f}",
            f"{row['opsd_wall_ms']:.0f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
        )
        peaks = (
            f"{row[f'{side}_peak_bytes'] / 2**20:.0f}",
            f"{row['opsd_peak_bytes'] / 2**20:.0f}",
            f"{row['peak_ratio']:.2f}",
        )
        table.add_row(
            row["name"], row["dtype"], *clocks, *peaks, " - ".join(f"{load:.1f}" for load in row["load"])
        )
    console.print(table)


def main(integration: Integration) -> None:
    """Measure all rows, or with `--row` one of them, as the process that `measure` starts."""
    parser = argparse.ArgumentParser(
        description=f"{integration.label}'s loss and ours: time and peak memory of loss and gradients."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest completion")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        row, dtype, tokens, rounds, threads = arguments.row
        torch.set_num_threads(int(threads))
        print("ROW" + json.dumps(times(integration, row, dtype, int(tokens), int(rounds))))
        return
    result: dict[str, Any] = {
        **script_report(f"{integration.side}_steps", Path(sys.argv[0]).name),
        "shape": {
            "V": V,
            "H": HIDDEN,
            "sequences": SEQUENCES,
            "prompt": PROMPT,
            "completion": arguments.tokens,
            "rounds": arguments.rounds,
        },
        "threads": arguments.threads,
        "rows": [],
    }
    result["versions"] |= integration.versions
    for row, dtype in (
        (row, dtype) for dtype in arguments.dtype or ("float32", "bfloat16") for row in integration.rows
    ):
        result["rows"].append(
            measure(integration, row, dtype, arguments.tokens, arguments.rounds, arguments.threads)
        )
        if arguments.json is not None:  # after each row, so that an interrupted run keeps its rows
            arguments.json.write_text(report_json.dumps(result))
    show(integration, result["rows"])
