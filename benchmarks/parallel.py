"""Cost of one rank of a sharded loss head, on a machine without GPUs: the report behind docs/scaling.md.

    python benchmarks/parallel.py [--quick] [--json FILE]

One thread per rank. Shards of R ranks are measured in one process, in a group whose other ranks are emulated
(parallel_shards.py): the whole computation of a rank, merging included, without the wire. Two gloo processes
measure the wire, and whole steps (parallel_processes.py). Before anything is timed, losses and gradients of R
real shards together pass the gates of the unit tests against the whole vocabulary in float64
(parallel_groups.py). About five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parallel_processes import WORLD, collectives, launch, rank_main, run_setting
from parallel_shards import exchanges, peak_rows, shard_rows

from opsd_kernels import report_json
from opsd_kernels.bench.internals import DEFAULT_WORKSPACE_BYTES
from opsd_kernels.bench.measure.context import describe
from opsd_kernels.bench.parallel import fit_link
from opsd_kernels.bench.report.results import rounded, row_dict, script_report
from opsd_kernels.bench.shapes import Setting

KINDS = ("gather", "reduce", "data")  # statistics, dh in fp32, dW in bf16


@dataclass(frozen=True)
class Scope:
    """The sizes and rounds of one run."""

    ranks: tuple[int, ...]
    shards: tuple[Setting, ...]
    peaks: tuple[Setting, ...]
    runs: tuple[Setting, ...]
    messages: tuple[int, ...]  # bytes
    rounds: int
    message_rounds: int


FULL = Scope(
    ranks=(1, 2, 4, 8, 16),
    shards=(
        Setting(256, 1024, 32000),
        Setting(256, 2048, 32000),
        Setting(256, 512, 128256),
        Setting(256, 512, 32000, divergence="jsd"),
        Setting(128, 1024, 32000, "float32"),
    ),
    peaks=(Setting(2048, 512, 32000), Setting(512, 256, 128256)),
    runs=(Setting(1536, 512, 32000), Setting(256, 512, 32000)),
    messages=tuple(1 << power for power in range(10, 26, 2)) + (1 << 25,),
    rounds=5,
    message_rounds=8,
)
QUICK = Scope(
    ranks=(1, 2, 3),
    shards=(Setting(24, 32, 501), Setting(16, 32, 501, "float32", divergence="jsd")),
    peaks=(),
    runs=(Setting(24, 32, 501),),
    messages=(1 << 10, 1 << 22),
    rounds=3,
    message_rounds=3,
)


def measure_in_rank(scope: Scope, rank: int) -> dict[str, Any]:
    """Return collectives and runs of WORLD processes, in one of them."""
    return {
        "collectives": collectives(scope.messages, scope.message_rounds),
        "runs": [run_setting(setting, scope.rounds, rank) for setting in scope.runs],
    }


def links(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fit a link to each kind of collective."""
    found = {}
    for kind in KINDS:
        link, off = fit_link(
            (point["bytes"], point["ms"]["median"] / 1e3) for point in points if point["kind"] == kind
        )
        found[kind] = {"latency": link.latency, "bandwidth": link.bandwidth, "off": off}
    return found


def measure(scope: Scope, quick: bool) -> dict[str, Any]:
    """Run everything in `scope`, with a line of progress after each part."""
    began = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)

    pairs, rows = launch(__file__, *["--quick"] * quick), []
    done(f"{WORLD} processes")
    for setting in scope.shards:
        rows += shard_rows(setting, scope.ranks, scope.rounds)
        done(f"shards of {describe(setting)}")
    for setting in scope.peaks:
        rows += peak_rows(setting, scope.ranks)
        done(f"memory of {describe(setting)}")
    return {
        "exchanges": exchanges(WORLD),
        **pairs,
        "links": links(pairs["collectives"]),
        "rows": [row_dict(row) for row in rows],
    }


def main() -> None:
    """Measure, or with `--rank` run as one of the processes that `launch` starts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test of this script")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scope = QUICK if arguments.quick else FULL
    if arguments.rank is not None:
        rank, folder = arguments.rank
        rank_main(int(rank), Path(folder), lambda own: measure_in_rank(scope, own))
        return
    began = time.monotonic()
    head = {**script_report("parallel", "parallel.py"), "quick": arguments.quick}
    found = measure(scope, arguments.quick)
    report = rounded(
        {**head, "seconds": time.monotonic() - began, "workspace_bytes": DEFAULT_WORKSPACE_BYTES, **found}
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(report_json.dumps(report))
    print(
        f"{len(found['rows'])} rows, {len(found['runs'])} runs of {WORLD} processes, "
        f"{report['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
