"""Peak rates of the machine, measured in the same run: GEMM rate and copy bandwidth."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..shapes import Setting
from .timing import Variant, clock_for

GEMM_SIZES = {
    "cpu": ((1024, 1024, 1024), (1024, 4096, 1024)),
    "cuda": ((8192, 8192, 8192), (4096, 16384, 4096)),
}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far above any cache
REPEATS = 7


@dataclass(frozen=True)
class Ceiling:
    """FLOP/s of the fastest GEMM of a dtype, bytes/s of a copy (read plus written)."""

    gemm: float
    copy: float

    def floor_seconds(self, flops: float, nbytes: float) -> float:
        """Return the roofline bound on the time of `flops` operations and `nbytes` of traffic."""
        return max(flops / self.gemm, nbytes / self.copy)


def _median_seconds(run: Callable[[], object], device: str) -> float:
    clock, variant = clock_for(device), Variant(run)
    run()
    readings = [clock(variant) for _ in range(REPEATS)]
    return statistics.median([read() / 1e3 for read in readings])


@functools.cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Return FLOP/s: the highest median over a few large sizes."""
    rates = []
    for m, n, k in GEMM_SIZES[device]:
        a, b = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=dtype, device=device)
        multiply = functools.partial(torch.mm, a, b.t(), out=out)
        rates.append(2 * m * n * k / _median_seconds(multiply, device))
    return max(rates)


@functools.cache
def copy_rate(device: str) -> float:
    """Return bytes per second, read plus written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def ceiling(setting: Setting) -> Ceiling:
    """Return the measured ceilings for the dtype and device of a setting."""
    return Ceiling(gemm_rate(setting.torch_dtype, setting.device), copy_rate(setting.device))
