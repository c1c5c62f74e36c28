"""Every environment variable of the package: name, default, meaning. Nothing else reads OPSD_*, and docs/environment.md is printed from here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """An environment variable. Unset and empty mean the same: `default`, told in words."""

    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()

    def get(self) -> str | None:
        """The value, or None if unset. Raises ValueError where the variable has choices and holds none of them."""
        value = os.environ.get(self.name, "").strip()
        if value and self.choices and value not in self.choices:
            raise ValueError(
                f"{self.name}: expected one of {', '.join(map(repr, self.choices))}, got {value!r}"
            )
        return value or None


BACKEND = Variable(
    "OPSD_BACKEND",
    "the first usable one",
    "Row backend of every call that names none. One that cannot serve is an error, not a fallback.",
    ("cuda", "triton", "cpp", "torch"),
)
WORKSPACE_BYTES = Variable(
    "OPSD_WORKSPACE_BYTES",
    "the planner's",
    "Byte budget of the logit buffers of every call that sets no `workspace_bytes`.",
)
CPU_CAPABILITY = Variable(
    "OPSD_CPU_CAPABILITY",
    "the widest the processor has",
    "Limits the instruction set that the C++ kernels choose. Read once, when the extension is loaded.",
    ("avx512", "avx2", "default"),
)
PACK = Variable(
    "OPSD_PACK",
    "1",
    "1: rows that count are packed before the GEMMs, which waits once for their number where mask or labels are on a GPU. 0: every row is projected, and those "
    "that do not count as zeros; nothing waits. While a CUDA graph is captured it is always 0.",
    ("0", "1"),
)
CUDA_CLUSTER = Variable(
    "OPSD_CUDA_CLUSTER",
    "8",
    "The most thread blocks of a CUDA kernel that hold one row on chip together (compute capability 9.0 and above). 0: every sweep reads it from memory.",
    ("0", "1", "2", "4", "8"),
)
BUILD_CPU = Variable(
    "OPSD_BUILD_CPU",
    "auto",
    "When the package is built. auto: C++ kernels where torch and a C++20 compiler are found. 1: an error if they cannot be built. 0: none.",
    ("auto", "0", "1"),
)
BUILD_CUDA = Variable(
    "OPSD_BUILD_CUDA",
    "auto",
    "When the package is built. auto: CUDA kernels where torch has CUDA and nvcc is found. 1: an error if they cannot be built. 0: none.",
    ("auto", "0", "1"),
)
CACHE = Variable(
    "OPSD_CACHE",
    "opsd_kernels in XDG_CACHE_HOME, or in ~/.cache",
    "Directory of the trainer's warm-started base models. Safe to delete.",
)

VARIABLES = (BACKEND, WORKSPACE_BYTES, CPU_CAPABILITY, PACK, CUDA_CLUSTER, BUILD_CPU, BUILD_CUDA, CACHE)


def backend() -> str | None:
    return BACKEND.get()


def workspace_bytes() -> int | None:
    """Bytes, or None if unset. Raises ValueError for anything but a positive whole number."""
    value = WORKSPACE_BYTES.get()
    if value is not None and not (value.isdecimal() and int(value) > 0):
        raise ValueError(f"{WORKSPACE_BYTES.name}: expected a positive whole number of bytes, got {value!r}")
    return None if value is None else int(value)


def cpu_capability() -> str | None:
    return CPU_CAPABILITY.get()


def pack() -> bool:
    return PACK.get() != "0"


def cache_dir() -> Path:
    """The cache directory; it need not exist yet. Follows XDG_CACHE_HOME where OPSD_CACHE is unset."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(CACHE.get() or f"{base}/opsd_kernels").expanduser()


def markdown() -> str:
    """docs/environment.md."""
    rows = [
        f"| `{v.name}` | {', '.join(f'`{c}`' for c in v.choices) or 'any'} | {v.default} | {v.meaning} |"
        for v in VARIABLES
    ]
    head = ["# Environment variables", "", "Generated from `opsd_kernels/env.py` by `make docs`.", ""]
    return "\n".join([*head, "| name | values | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])
