"""Row sweeps of the compiled libraries (csrc/), on the device of their tensors. Contract: contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LogitTransform, RowSpec
from .contract import SPREAD_LIMIT, plain_kl

OPERATORS = torch.ops.opsd_kernels


def _transform_values(t: LogitTransform) -> tuple[float, float, float]:
    return t.scale, t.softcap or 0.0, t.number


def _spec_values(spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple:
    """Flatten a RowSpec in the order of csrc/registration.cpp."""
    divergence = int(spec.divergence.kind), spec.divergence.beta
    transforms = *_transform_values(spec.student), *_transform_values(spec.teacher)
    options = spec.teacher_mix, spec.entry_clip, spec.token_clip
    return (
        *divergence,
        *transforms,
        spec.difference,
        spec.linear_difference(bias_s is bias_t),
        *options,
        SPREAD_LIMIT,
        spec.student.of_rows,
        spec.teacher.of_rows,
    )


def row_stats(
    S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
) -> Tensor:
    return OPERATORS.row_stats(S, T, bias_s, bias_t, metrics, *_spec_values(spec, bias_s, bias_t))


def row_dot(
    S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
) -> tuple[Tensor, Tensor]:
    if spec.one_sweep:
        return plain_kl(stats, spec)
    return OPERATORS.row_dot(S, T, stats, bias_s, bias_t, *_spec_values(spec, bias_s, bias_t))


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
    OPERATORS.row_grad_(
        S, T, stats, A, factor, policy_slope, labels, bias_s, bias_t, G, *_spec_values(spec, bias_s, bias_t)
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
    return OPERATORS.row_fused_(
        S, T, factor, policy_slope, labels, bias_s, bias_t, metrics, G, *_spec_values(spec, bias_s, bias_t)
    )
