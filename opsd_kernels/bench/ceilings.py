"""What the machine can do, measured in the same run: GEMM rate and copy bandwidth."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import torch

from .shapes import Setting
from .timing import Variant, clock_for

GEMM_SIZES = {
    "cpu": ((1024, 1024, 1024), (1024, 4096, 1024)),
    "cuda": ((8192, 8192, 8192), (4096, 16384, 4096)),
}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far above any cache
REPEATS = 7


@dataclass(frozen=True)
class Ceiling:
    """Operations per second of the best GEMM at a dtype, bytes per second of a copy (read plus written)."""

    gemm: float
    copy: float

    def floor_seconds(self, flops: float, nbytes: float) -> float:
        return max(flops / self.gemm, nbytes / self.copy)


def _seconds(run: object, device: str) -> list[float]:
    clock, variant = clock_for(device), Variant(run)
    run()
    readings = [clock(variant) for _ in range(REPEATS)]
    return [read() / 1e3 for read in readings]


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s: the best median over a few large sizes."""
    rates = []
    for m, n, k in GEMM_SIZES[device]:
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=dtype, device=device)
        rates.append(
            2
            * m
            * n
            * k
            / statistics.median(_seconds(lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out), device))
        )
    return max(rates)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes per second, read plus written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / statistics.median(_seconds(lambda: target.copy_(source), device))


def ceiling(setting: Setting) -> Ceiling:
    return Ceiling(gemm_rate(setting.torch_dtype, setting.device), copy_rate(setting.device))
