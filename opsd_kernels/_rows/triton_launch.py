"""Arguments of the Triton kernels beside the tensors: tile, mode, scalars."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import LogitTransform, RowSpec

# MODE: the content of T. LINEAR takes the teacher mix into its factor; the MIXED modes mix both logits.
PLAIN, DIFFERENCE, LINEAR, PLAIN_MIXED, DIFFERENCE_MIXED = (tl.constexpr(mode) for mode in range(5))

# Registers of a thread. Without a limit, ptxas spills up to 48 bytes per thread to reach the next step of
# occupancy (64 or 80 registers): 19 of 540 variants, most of them fused. Aligned rows take at most 128, of
# which two blocks fit on a multiprocessor: without that limit some with softcaps, biases, a mix and metrics
# took 146, and no variant spills under it. Unaligned ones with these options spilled up to 104 bytes.
MOST_REGISTERS, ALIGNED_REGISTERS = 255, 128

# Rows of a tile of triton_columns.py, and its warps. The column norms take 40 to 58 registers for aligned
# rows. So eight blocks or more fit on a multiprocessor, each with two 16-byte loads per thread under way.
# Tiles of 16 rows took 96, and 138 for unaligned rows.
COLUMN_HEIGHT, COLUMN_WARPS = 8, 4
# Programs of the column norms: two rounds of the 132 multiprocessors of an H200.
PROGRAMS = 2048
# A program's column norms are 4 bytes a column, written and read once: 6 % of 64 rows of 16 bits.
LEAST_ROWS = 64


def config(V: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) for rows of V logits of `dtype`.

    A thread holds eight entries (float64: four), at most two 16-byte loads of each buffer.
    """
    if dtype == torch.float64:
        return 512, 4
    return (1024, 4) if V <= 1024 else (2048, 8)


def column_block(dtype: torch.dtype) -> int:
    """Return the columns of a tile: one warp reads 16 bytes per thread in a row of it."""
    return 32 * 16 // dtype.itemsize


def split_rows(n: int, V: int, block: int) -> int:
    """Return the rows of one program of the column norms, whole tiles.

    152k columns of 16 bits are 594 blocks, enough for a GPU but uneven, and 8k columns only 32. So rows are
    split, until there are PROGRAMS of them or few rows each. This depends on sizes alone: so do the bits.
    """
    splits = min(triton.cdiv(PROGRAMS, triton.cdiv(V, block)), triton.cdiv(n, LEAST_ROWS))
    return triton.cdiv(triton.cdiv(n, splits), COLUMN_HEIGHT) * COLUMN_HEIGHT


def pack(aligned: bool, dtype: torch.dtype, BLOCK_V: int, num_warps: int) -> int:
    """Return PACK, how the compiler spreads a tile over threads.

    Positive where all rows are aligned: a thread holds PACK neighbours, 16 bytes. Else negative: entries far
    apart.
    """
    return 16 // dtype.itemsize if aligned else -(BLOCK_V // (32 * num_warps))


def compiler_options(dtype: torch.dtype, PACK: int) -> dict[str, object]:
    """Return the compiler's options for logits of `dtype`. The default of fusion changes in Triton 3.10."""
    limited = PACK > 0 and dtype != torch.float64
    return {"maxnreg": ALIGNED_REGISTERS if limited else MOST_REGISTERS, "enable_fp_fusion": True}


def aligned(S: Tensor, T: Tensor) -> bool:
    """True if addresses in bytes and strides in entries are divisible by 16, Triton's own criterion."""
    return all(number % 16 == 0 for number in (S.data_ptr(), T.data_ptr(), S.stride(0), T.stride(0)))


def is_narrowed(S: Tensor, G: Tensor) -> bool:
    """True if G is the narrowed view of S."""
    return G.dtype != S.dtype and G.data_ptr() == S.data_ptr()


def mode(spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> int:
    """Return the MODE of a call."""
    if spec.linear_difference(bias_s is bias_t):
        return LINEAR.value
    if spec.teacher_mix:
        return (DIFFERENCE_MIXED if spec.difference else PLAIN_MIXED).value
    return (DIFFERENCE if spec.difference else PLAIN).value


def _scalars(transform: LogitTransform) -> tuple[float, float]:
    """Return (inner, outer): a logit is y * outer, y of triton_math.bend; rows may divide outer further."""
    temperature = 1.0 if isinstance(transform.temperature, Tensor) else transform.temperature
    if transform.softcap is None:
        return 1.0, transform.scale / temperature
    return transform.scale / transform.softcap, transform.softcap / temperature


def transforms(spec: RowSpec) -> dict[str, object]:
    """Return both sides' transforms. The teacher's outer factor includes its weight in the mix.

    Temperatures of rows, where there are any, divide the outer factors in the kernel.
    """
    inner_s, outer_s = _scalars(spec.student)
    inner_t, outer_t = _scalars(spec.teacher)
    caps = {"CAP_S": spec.student.softcap is not None, "CAP_T": spec.teacher.softcap is not None}
    return {
        "inner_s": inner_s,
        "outer_s": outer_s,
        "inner_t": inner_t,
        "outer_t": (1 - spec.teacher_mix) * outer_t,
        "mix": spec.teacher_mix,
        "TemperatureS": spec.student.of_rows,
        "TemperatureT": spec.teacher.of_rows,
        **caps,
    }


def terms(spec: RowSpec) -> dict[str, object]:
    """Return the arguments of a term beside its kind."""
    return {"beta": spec.divergence.beta, "clip": spec.entry_clip, "CLIP": spec.entry_clip < math.inf}
