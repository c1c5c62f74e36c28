"""Add products of a chunk to sums: dW += G.T h and, over slices of a head, dh = G W."""

from __future__ import annotations

import torch
from torch import Tensor

from .._rows import extension
from . import cpu_gemm
from .sliced_head import SlicedHead

FEW_ROWS = 32  # below, dW of `gemm_fp32_` takes up to 1.2 times as long as that of torch.mm


def accumulate_weight_grad(G: Tensor, hidden: Tensor, dW: Tensor, first: bool) -> None:
    """Add G.T @ hidden to dW, (C, V), (C, H) -> (V, H), fp32 for 16-bit inputs too. `first`: overwrite dW."""
    Gt = G.t()
    if dW.dtype == G.dtype:
        on_cpu = dW.device.type == "cpu"
        if on_cpu and first and not extension.mm_has_units(dW.dtype):
            cpu_gemm.sliced_mm_(Gt, hidden, dW)
        elif on_cpu and extension.gemm_fp32_serves(dW.dtype) and len(G) >= FEW_ROWS:
            torch.ops.opsd_kernels.gemm_fp32_(Gt, hidden, dW, not first)
        elif first:
            torch.mm(Gt, hidden, out=dW)
        else:
            dW.addmm_(Gt, hidden)
    elif dW.device.type == "cpu":
        cpu_gemm.widening_mm(Gt, hidden, dW, accumulate=not first)
    elif first:
        torch.mm(Gt, hidden, out_dtype=dW.dtype, out=dW)
    else:
        # From torch 2.10 on `self` may have the output's dtype; as it is also `out`, there is no copy.
        torch.addmm(dW, Gt, hidden, out_dtype=dW.dtype, out=dW)


def sum_over_slices(G: Tensor, head: SlicedHead, dh: Tensor) -> None:
    """Compute dh = G @ W of a head read by slices, (C, V), (V, H) -> (C, H), in fp32 for 16-bit inputs."""
    for columns, rows in head.slices():
        accumulate_weight_grad(G[:, columns].t(), rows, dh, first=columns.start == 0)
