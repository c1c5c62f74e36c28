"""Call the functions of triton_rows as on a GPU, up to the launch itself.

Arguments are bound and specialised, and kernels compiled for sm_90. A fake driver of an sm_90 GPU replaces
Triton's. Prints one line per compiled kernel.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from opsd_kernels._rows import triton_rows
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec


class AbsentGpu:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class WarmUp:
    """A kernel whose call stops short of the launch."""

    def __init__(self, kernel: triton.runtime.JITFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def call(**arguments: object) -> None:
            compiled = self.kernel.warmup(grid=grid, **arguments)
            print(self.kernel.fn.__name__, compiled.metadata.num_warps, flush=True)

        return call


def sweep(
    n: int, V: int, dtype: torch.dtype, spec: RowSpec, bias: torch.Tensor | None, *policy: torch.Tensor
) -> None:
    S, T = torch.zeros(n, V, dtype=dtype), torch.zeros(n, V, dtype=dtype)
    factor = torch.ones(n)
    stats, _, A = triton_rows.row_fused_(S, T, factor, spec, bias, bias, True, S, *policy)
    triton_rows.row_stats(S, T, spec, bias, bias, False)
    triton_rows.row_dot(S, T, stats, spec, bias, bias)
    triton_rows.row_grad_(S, T, stats, A, factor, spec, bias, bias, S, *policy)
    _, sums = triton_rows.column_norms(S, factor if policy else None)
    columns = torch.arange(0, V, 2)
    triton_rows.gather_columns_(S, columns, S.new_empty(n, len(columns)), sums)


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGpu())
    triton_rows.KERNELS = {name: WarmUp(kernel) for name, kernel in triton_rows.KERNELS.items()}
    sweep(4, 151936, torch.bfloat16, RowSpec(Divergence(Kind.JSD, 0.3), difference=True), None)
    options = {"teacher_mix": 0.1, "entry_clip": 0.05, "token_clip": 2.0}
    sweep(
        4,
        1003,
        torch.float32,
        RowSpec(Divergence(Kind.REVERSE_KL), **options),
        None,
        torch.ones(4),
        torch.zeros(4, dtype=torch.int64),
    )
    sweep(
        1,
        1,
        torch.float32,
        RowSpec(Divergence(Kind.TVD), LogitTransform(1.0, 30.0, 0.7), LogitTransform()),
        torch.zeros(1),
    )  # 1 is specialised
    sys.exit(torch.cuda.is_initialized())
