"""Row sweeps of the compiled libraries (csrc/), on the device of their tensors. Contract: contract.py."""

from __future__ import annotations

import importlib
from functools import cache

import torch
from torch import Tensor

from ..spec import RowSpec
from . import backends
from .contract import SPREAD_LIMIT, RowBackend, plain_kl

OPERATORS = torch.ops.opsd_kernels


@cache
def _columns_on_cuda() -> RowBackend:
    """Return Triton's functions of the columns, or torch's without Triton: the CUDA library has none."""
    triton = backends.explain("cuda")["triton"] is None
    return importlib.import_module(f"{__package__}.{'triton_rows' if triton else 'torch_rows'}")


def column_norms(G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if G.is_cuda:
        return _columns_on_cuda().column_norms(G, scale)
    norms, sums = OPERATORS.column_norms(G, scale)
    return norms, sums.sum(0)


def gather_columns_(G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
    gather = _columns_on_cuda().gather_columns_ if G.is_cuda else OPERATORS.gather_columns_
    gather(G, columns, out, sums)


def row_stats(
    S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
) -> Tensor:
    scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
    temperatures = spec.student.of_rows, spec.teacher.of_rows
    return OPERATORS.row_stats(S, T, bias_s, bias_t, metrics, *scalars, SPREAD_LIMIT, *temperatures)


def row_dot(
    S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
) -> tuple[Tensor, Tensor]:
    if spec.one_sweep:
        return plain_kl(stats, spec)
    scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
    temperatures = spec.student.of_rows, spec.teacher.of_rows
    return OPERATORS.row_dot(S, T, stats, bias_s, bias_t, *scalars, SPREAD_LIMIT, *temperatures)


def row_grad_(
    S: Tensor,
    T: Tensor,
    stats: Tensor,
    A: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
    temperatures = spec.student.of_rows, spec.teacher.of_rows
    OPERATORS.row_grad_(
        S, T, stats, A, factor, policy_slope, labels, bias_s, bias_t, G, *scalars, SPREAD_LIMIT, *temperatures
    )


def row_fused_(
    S: Tensor,
    T: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    metrics: bool,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
    temperatures = spec.student.of_rows, spec.teacher.of_rows
    return OPERATORS.row_fused_(
        S, T, factor, policy_slope, labels, bias_s, bias_t, metrics, G, *scalars, SPREAD_LIMIT, *temperatures
    )
