"""The compiled libraries for CPU and CUDA: load them, and query what they support on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from . import gpu_checks

PACKAGE = Path(__file__).resolve().parents[1]
# Those that csrc registers. A library from before one of them is too old.
OPERATORS = (
    *("row_stats", "row_dot", "row_grad_", "row_fused_", "cuda_launch", "cpu_capability"),
    *("gemm_bf16_", "gemm_fp32_", "dots_bf16_", "gemm_unavailable", "gemm_fp32_unavailable"),
    *("column_norms", "gather_columns_", "row_topk_"),
)


def _load(stem: str, what: str) -> str | None:
    libraries = sorted(PACKAGE.glob(f"{stem}.*so")) + sorted(PACKAGE.glob(f"{stem}*.pyd"))
    if not libraries:
        # setup.py writes this file into a wheel without kernels
        recorded = PACKAGE / "without_cpp_kernels.txt"
        if recorded.exists():
            return f"the {what} not built: {recorded.read_text()}"
        return f"the {what} not built (docs/build.md)"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        # torch's own text names the file alone
        return f"{libraries[0].name} does not load: {error.__cause__ or error}"
    return None


@cache
def load() -> str | None:
    """Register the C++ extension's operators, once. Return None, or the reason why they are missing."""
    reason = _load("_C", "C++ extension was")
    missing = [] if reason else [name for name in OPERATORS if not hasattr(torch.ops.opsd_kernels, name)]
    if missing:
        return f"the C++ extension was built from older sources, without {', '.join(missing)}"
    return reason


def build_command() -> str:
    """Return the shell command that builds the C++ kernels for this installation, from its own origin."""
    checkout = PACKAGE.parent
    if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
        return (
            f"cd {shlex.quote(str(checkout))} && {shlex.quote(sys.executable)} setup.py build_ext --inplace"
        )
    try:
        installed = distribution("opsd_kernels")
        installer = (installed.read_text("INSTALLER") or "").strip()
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        installer, origin = "", {}
    python = shlex.quote(sys.executable)
    if installer == "uv":  # it builds in an environment without torch, and caches wheels
        command = f"uv pip install --python {python} --no-build-isolation --reinstall --no-deps --no-cache"
    else:
        command = f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir"
    return f"{command} {_origin(origin)}"


def _origin(direct_url: dict) -> str:
    """Return the origin of an installation by URL (PEP 610), else the source distribution of the index.

    The URL names a folder, an archive or a repository.
    """
    url = direct_url.get("url", "")
    if not url or url.endswith(".whl"):
        return "--no-binary opsd_kernels opsd_kernels"
    if "vcs_info" in direct_url:
        return shlex.quote(f"{direct_url['vcs_info']['vcs']}+{url}@{direct_url['vcs_info']['commit_id']}")
    return shlex.quote(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)


@cache
def cuda_unavailable() -> str | None:
    """Register the CUDA kernels, once. Return None if they run on the visible devices, else the reason."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    oldest = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        return f"a device of compute capability 8.0 or more is needed, got {oldest[0]}.{oldest[1]}"
    # the C++ extension registers the schemas
    return load() or _load("_cuda", "CUDA kernels were")


def cuda_sources() -> str:
    """Return the digest of the loaded CUDA kernels' sources (setup.py), "" if it was not recorded."""
    operator = getattr(torch.ops.opsd_kernels, "cuda_sources", None)
    return "" if operator is None else operator()


def cuda_unchecked(device: torch.device) -> str | None:
    """Return why the CUDA kernels serve a GPU by name alone; None if checked there, or unavailable."""
    if cuda_unavailable() is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return gpu_checks.missing(f"{major}.{minor}", cuda_sources())


def capability() -> str:
    """Return the instruction set of the CPU sweeps: 'avx512', 'avx2' or 'default'.

    OPSD_CPU_CAPABILITY limits it. Raises RuntimeError if the variable names none of them.
    """
    return torch.ops.opsd_kernels.cpu_capability()


@cache
def has_amx() -> bool:
    """True on an x86 CPU with tile units (AMX), so far Intel's."""
    return torch.cpu._is_amx_tile_supported()


@cache
def mm_has_units(dtype: torch.dtype) -> bool:
    """True if `torch.mm` on CPU matrices of `dtype` calls a library.

    Otherwise torch runs loops of its own, an order of magnitude slower.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


@cache
def gemm_unavailable() -> str | None:
    """Return None if `gemm_bf16_` (csrc/cpu/gemm.h) works here, else the reason why it is not used."""
    ops = torch.ops.opsd_kernels
    return load() or ops.gemm_unavailable() or _wrong_product(ops.gemm_bf16_, torch.bfloat16)


@cache
def gemm_fp32_unavailable() -> str | None:
    """Return None where `gemm_fp32_` takes the place of `torch.mm`, else the reason why not.

    On AMD's processors MKL, behind `torch.mm`, leaves AVX-512 unused (docs/guides/build.md).
    """
    ops = torch.ops.opsd_kernels
    return load() or ops.gemm_fp32_unavailable() or _wrong_product(ops.gemm_fp32_, torch.float32)


@cache
def gemm_fp32_serves(dtype: torch.dtype) -> bool:
    """Return True where `gemm_fp32_` takes the place of `torch.mm` on CPU matrices."""
    return dtype == torch.float32 and gemm_fp32_unavailable() is None


def _wrong_product(gemm: Callable[[Tensor, Tensor, Tensor, bool], None], dtype: torch.dtype) -> str | None:
    """Return None if a GEMM is right on every kind of edge, else the reason not to use it.

    bf16's micro-kernel is not part of torch's public interface. The try must not depend on torch's default
    dtype or device, nor on autocast, which leaves float64 alone: its outcome holds for the process.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    generator = torch.Generator("cpu").manual_seed(0)
    for M, N, K in ((1, 1, 1), (67, 83, 97)):
        a, b = random(M, K), random(K, N)
        for left, right in ((a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b)):
            out = torch.ones(M, N, dtype=torch.float32, device="cpu")
            try:
                gemm(left, right, out, True)
            except RuntimeError:  # of oneDNN, where ONEDNN_MAX_CPU_ISA takes its units away
                return "a first try failed"
            if not torch.allclose(out.double(), 1 + a.double() @ b.double(), rtol=1e-4, atol=1e-4):
                return "a first try gave a wrong product"
    return None
