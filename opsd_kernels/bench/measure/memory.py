"""Peak memory of the op alone, and runs under a memory limit.

On a CPU both happen in a child process; on CUDA the caching allocator counts.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...testing import memory, peak_bytes
from ..providers import BASE, PROVIDERS, bare_gemms, stepper
from ..shapes import Setting, make_case
from .timing import Variant, interleave

PLANNED = ("opsd", "opsd-cpp", "opsd-triton", "opsd-cuda")  # providers whose peak the planner predicts
SMALL = {"N": 64, "V": 999}  # sizes of the call that loads libraries before anything is counted


class OutOfMemory(RuntimeError):
    """The op needed more than its limit, or more than the machine has."""


def limit_data(nbytes: int) -> None:
    """Limit private memory to `nbytes` above the current use: PyTorch then raises before the OOM killer acts.

    Linux only.
    """
    import resource

    with open("/proc/self/status") as lines:
        now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + nbytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def prepare(setting: dict[str, Any], provider: str, limit: int | None = None) -> Callable[[], Tensor]:
    """Return the call that `testing.peak_bytes` measures, after a small call of the same kind."""
    full = Setting(**setting)
    make = PROVIDERS[provider].make
    small = full.at(**{name: min(getattr(full, name), size) for name, size in SMALL.items()})
    stepper(make(small), make_case(small), small)()
    step = stepper(make(full), make_case(full), full)
    if limit is not None:
        limit_data(limit)
    return step


def peak_of(
    setting: Setting,
    provider: str,
    limit: int | None = None,
    make: Callable[..., Callable[[], Tensor]] | str = prepare,
) -> int:
    """Return the peak in bytes above the inputs, gradients included. Raises OutOfMemory.

    `make` is `prepare`, or, on a CPU, source text that defines `make` (see `testing.peak_bytes`).
    """
    if setting.device == "cuda":
        assert callable(make), "source text is for the child process of a CPU"
        return cuda_peak(make(setting.as_dict(), provider))
    try:
        return peak_bytes(make, setting.as_dict(), provider, limit, threads=torch.get_num_threads())
    except RuntimeError as error:
        raise _out_of_memory(str(error), limit) or error from None


def cuda_peak(step: Callable[[], Tensor]) -> int:
    """Return the caching allocator's peak during `step`, in bytes above the memory allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def _out_of_memory(text: str, limit: int | None) -> OutOfMemory | None:
    """Return OutOfMemory if the output of a failed process names a lack of memory."""
    if any(
        sign in text
        for sign in ("can't allocate memory", "MemoryError", "bad_alloc", "out of memory", "status -9")
    ):
        return OutOfMemory("out of memory" + (f" (limit {limit / 2**20:.0f} MiB)" if limit else ""))
    return None


# ---------------------------------------------------------------- time under a limit


def time_pair(
    setting: Setting, provider: str, limit: int | None, rounds: tuple[int, int], seconds: float
) -> dict[str, Variant]:
    """Time provider and bare GEMMs in turn, with `limit` bytes for everything beyond the inputs.

    A failure is recorded in its variant.
    """
    case = make_case(setting)
    variants = {
        BASE: Variant(bare_gemms(case, setting, setting.plan().rows)),
        provider: Variant(stepper(PROVIDERS[provider].make(setting), case, setting)),
    }
    if limit is not None:
        prepare(setting.at(N=SMALL["N"]).as_dict(), provider)()
        limit_data(limit)
    interleave(variants, BASE, setting.device, rounds=rounds, seconds=seconds)
    return variants


_CHILD = """
import json
import torch
from opsd_kernels.bench import shapes
from opsd_kernels.bench.measure import memory
setting, provider, limit, rounds, seconds, threads = json.loads({arguments!r})
torch.set_num_threads(threads)
variants = memory.time_pair(shapes.Setting(**setting), provider, limit, tuple(rounds), seconds)
print("RESULT" + json.dumps({{name: [v.times, v.failure] for name, v in variants.items()}}))
"""


def time_under_limit(
    setting: Setting, provider: str, limit: int | None, rounds: tuple[int, int], seconds: float
) -> dict[str, Variant]:
    """Run `time_pair`, on a CPU in a child process that the limit applies to. Raises OutOfMemory."""
    if setting.device == "cuda":
        return time_pair(setting, provider, None, rounds, seconds)
    arguments = json.dumps([setting.as_dict(), provider, limit, rounds, seconds, torch.get_num_threads()])
    done = memory.in_child(_CHILD.format(arguments=arguments))
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise _out_of_memory(f"status {done.returncode} {done.stderr}", limit) or RuntimeError(
            f"status {done.returncode}: {done.stderr.strip()[-200:]}"
        )
    out = {}
    for name, (times, failure) in json.loads(line.removeprefix("RESULT")).items():
        out[name] = Variant(
            run=lambda: None, times={int(turn): value for turn, value in times.items()}, failure=failure
        )
    return out
