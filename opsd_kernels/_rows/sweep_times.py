"""Predict the time of the row sweeps on a GPU from their machine code: a model, which no measurement backs.

The counts are those of sass_budget.tsv, which tests/build/sass_budget.py reads off the compiled kernels. A
kernel takes the longest of three times: to issue its instructions, to compute its special functions
(exponentials, logarithms, reciprocals), and to move its bytes. So it assumes that the blocks of a
multiprocessor overlap, as two fit on each. Left out are launches, the sums over threads, the last tile of a
row, rows of a far teacher, and that some instructions (minima, comparisons, shifts) issue at half the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..spec import Divergence, Kind

TABLE = Path(__file__).with_name("sass_budget.tsv")
# Both logits of a row in the shared memory of the largest portable cluster, 8 blocks of 227 KiB.
CLUSTER_BYTES = 8 * (227 << 10)


@dataclass(frozen=True)
class Gpu:
    """Rates per second: instructions of a lane, results of special functions, bytes of a copy.

    A multiprocessor has four schedulers, each of which issues one instruction of 32 lanes a clock, and 16
    special-function lanes (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions",
    compute capability 9.0 and 10.0). Multiprocessors, boost clock and memory bandwidth are those of NVIDIA's
    data sheets. A copy reaches .9 of the bandwidth: 4.3 of an H200's 4.8 TB/s.
    """

    name: str
    device: str  # as the driver names it: an H100 PCIe and a GH200 have other rates
    architecture: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second

    @property
    def issue(self) -> float:
        return self.multiprocessors * self.clock * 4 * 32

    @property
    def special(self) -> float:
        return self.multiprocessors * self.clock * 16

    @property
    def copy(self) -> float:
        return 0.9 * self.bandwidth


GPUS = (
    Gpu("H100 SXM", "NVIDIA H100 80GB HBM3", "90", 132, 1.98e9, 3.35e12),
    Gpu("H200", "NVIDIA H200", "90", 132, 1.98e9, 4.8e12),
    Gpu("B200", "NVIDIA B200", "100", 148, 1.965e9, 8.0e12),
)


@dataclass(frozen=True)
class Cost:
    """What a sweep, or all of a call, does for an entry of a row."""

    sweep: str
    instructions: float
    special: float
    bytes: float

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Return the seconds of an entry, by limit."""
        return {
            "memory": self.bytes / gpu.copy,
            "instructions": self.instructions / gpu.issue,
            "special functions": self.special / gpu.special,
        }

    def predicted(self, gpu: Gpu, entries: int) -> Prediction:
        """Return the prediction for rows of `entries` in all."""
        times = self.times(gpu)
        limit = max(times, key=lambda name: times[name])
        return Prediction(self.sweep, entries * times[limit], limit, times["memory"] / times[limit])


@dataclass(frozen=True)
class Prediction:
    """A time in seconds, the limit that it comes from, and the share of the copy bandwidth it reaches."""

    sweep: str
    seconds: float
    limit: str
    share: float

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.3g} ms, {self.share:.0%} of the copy bandwidth, bound by {self.limit}"


@cache
def kernels() -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Return the table: (backend, kernel, type, architecture) -> the lines of its sweeps without metrics."""
    header, *lines = (line.split("\t") for line in TABLE.read_text().splitlines())
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in lines:
        row = dict(zip(header, line, strict=True))
        if not row["sweep"].endswith(" metrics"):
            found.setdefault(tuple(line[:4]), []).append(row)
    return found


def costs(backend: str, kind: Kind, dtype: torch.dtype, V: int, architecture: str) -> list[Cost]:
    """Return the cost of each sweep of a fused call without options; empty if the table has none.

    CUDA's kernels run apart where a cluster cannot hold a row.
    """
    type = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}.get(dtype)
    name, form = kind.name.lower(), "plain" if backend == "cuda" else "linear"
    chosen = [f"fused {name} {form}"]
    if backend == "cuda" and 2 * V * dtype.itemsize > CLUSTER_BYTES:
        # Divergences of two sweeps share the statistics of JSD.
        one_sweep = Divergence(kind).one_sweep
        value = [] if one_sweep else [f"dot {name} {form}"]
        chosen = [f"stats {name if one_sweep else 'jsd'} {form}", *value, f"grad {name} {form}"]
    return [
        Cost(
            row["sweep"].strip("_"),
            float(row["issued"]),
            float(row["mufu"]),
            float(row["read"]) + dtype.itemsize * (float(row["written"]) > 0),
        )
        for kernel in chosen
        for row in kernels().get((backend, kernel, str(type), architecture), [])
        if not (kernel.startswith("stats") and row["sweep"] == "find_peaks")  # it walks a row's start
    ]


def predict(backend: str, kind: Kind, dtype: torch.dtype, n: int, V: int, gpu: Gpu) -> list[Prediction]:
    """Return the prediction of each sweep over n rows, and of the whole call as the last one.

    Empty where the table has no counts.
    """
    sweeps = costs(backend, kind, dtype, V, gpu.architecture)
    if not sweeps:
        return []
    whole = Cost(
        "all",
        sum(cost.instructions for cost in sweeps),
        sum(cost.special for cost in sweeps),
        sum(cost.bytes for cost in sweeps),
    )
    return [cost.predicted(gpu, n * V) for cost in [*sweeps, whole]]
