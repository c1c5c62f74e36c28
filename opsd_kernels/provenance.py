"""The origin of a measurement: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def package_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str:
    """Return the commit of this package's sources, or `unknown` in a copy without git.

    It ends in `-dirty` where `opsd_kernels` or `csrc` differ from the commit.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:
        commit = ""
    if not commit:
        return "unknown"
    return commit + (
        "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", "opsd_kernels", "csrc") else ""
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def describe_machine(device: str) -> dict[str, object]:
    """Return the machine's processor, memory and, on CUDA, GPU; `name` is one line for tables."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "capability": capability,
        "memory_bytes": _memory_bytes(),
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        own = {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        return {"name": name, **own, **cpu}
    return {
        "name": f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {capability}",
        **cpu,
        "load_before": load,
    }
