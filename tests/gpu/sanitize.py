"""Launch the row kernels of a backend for compute-sanitizer.

Every kind, form, type, option and layout on small shapes, and a few rows long enough to need a cluster.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py cuda
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Every tensor is an allocation of its own, so that one entry beyond it is an error.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rows"))

import placing
import torch
from row_cases import DTYPES, FORMS, Rows, make_rows, run_rows
from row_options_contract import CLIPS
from row_options_contract import make_rows as make_option_rows

from opsd_kernels._rows.contract import narrowed
from opsd_kernels.spec import Kind

SMALL = [(1, 1), (3, 7), (5, 130), (3, 1003)]
LONG = [4104] if placing.DRY_RUN else [32000, 50257, 151936]


def sweeps(backend: placing.PlacedRows, rows: Rows) -> None:
    for make in (Rows.copy, Rows.contiguous):
        for route in ("apart", "fused"):
            run_rows(backend, make(rows), route)


def walk(backend: placing.PlacedRows) -> int:
    count = 0
    for kind in Kind:
        for dtype in [dtype for dtype in DTYPES if placing.unserved(backend.name, dtype) is None]:
            form = list(FORMS)[(int(kind) + DTYPES.index(dtype)) % len(FORMS)]
            for n, V in SMALL:
                sweeps(backend, make_rows(n, V, dtype, form, kind))
                count += 1
        for V in LONG:
            dtype = (torch.bfloat16, torch.float32)[(int(kind) + V) % 2]
            sweeps(backend, make_rows(2, V, dtype, "difference, linear" if V % 2 else "pair", kind))
            work = make_rows(2, V, torch.float32, "pair", kind).copy()
            run_rows(backend, work, "fused", narrowed(work.S, torch.bfloat16))
            count += 2
        every = {"policy": True, "teacher_mix": 0.25, **CLIPS["both"]}
        for route in ("apart", "fused"):
            run_rows(backend, make_option_rows(5, 1003, torch.bfloat16, "pair", kind, **every), route)
            count += 1
    return count


if __name__ == "__main__":
    name = sys.argv[1]
    print(f"{name}: {walk(placing.PlacedRows(name))} chunks of rows on {placing.DEVICE}")
