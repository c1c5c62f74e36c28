"""Peak memory of one call, measured in a subprocess."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable

from ..spec import expect

_CHILD = """
import ctypes, gc, pickle, sys
sys.path[:] = {path!r}
{source}
import torch
torch.set_num_threads({threads})
call = make(*pickle.loads(bytes.fromhex({args!r})))
gc.collect()
if {cuda}:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
else:
    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")
    before = status("VmRSS")
    kept = call()
    peak = status("VmHWM")
print("peak", peak - before)
"""


def peak_bytes(make: Callable | str, *args: object, device: str = "cpu", threads: int = 2) -> int:
    """Measure the peak memory of one call above the memory live before it, in bytes, outputs included.

    The call runs in a subprocess. `make` is a function of an importable module, or source text that defines a
    function `make`. It is called with `args` (picklable) and returns the call to measure, which takes no
    arguments; let `make` run a small call of the same kind first, so that libraries are loaded. On the CPU
    the peak is the high-water mark of resident memory (Linux only), on CUDA the caching allocator's.
    """
    expect(device in ("cpu", "cuda"), "device", "'cpu' or 'cuda'", repr(device))
    expect(
        device == "cuda" or sys.platform == "linux",
        "device",
        "'cuda', or 'cpu' on Linux, whose /proc has the peak of a process",
        f"'cpu' on {sys.platform}",
    )
    if callable(make):
        make = f"from {make.__module__} import {make.__qualname__} as make"
    program = _CHILD.format(
        path=sys.path, source=make, threads=threads, args=pickle.dumps(args).hex(), cuda=device == "cuda"
    )
    done = in_child(program)
    if done.returncode or not done.stdout.startswith("peak"):
        raise RuntimeError(
            f"the measured process ended with status {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return int(done.stdout.split()[1])


def in_child(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a fresh process, and return its exit code and what it printed."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
