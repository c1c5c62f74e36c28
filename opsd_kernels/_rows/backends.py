"""Row backends in order of preference, with the reasons why one cannot serve or serves by name alone.

The backend of the compiled libraries is here: it forwards to their operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import env
from ..spec import LogitTransform, RowSpec, check_choice, expect
from . import extension, torch_rows, torch_topk
from .contract import SPREAD_LIMIT, RowBackend, plain_kl

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SlowBackendWarning(UserWarning):
    """The C++ kernels could serve this CPU, but were not built or do not load."""


@dataclass(frozen=True)
class Backend:
    """A backend's name, a function that returns its sweeps, and two predicates.

    `unsupported(device_type, dtype)` returns None if it sweeps logits of `dtype` (None: a common one) there,
    else the reason. `by_name(device)` returns the reason why it serves there by name alone, or None.
    """

    name: str
    rows: Callable[[], RowBackend]
    unsupported: Callable[[str, torch.dtype | None], str | None]
    by_name: Callable[[torch.device], str | None] = lambda device: None


def _no_cuda(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cuda":
        return f"the CUDA kernels run on cuda, not on {device_type}"
    if dtype not in (None, *CUDA_DTYPES):
        name = str(dtype).removeprefix("torch.")
        return f"the CUDA kernels sweep float32, bfloat16 and float16 logits, not {name}"
    return extension.cuda_unavailable()


def _no_triton(device_type: str, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return importlib.import_module(f"{__package__}.triton_rows").usable(device_type)


def _no_extension(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cpu":
        return f"the C++ kernels run on cpu, not on {device_type}"
    return extension.load()


class CompiledRows:
    """The sweeps of the compiled libraries (csrc/), on the device of their tensors. Contract: contract.py."""

    def __init__(self, operators: Any = torch.ops.opsd_kernels) -> None:
        self.operators = operators

    def column_norms(self, G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        if G.is_cuda:
            return _columns_on_cuda().column_norms(G, scale)
        norms, sums = self.operators.column_norms(G, scale)
        return norms, sums.sum(0)

    def gather_columns_(self, G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
        gather = _columns_on_cuda().gather_columns_ if G.is_cuda else self.operators.gather_columns_
        gather(G, columns, out, sums)

    def row_topk_(
        self,
        S: Tensor,
        of_side: LogitTransform,
        bias: Tensor | None,
        ids: Tensor,
        values: Tensor,
        tail: Tensor,
    ) -> None:
        if S.is_cuda:
            return torch_topk.row_topk_(S, of_side, bias, ids, values, tail)
        temperature = 0.0 if isinstance(of_side.temperature, Tensor) else of_side.temperature
        scalars = of_side.scale, of_side.softcap or 0.0, temperature
        self.operators.row_topk_(S, bias, *scalars, of_side.of_rows, ids, values, tail)

    def row_stats(
        self, S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
    ) -> Tensor:
        scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
        temperatures = spec.student.of_rows, spec.teacher.of_rows
        return self.operators.row_stats(S, T, bias_s, bias_t, metrics, *scalars, SPREAD_LIMIT, *temperatures)

    def row_dot(
        self, S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if spec.one_sweep:
            return plain_kl(stats, spec)
        scalars = spec.scalars(spec.linear_difference(bias_s is bias_t))
        temperatures = spec.student.of_rows, spec.teacher.of_rows
        return self.operators.row_dot(S, T, stats, bias_s, bias_t, *scalars, SPREAD_LIMIT, *temperatures)

    def row_grad_(
        self,
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
        self.operators.row_grad_(
            S, T, stats, A, factor, policy_slope, labels, bias_s, bias_t, G,
            *scalars, SPREAD_LIMIT, *temperatures,
        )  # fmt: skip

    def row_fused_(
        self,
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
        return self.operators.row_fused_(
            S, T, factor, policy_slope, labels, bias_s, bias_t, metrics, G,
            *scalars, SPREAD_LIMIT, *temperatures,
        )  # fmt: skip


@cache
def _columns_on_cuda() -> RowBackend:
    """Return Triton's functions of the columns, or torch's without Triton: the CUDA library has none."""
    triton = _no_triton("cuda", None) is None
    return importlib.import_module(f"{__package__}.{'triton_rows' if triton else 'torch_rows'}")


COMPILED = CompiledRows()

BACKENDS = (
    Backend(
        "cuda",
        lambda: COMPILED,
        _no_cuda,
        lambda device: extension.cuda_unchecked(device) if device.type == "cuda" else None,
    ),
    Backend(
        "triton",
        lambda: importlib.import_module(f"{__package__}.triton_rows"),
        _no_triton,
        lambda device: "Triton only interprets on a CPU" if device.type == "cpu" else None,
    ),
    Backend("cpp", lambda: COMPILED, _no_extension),
    Backend("torch", lambda: torch_rows, lambda device_type, dtype: None),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def select(name: str | None, device: torch.device, dtype: torch.dtype | None = None) -> RowBackend:
    """Return the backend of `name` or OPSD_BACKEND, else the first that sweeps logits of `dtype` on `device`.


    Raises ValueError with the reason if the named backend cannot serve. Without a name, one with a reason in
    `by_name` is passed over: Triton on a CPU, and the CUDA kernels on a GPU whose architecture they have not
    passed the GPU check on, since a wrong gradient costs more than a slower one. Warns once per process if no
    name is given and torch's own operators serve a CPU because the C++ kernels are missing.
    """
    name = name or env.BACKEND.get()
    if name is not None:
        check_choice("backend", name, NAMES)
    for backend in BACKENDS:
        if name != backend.name and (name is not None or backend.by_name(device) is not None):
            continue
        reason = backend.unsupported(device.type, dtype)
        if reason is None:
            break
        usable = f"one that is usable on {device.type}"
        expect(name is None, "backend", usable, f"{backend.name!r}: {reason}")
    # The loop ends at a `break`: the torch backend serves everywhere.
    if name is None and device.type == "cpu" and backend.name == "torch":
        reasons = {other.name: other.unsupported for other in BACKENDS}
        _warn_of_missing_kernels(str(reasons["cpp"](device.type, dtype)))
    return backend.rows()


@cache
def _warn_of_missing_kernels(reason: str) -> None:
    text = (
        "this call runs on torch's own operators, which are slower than the C++ kernels: "
        f"{reason}. "
        f"To build them: {extension.build_command()} "
        "(OPSD_BACKEND=torch keeps torch's operators, without this warning)"
    )
    warnings.warn(text, SlowBackendWarning, stacklevel=1 + _depth_of_caller())


def _depth_of_caller() -> int:
    """Count the frames from the caller to the nearest one outside this package and torch.

    `warnings.warn(skip_file_prefixes=)` needs Python 3.12.
    """
    inside = (str(extension.PACKAGE), str(Path(torch.__file__).parent))
    frame: FrameType | None = sys._getframe(1)
    depth = 0
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, depth = frame.f_back, depth + 1
    return depth


def explain(device_type: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Return for each backend what `Backend.unsupported` returns: None, or the reason why it cannot serve."""
    return {backend.name: backend.unsupported(device_type, dtype) for backend in BACKENDS}
