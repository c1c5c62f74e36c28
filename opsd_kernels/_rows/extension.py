"""The compiled libraries, for the CPU and for CUDA: whether they are there, and what they can do here."""

from __future__ import annotations

import json
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).resolve().parents[1]


def _load(stem: str, what: str) -> str | None:
    libraries = sorted(PACKAGE.glob(f"{stem}.*so")) + sorted(PACKAGE.glob(f"{stem}*.pyd"))
    if not libraries:
        recorded = PACKAGE / "without_cpp_kernels.txt"  # setup.py puts it into a wheel without kernels
        return (
            f"the {what} not built: {recorded.read_text()}"
            if recorded.exists()
            else f"the {what} not built (docs/build.md)"
        )
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error.__cause__ or error}"  # torch's own text names the file alone
    return None


@cache
def load() -> str | None:
    """Registers the C++ extension's operators, once. None if they are there, else the reason why they are not."""
    return _load("_C", "C++ extension was")


def build_command() -> str:
    """The shell command that builds the C++ kernels for this installation, from where it was installed."""
    checkout = PACKAGE.parent
    if (checkout / "setup.py").is_file() and (checkout / "csrc").is_dir():
        return (
            f"cd {shlex.quote(str(checkout))} && {shlex.quote(sys.executable)} setup.py build_ext --inplace"
        )
    try:
        installed = distribution("opsd_kernels")
        installer, origin = (
            (installed.read_text("INSTALLER") or "").strip(),
            json.loads(installed.read_text("direct_url.json") or "{}"),
        )
    except PackageNotFoundError:
        installer, origin = "", {}
    if installer == "uv":  # which builds in an environment without torch, and keeps wheels
        command = f"uv pip install --python {shlex.quote(sys.executable)} --no-build-isolation --reinstall --no-deps --no-cache"
    else:
        command = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps --no-cache-dir"
    return f"{command} {_origin(origin)}"


def _origin(direct_url: dict) -> str:
    """What to install from: the folder, archive or repository of an installation by URL (PEP 610), else the source distribution of the index."""
    url = direct_url.get("url", "")
    if not url or url.endswith(".whl"):
        return "--no-binary opsd_kernels opsd_kernels"
    if "vcs_info" in direct_url:
        return shlex.quote(f"{direct_url['vcs_info']['vcs']}+{url}@{direct_url['vcs_info']['commit_id']}")
    return shlex.quote(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)


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
