"""The tables of `opsd doctor`, and the launches that `opsd plan` prints, as text.

They need torch and numpy alone: the command runs without the packages of the other commands. It shows the
machine itself, so it reads the backends and the GEMMs directly.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from . import env, tested_versions
from ._core import cpu_gemm
from ._rows import backends, extension
from ._rows.sweep_times import GPUS, predict
from .spec import Divergence
from .version import __version__

OLDEST_TORCH = (2, 10)
PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "liger-kernel", "trl")


class Section(NamedTuple):
    """A table: its title, its column headers (empty: none are shown), its rows."""

    title: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def sections() -> list[Section]:
    """Return all tables of the command."""
    devices = [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    kinds = ("cpu", *(["cuda"] if devices else []))
    return [
        Section("This machine", ("", ""), machine(devices)),
        Section(
            "Row backends, in order of preference",
            ("backend", *kinds),
            [(backend.name, *(service(backend, kind) for kind in kinds)) for backend in backends.BACKENDS],
        ),
        Section(
            "Environment",
            ("variable", "value"),
            [(variable.name, environment_value(variable)) for variable in env.VARIABLES],
        ),
    ]


def service(backend: backends.Backend, kind: str) -> str:
    """Return `usable`, the reason why a backend cannot serve `kind`, or why it serves by name alone."""
    reason = backend.unsupported(kind, None)
    if reason is not None:
        return reason
    count = torch.cuda.device_count() if kind == "cuda" else 1
    whys = [backend.by_name(torch.device(kind, index)) for index in range(count)]
    named = dict.fromkeys(why for why in whys if why is not None)
    if not named:
        return "usable"
    some = "" if None not in whys else f" on device {', '.join(str(i) for i, why in enumerate(whys) if why)}"
    return f'usable{some} as backend="{backend.name}" alone: {"; ".join(named)}'


def machine(devices: list[str]) -> list[tuple[str, str]]:
    """Return versions, CPU, compiled kernels and `devices`."""
    rows = [
        ("opsd_kernels", __version__),
        ("python", f"{tested_versions.note('python', platform.python_version())} on {platform.platform()}"),
    ]
    rows += [(package, tested_versions.note(package, installed_version(package))) for package in PACKAGES]
    rows.append(
        ("CPU", f"{torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")
    )
    old = too_old(torch.__version__)
    if old is not None:
        rows.append(("", old))
    rows.append(("C++ kernels", extension_state()))
    if extension.load():
        rows.append(("", f"to build them: {extension.build_command()}"))
    rows.append(("CUDA kernels", extension.cuda_unavailable() or "built, and the devices can run them"))
    rows.append(("bf16 to fp32", cpu_gemm.cpu_gemm_name(torch.bfloat16)))
    mm = extension.gemm_fp32_unavailable()
    rows.append(("fp32 GEMMs", f"torch.mm: {mm}" if mm else "the C++ extension's own"))
    cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    rows.append(("CUDA", "; ".join(devices) or f"no device (torch is built {cuda})"))
    return rows


def print_plainly() -> None:
    """Print all tables without rich."""
    for title, headers, rows in sections():
        shown = [row for row in (headers, *rows) if any(row)]
        widths = [max(len(row[column]) for row in shown) for column in range(len(headers))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in shown
        ]
        print("\n".join([title, "", *("  " + line for line in lines), ""]))


def extension_state() -> str:
    """Return the instruction set that the compiled kernels chose, or the reason why there are none."""
    try:
        return extension.load() or f"built, use {extension.capability()}"
    except RuntimeError as error:  # OPSD_CPU_CAPABILITY names no instruction set
        return str(error).splitlines()[0]


def too_old(version: str) -> str | None:
    """Return the limitations of a torch below OLDEST_TORCH; None from that version on."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return (
        f"torch {version} is older than {oldest}: compiled kernels do not load, and a GPU may not multiply "
        "16-bit matrices into an fp32 accumulator"
    )


def installed_version(package: str) -> str:
    """Return the version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment_value(variable: env.Variable) -> str:
    """Return the value in force, or the error of an invalid one."""
    try:
        value = variable.get()
    except ValueError as error:
        return str(error)
    return value if value is not None else f"not set ({variable.default})"


def launches(V: int, dtype: torch.dtype) -> dict[str, str]:
    """Describe how each GPU backend spreads a row of V logits over threads, or why it cannot serve.

    The sizes are heuristics; nothing is tuned when the op runs.
    """
    reasons = backends.explain("cuda", dtype)
    cuda, triton = reasons["cuda"], "triton is not installed"
    if cuda is None:
        major, minor = torch.cuda.get_device_capability()
        cuda = torch.ops.opsd_kernels.cuda_launch(V, dtype.itemsize, 10 * major + minor)
    if reasons["triton"] != triton:
        from ._rows.triton_launch import config

        block, warps = config(V, dtype)
        triton = f"each sweep one block of {32 * warps} threads per row, {block} columns at a time"
    return {"cuda row kernels": cuda, "triton row kernels": triton}


def row_kernels(n: int, V: int, dtype: torch.dtype, divergence: Divergence) -> dict[str, str]:
    """Describe a GPU's row kernels: their launches, and their time over n rows as sweep_times.py predicts it.

    No measurement backs the prediction.
    """
    found = launches(V, dtype)
    for backend in ("cuda", "triton"):
        for gpu in GPUS:
            if made := predict(backend, divergence.kind, dtype, n, V, gpu):
                found[f"{backend} row kernels, {gpu.name}"] = str(made[-1])
    return found
