"""Row sweeps of the compiled extension (csrc/). What a sweep must honour: contract.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..spec import LogitTransform, RowSpec
from .contract import SPREAD_LIMIT, plain_kl

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def load() -> str | None:
    """Registers the extension's operators, once. None if they are there, else the reason why they are not."""
    libraries = sorted(PACKAGE.glob("_C.*so")) + sorted(PACKAGE.glob("_C*.pyd"))
    if not libraries:
        return "the C++ extension was not built (docs/build.md)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the C++ extension {libraries[0].name} does not load: {error.__cause__ or error}"  # torch's own text names the file alone
    return None


def capability() -> str:
    """The instruction set of the CPU sweeps: 'avx512', 'avx2' or 'default'. OPSD_CPU_CAPABILITY limits it; RuntimeError if that names none."""
    return torch.ops.opsd_kernels.cpu_capability()


def _transform_values(t: LogitTransform) -> tuple[float, float, float]:
    return t.scale, t.softcap or 0.0, t.temperature


def _spec_values(spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple:
    """RowSpec in the order of csrc/registration.cpp."""
    divergence = int(spec.divergence.kind), spec.divergence.beta
    transforms = *_transform_values(spec.student), *_transform_values(spec.teacher)
    return *divergence, *transforms, spec.difference, spec.linear_difference(bias_s is bias_t), SPREAD_LIMIT


def row_stats(S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool) -> Tensor:
    return torch.ops.opsd_kernels.row_stats(S, T, bias_s, bias_t, metrics, *_spec_values(spec, bias_s, bias_t))


def row_dot(S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple[Tensor, Tensor]:
    if spec.divergence.one_sweep:
        return plain_kl(stats, spec)
    return torch.ops.opsd_kernels.row_dot(S, T, stats, bias_s, bias_t, *_spec_values(spec, bias_s, bias_t))


def row_grad_(
    S: Tensor, T: Tensor, stats: Tensor, A: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, G: Tensor
) -> None:
    torch.ops.opsd_kernels.row_grad_(S, T, stats, A, factor, bias_s, bias_t, G, *_spec_values(spec, bias_s, bias_t))


def row_fused_(
    S: Tensor, T: Tensor, factor: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool, G: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.opsd_kernels.row_fused_(S, T, factor, bias_s, bias_t, metrics, G, *_spec_values(spec, bias_s, bias_t))
