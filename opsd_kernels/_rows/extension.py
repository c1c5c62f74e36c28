"""The compiled libraries, for the CPU and for CUDA: whether they are there, and what they can do here."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]


def _load(stem: str, what: str) -> str | None:
    libraries = sorted(PACKAGE.glob(f"{stem}.*so")) + sorted(PACKAGE.glob(f"{stem}*.pyd"))
    if not libraries:
        return f"the {what} not built (docs/build.md)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error.__cause__ or error}"  # torch's own text names the file alone
    return None


@cache
def load() -> str | None:
    """Registers the C++ extension's operators, once. None if they are there, else the reason why they are not."""
    return _load("_C", "C++ extension was")


@cache
def cuda_unavailable() -> str | None:
    """Registers the CUDA kernels, once. None if they can run on the devices that are visible, else the reason why they cannot."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    oldest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        return f"a device of compute capability 8.0 or more is needed, got {oldest[0]}.{oldest[1]}"
    return load() or _load("_cuda", "CUDA kernels were")  # the schemas are those of the C++ extension


def capability() -> str:
    """The instruction set of the CPU sweeps: 'avx512', 'avx2' or 'default'. OPSD_CPU_CAPABILITY limits it; RuntimeError if that names none."""
    return torch.ops.opsd_kernels.cpu_capability()


@cache
def has_amx() -> bool:
    """True on an x86 CPU with tile units (AMX), which Intel alone builds."""
    return torch.cpu._is_amx_tile_supported()


@cache
def mm_has_units(dtype: torch.dtype) -> bool:
    """True if a library multiplies CPU matrices of `dtype` under `torch.mm`. Otherwise torch runs loops of its own, an order of magnitude slower."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


@cache
def gemm_unavailable() -> str | None:
    """None if `gemm_bf16_` (csrc/cpu/gemm.h) gives what it should here, else the reason why it is not used.

    Its micro-kernel is not part of torch's public interface, so it is tried once on shapes with every kind of edge.
    """
    reason = load() or torch.ops.opsd_kernels.gemm_unavailable()
    if reason:
        return reason
    generator = torch.Generator().manual_seed(0)
    for M, N, K in ((1, 1, 1), (67, 83, 97)):
        a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((M, K), (K, N)))
        for left, right in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
            out = torch.ones(M, N)
            torch.ops.opsd_kernels.gemm_bf16_(left, right, out, True)
            if not torch.allclose(out, 1 + a.float() @ b.float(), rtol=1e-4, atol=1e-4):
                return "the micro-kernel of this torch gave a wrong product"
    return None
