"""Runs programs of `testing.peak_bytes` in forks of a process that has imported torch."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from forks import Forks

TIMEOUT_S = 300


@functools.cache
def forks() -> Forks:
    """Start the process that forks the measured ones of this session, until `end`.

    OpenBLAS starts its threads when numpy is imported; torch has its own library.
    """
    return Forks("opsd_kernels", OPENBLAS_NUM_THREADS="1")


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Take the place of `in_child` in opsd_kernels/testing/memory.py."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = (Path(folder, name) for name in ("output", "errors"))
        [code] = forks().run("measured", [((program, str(output)), str(errors))], TIMEOUT_S)
        printed = output.read_text() if output.exists() else ""
        return subprocess.CompletedProcess("a fork", code, printed, errors.read_text())


def end() -> None:
    if forks.cache_info().currsize:
        forks().end()


def main(program: str, output: str) -> None:
    """Run a program as `python -c` does, with its stdout in a file."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o644), 1)
    exec(program, {"__name__": "__main__"})
