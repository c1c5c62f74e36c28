"""Every environment variable of the package: name, default, meaning.

No other module reads OPSD_*. `make docs` writes docs/reference/environment.md from this table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """An environment variable. Unset and empty both mean `default`, which is given in words."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()

    def get(self) -> str | None:
        """Return the value, or None if unset. Raises ValueError for a value outside `choices`."""
        value = os.environ.get(self.name, "").strip()
        if value and self.choices and value not in self.choices:
            raise ValueError(
                f"{self.name}: expected one of {', '.join(map(repr, self.choices))}, got {value!r}"
            )
        return value or None


BACKEND = Variable(
    "OPSD_BACKEND",
    "the first usable one",
    "Row backend of every call without `backend`. A backend that cannot serve is an error, not a fallback.",
    ("cuda", "triton", "cpp", "torch"),
)
WORKSPACE_BYTES = Variable(
    "OPSD_WORKSPACE_BYTES",
    "the planner's",
    "Byte budget of the logit buffers of every call without `workspace_bytes`.",
)
CPU_CAPABILITY = Variable(
    "OPSD_CPU_CAPABILITY",
    "the widest the processor has",
    "Upper limit of the instruction set of the C++ kernels. Read once, when the extension is loaded.",
    ("avx512", "avx2", "default"),
)
PACK = Variable(
    "OPSD_PACK",
    "1",
    "1: pack the valid rows before the GEMMs, with one host sync for their number if mask or labels are on a "
    "GPU. 0: project every row, the invalid ones as zeros, without a sync. Always 0 during CUDA graph "
    "capture.",
    ("0", "1"),
)
CUDA_CLUSTER = Variable(
    "OPSD_CUDA_CLUSTER",
    "8",
    "Largest cluster of thread blocks that hold one row on chip together (CUDA kernels, compute capability "
    "9.0 and above). 0: every sweep reads the row from memory.",
    ("0", "1", "2", "4", "8"),
)
BUILD_CPU = Variable(
    "OPSD_BUILD_CPU",
    "auto",
    "At build time. auto: C++ kernels if torch and a C++20 compiler are found. 1: an error if they cannot be "
    "built. 0: none.",
    ("auto", "0", "1"),
)
BUILD_CUDA = Variable(
    "OPSD_BUILD_CUDA",
    "auto",
    "At build time. auto: CUDA kernels if torch has CUDA and nvcc is found. 1: an error if they cannot be "
    "built. 0: none.",
    ("auto", "0", "1"),
)
CUDA_ARCHITECTURES = Variable(
    "OPSD_CUDA_ARCHITECTURES",
    "80,90a,100a and PTX",
    "At build time. The GPUs that the CUDA kernels are compiled for, as in sm_90a, separated by commas.",
)
CACHE = Variable(
    "OPSD_CACHE",
    "opsd_kernels in XDG_CACHE_HOME, or in ~/.cache",
    "Directory of the trainer's warm-started base models, and of the rows that `opsd bench --suite sparse` "
    "captures. Safe to delete.",
)

VARIABLES = (
    BACKEND,
    WORKSPACE_BYTES,
    CPU_CAPABILITY,
    PACK,
    CUDA_CLUSTER,
    BUILD_CPU,
    BUILD_CUDA,
    CUDA_ARCHITECTURES,
    CACHE,
)


def workspace_bytes() -> int | None:
    """Return the bytes, or None if unset. Raises ValueError for anything but a positive whole number."""
    value = WORKSPACE_BYTES.get()
    if value is not None and not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"{WORKSPACE_BYTES.name}: expected a positive whole number of bytes, got {value!r}")
    return None if value is None else int(value)


def cpu_capability() -> str | None:
    return CPU_CAPABILITY.get()


def pack() -> bool:
    return PACK.get() != "0"


def cache_dir() -> Path:
    """Return the cache directory, which may not exist yet. Without OPSD_CACHE it follows XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(CACHE.get() or f"{base}/opsd_kernels").expanduser()


def markdown() -> str:
    """Return the text of docs/reference/environment.md."""
    rows = [
        f"| `{v.name}` | {', '.join(f'`{c}`' for c in v.choices) or 'any'} | {v.default} | {v.meaning} |"
        for v in VARIABLES
    ]
    head = ["# Environment variables", "", "Generated from `opsd_kernels/env.py` by `make docs`.", ""]
    return "\n".join([*head, "| name | values | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])
