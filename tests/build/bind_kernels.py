"""Call the functions of triton_rows as on a GPU, up to the launch itself.

Arguments are bound and specialised for sm_90. What a plain call binds is what compile_kernels.py compiles;
rarer calls are compiled here. A fake driver of an sm_90 GPU replaces Triton's. Prints a line per kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compile_kernels
from compile_kernels import TYPES, Variant

from opsd_kernels._rows import triton_launch, triton_rows
from opsd_kernels._rows.triton_columns import COLUMN_KERNELS
from opsd_kernels.spec import Divergence, Kind, LogitTransform, RowSpec

NAMES = {name: kernel.fn.__name__ for name, kernel in triton_rows.KERNELS.items()}


class AbsentGpu:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def stop_short(kernel: triton.runtime.JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
    """Stand for `kernel[grid]`: bind and compile."""

    def call(**arguments: object) -> None:
        kernel.warmup(grid=grid, **arguments)

    return call


class Compiler:
    """Stands for Triton's: keeps each source with its options, and compiles those in `wanted`."""

    def __init__(self) -> None:
        self.wanted: tuple[str, ...] = ()
        self.real = triton.compiler.compile
        self.bound: dict[str, tuple[object, dict[str, object]]] = {}

    def __call__(self, source, target=None, options=None, **rest):
        self.bound[source.name] = source, options
        compiled = source.name in self.wanted
        print(source.name, "compiled" if compiled else "bound", flush=True)
        return self.real(source, target=target, options=options, **rest) if compiled else None


def binding(source) -> tuple[dict, dict, dict]:
    """Return what decides the code of a source: types, constants, and what is known of the others."""
    constants = dict(source.constants)
    known = {place: facts for place, facts in source.attrs.items() if facts and place not in constants}
    return source.signature, constants, known


def check_bound(compiler: Compiler, variants: list[Variant]) -> None:
    """Fail where compile_kernels.py compiles a kernel for other arguments than a call gives it."""
    for variant in variants:
        make = (
            compile_kernels.column_source if variant.kernel in COLUMN_KERNELS else compile_kernels.row_source
        )
        (source, num_warps, PACK), (bound, options) = make(variant), compiler.bound[NAMES[variant.kernel]]
        assert binding(source) == binding(bound), (variant, binding(source), binding(bound))
        told = {"num_warps": num_warps, **triton_launch.compiler_options(TYPES[variant.dtype], PACK)}
        assert told == {name: options[name] for name in told}, (variant, told, options)


def sweep(
    n: int, V: int, dtype: torch.dtype, spec: RowSpec, bias: torch.Tensor | None, *policy: torch.Tensor
) -> None:
    S, T = torch.zeros(n, V, dtype=dtype), torch.zeros(n, V, dtype=dtype)
    factor = torch.ones(n)
    stats, _, A = triton_rows.row_fused_(S, T, factor, spec, bias, bias, True, S, *policy)
    triton_rows.row_stats(S, T, spec, bias, bias, False)
    triton_rows.row_dot(S, T, stats, spec, bias, bias)
    triton_rows.row_grad_(S, T, stats, A, factor, spec, bias, bias, S, *policy)
    _, sums = triton_rows.column_norms(S, factor if policy else None)
    columns = torch.arange(0, V, 2)
    triton_rows.gather_columns_(S, columns, S.new_empty(n, len(columns)), sums)


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGpu())
    triton.runtime.JITFunction.__getitem__ = stop_short

    # A plain call: the variants of the tables.
    triton.compiler.compile = compiler = Compiler()  # which a kernel keeps from its first call on
    sweep(4, 151936, torch.bfloat16, RowSpec(Divergence(Kind.JSD, 0.3), difference=True), None)
    base = Variant(90, "fused", "bf16", int(Kind.JSD))
    plain = [replace(base, kernel=kernel) for kernel in ("stats", "dot", "grad")]
    columns = [replace(base, kernel=kernel, kind=0, form="plain") for kernel in ("norms", "gather")]
    check_bound(compiler, [replace(base, metrics=True), *plain, *columns])

    # Rows that are not aligned, with all options but one row's own temperature.
    compiler.wanted = tuple(NAMES.values())
    options = {"teacher_mix": 0.1, "entry_clip": 0.05, "token_clip": 2.0}
    spec, labels = RowSpec(Divergence(Kind.REVERSE_KL), **options), torch.zeros(4, dtype=torch.int64)
    sweep(4, 1003, torch.float32, spec, None, torch.ones(4), labels)

    # Triton takes a size or stride of 1 as a constant. The fused kernel holds the other sweeps.
    compiler.wanted = tuple(NAMES[name] for name in ("fused", *COLUMN_KERNELS))
    spec = RowSpec(Divergence(Kind.TVD), LogitTransform(1.0, 30.0, 0.7), LogitTransform())
    sweep(1, 1, torch.float32, spec, torch.zeros(1))
    sys.exit(torch.cuda.is_initialized())
