"""Launches the row kernels of a backend on small shapes, for compute-sanitizer: every kind, form, type, option and layout, and rows as long as need a cluster.

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/gpu/sanitize.py cuda
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = (
    "1"  # every tensor an allocation of its own: one entry beyond it is an error
)

import placing
import torch

from opsd_kernels._rows.contract import narrowed
from opsd_kernels.spec import Kind

rows, options = placing.unit("test_rows"), placing.unit("test_rows_options")
SMALL = [(1, 1), (3, 7), (5, 130), (3, 1003)]
LONG = [4104] if placing.DRY_RUN else [32000, 50257, 151936]


def sweeps(backend: placing.PlacedRows, made: rows.Rows) -> None:
    for make in (rows.Rows.copy, lambda r: replace(r, S=r.S.contiguous(), T=r.T.contiguous())):
        for route in ("apart", "fused"):
            rows.run_rows(backend, make(made), route)


def walk(backend: placing.PlacedRows) -> int:
    count = 0
    for kind in Kind:
        for dtype in [dtype for dtype in rows.DTYPES if placing.unserved(backend.name, dtype) is None]:
            form = list(rows.FORMS)[(int(kind) + rows.DTYPES.index(dtype)) % len(rows.FORMS)]
            for n, V in SMALL:
                sweeps(backend, rows.make_rows(n, V, dtype, form, kind))
                count += 1
        for V in LONG:
            dtype = (torch.bfloat16, torch.float32)[(int(kind) + V) % 2]
            sweeps(backend, rows.make_rows(2, V, dtype, "difference, linear" if V % 2 else "pair", kind))
            work = rows.make_rows(2, V, torch.float32, "pair", kind).copy()
            rows.run_rows(backend, work, "fused", narrowed(work.S, torch.bfloat16))
            count += 2
        every = {"policy": True, "teacher_mix": 0.25, **options.CLIPS["both"]}
        for route in ("apart", "fused"):
            made = options.make_rows(5, 1003, torch.bfloat16, "pair", kind, **every)
            options.run_rows(backend, made, route, made.S)
            count += 1
    return count


if __name__ == "__main__":
    name = sys.argv[1]
    print(f"{name}: {walk(placing.PlacedRows(name))} chunks of rows on {placing.DEVICE}")
