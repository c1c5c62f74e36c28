"""Everything in `_core` and `_rows` that the benchmark reads: planner, logits dtype, row backends.

The benchmark shows the machine itself, so the public functions are not enough: it times row sweeps
by backend, compares memory with the planner's model, and counts the numbers that vocabulary ranks exchange.
No other module under bench/ imports `_core` or `_rows` (tests/test_repo.py).
"""

from .._core.planner import (
    CPU_SCRATCH_BYTES,
    CPU_SCRATCH_PER_THREAD,
    DEFAULT_WORKSPACE_BYTES,
    ChunkPlan,
    Products,
    plan,
    resolve_logits,
    row_bytes,
)
from .._core.waves import FLOPS_PER_BYTE, whole_waves
from .._rows import backends, sweep_times
from .._rows.contract import Column

__all__ = [
    "CPU_SCRATCH_BYTES",
    "CPU_SCRATCH_PER_THREAD",
    "DEFAULT_WORKSPACE_BYTES",
    "FLOPS_PER_BYTE",
    "ChunkPlan",
    "Column",
    "Products",
    "backends",
    "plan",
    "resolve_logits",
    "row_bytes",
    "sweep_times",
    "whole_waves",
]
