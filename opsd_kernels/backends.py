"""Row backends in order of preference, each with a predicate that says why it cannot serve, if it cannot."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import env, extension
from .kernels.contract import RowBackend
from .spec import check_choice, expect


@dataclass(frozen=True)
class Backend:
    """`unsupported(device_type)` is None where the backend can serve, else the reason."""

    name: str
    module: str | None
    unsupported: Callable[[str], str | None]

    def load(self) -> RowBackend:
        return importlib.import_module(f"{__package__}.kernels.{self.module}")


def _no_cuda(device_type: str) -> str | None:
    return "the CUDA row kernels are not part of this version"


def _no_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return importlib.import_module(f"{__package__}.kernels.triton_rows").usable(device_type)


def _no_extension(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"the C++ kernels run on cpu, not on {device_type}"
    return extension.load()


BACKENDS = (
    Backend("cuda", None, _no_cuda),
    Backend("triton", "triton_rows", _no_triton),
    Backend("cpp", "ext_rows", _no_extension),
    Backend("torch", "torch_rows", lambda device_type: None),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def check_name(name: str | None) -> None:
    if name is not None:
        check_choice("backend", name, NAMES)


def select(name: str | None, device: torch.device) -> RowBackend:
    """The backend asked for by `name` or by OPSD_BACKEND, else the first that serves `device`.

    Raises ValueError with the reason where a backend asked for by name cannot serve. On a CPU Triton only interprets, so it serves there by name alone.
    """
    name = name or env.backend()
    check_name(name)
    for backend in BACKENDS:
        if name in (None, backend.name) and not (name is None and backend.name == "triton" and device.type == "cpu"):
            reason = backend.unsupported(device.type)
            if reason is None:
                return backend.load()
            expect(name is None, "backend", f"one that is usable on {device.type}", f"{backend.name!r}: {reason}")
    raise AssertionError("the torch backend serves everywhere")


def explain(device_type: str = "cpu") -> dict[str, str | None]:
    """For each backend None if it can serve `device_type`, else the reason why not."""
    return {backend.name: backend.unsupported(device_type) for backend in BACKENDS}
