"""Row backends in order of preference, each with a predicate that says why it cannot serve, if it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import env
from ..spec import check_choice, expect
from . import extension
from .contract import RowBackend

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SlowBackendWarning(UserWarning):
    """The C++ kernels could serve this CPU, but were not built or do not load."""


@dataclass(frozen=True)
class Backend:
    """A module of this folder, and in `reason` what `unsupported` says."""

    name: str
    module: str
    reason: Callable[[str, torch.dtype | None], str | None]

    def unsupported(self, device_type: str, dtype: torch.dtype | None = None) -> str | None:
        """None if it can sweep logits of `dtype` (None: of the common ones) on `device_type`, else the reason why not."""
        return self.reason(device_type, dtype)

    def load(self) -> RowBackend:
        return importlib.import_module(f"{__package__}.{self.module}")


def _no_cuda(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cuda":
        return f"the CUDA kernels run on cuda, not on {device_type}"
    if dtype not in (None, *CUDA_DTYPES):
        return f"the CUDA kernels sweep float32, bfloat16 and float16 logits, not {str(dtype).removeprefix('torch.')}"
    return extension.cuda_unavailable()


def _no_triton(device_type: str, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return importlib.import_module(f"{__package__}.triton_rows").usable(device_type)


def _no_extension(device_type: str, dtype: torch.dtype | None) -> str | None:
    if device_type != "cpu":
        return f"the C++ kernels run on cpu, not on {device_type}"
    return extension.load()


BACKENDS = (
    Backend("cuda", "compiled_rows", _no_cuda),
    Backend("triton", "triton_rows", _no_triton),
    Backend("cpp", "compiled_rows", _no_extension),
    Backend("torch", "torch_rows", lambda device_type, dtype: None),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def check_name(name: str | None) -> None:
    if name is not None:
        check_choice("backend", name, NAMES)


def select(name: str | None, device: torch.device, dtype: torch.dtype | None = None) -> RowBackend:
    """The backend asked for by `name` or by OPSD_BACKEND, else the first that sweeps logits of `dtype` on `device`.

    Raises ValueError with the reason where a backend asked for by name cannot serve. On a CPU Triton only interprets, so it serves there by name alone.
    Warns once per process where nothing was asked for and torch's own operators serve a CPU because the C++ kernels are missing.
    """
    name = name or env.backend()
    backend = _chosen(name, device.type, dtype)
    if name is None and device.type == "cpu" and backend.name == "torch":
        _warn_of_missing_kernels()
    return backend.load()


@cache
def _warn_of_missing_kernels() -> None:
    text = (
        f"this call runs on torch's own operators, which are slower than the C++ kernels: {extension.load()}. To build them: {extension.build_command()} "
        "(OPSD_BACKEND=torch keeps torch's operators, without this warning)"
    )
    warnings.warn(text, SlowBackendWarning, stacklevel=1 + _depth_of_caller())


def _depth_of_caller() -> int:
    """Frames between the function that calls this and the nearest one outside this package and torch. `skip_file_prefixes` needs Python 3.12."""
    inside = (str(extension.PACKAGE), str(Path(torch.__file__).parent))
    frame, depth = sys._getframe(1), 0
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, depth = frame.f_back, depth + 1
    return depth


def _chosen(name: str | None, device_type: str, dtype: torch.dtype | None) -> Backend:
    check_name(name)
    for backend in BACKENDS:
        if name in (None, backend.name) and not (
            name is None and backend.name == "triton" and device_type == "cpu"
        ):
            reason = backend.unsupported(device_type, dtype)
            if reason is None:
                return backend
            expect(
                name is None, "backend", f"one that is usable on {device_type}", f"{backend.name!r}: {reason}"
            )
    raise AssertionError("the torch backend serves everywhere")


def explain(device_type: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """For each backend None if it can sweep logits of `dtype` (None: of the common ones) on `device_type`, else the reason why not."""
    return {backend.name: backend.unsupported(device_type, dtype) for backend in BACKENDS}


def launches(V: int, dtype: torch.dtype) -> dict[str, str]:
    """How the GPU backends spread a row of V logits of `dtype` over threads, or why they do not. Heuristics; nothing is tuned when the op runs."""
    return {"cuda": _no_cuda("cuda", dtype) or _cuda_launch(V, dtype), "triton": _triton_launch(V, dtype)}


def _cuda_launch(V: int, dtype: torch.dtype) -> str:
    major, minor = torch.cuda.get_device_capability()
    return torch.ops.opsd_kernels.cuda_launch(V, dtype.itemsize, 10 * major + minor)


def _triton_launch(V: int, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    block, warps = importlib.import_module(f"{__package__}.triton_launch").config(V, dtype)
    return f"each sweep one block of {32 * warps} threads per row, {block} columns at a time"
