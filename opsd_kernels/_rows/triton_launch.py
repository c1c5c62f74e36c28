"""Arguments of the Triton kernels beside the tensors: tile, mode, scalars."""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from ..spec import LogitTransform, RowSpec

# MODE: the content of T. LINEAR takes the teacher mix into its factor; the MIXED modes mix both logits.
PLAIN, DIFFERENCE, LINEAR, PLAIN_MIXED, DIFFERENCE_MIXED = (tl.constexpr(mode) for mode in range(5))

# Without a limit, ptxas spills up to 48 bytes per thread to reach the next step of occupancy (64 or 80
# registers): 19 of 540 variants, most of them fused. With this limit no variant spills. Aligned rows take at
# most 128 registers but in float64; unaligned ones with softcaps, biases and metrics up to 163, clips or
# none, so that one block fits on a multiprocessor. The default of fusion changes in Triton 3.10.
COMPILER_OPTIONS = {"maxnreg": 255, "enable_fp_fusion": True}


def config(V: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) for rows of V logits of `dtype`.

    A thread holds eight entries (float64: four), at most two 16-byte loads of each buffer.
    """
    if dtype == torch.float64:
        return 512, 4
    return (1024, 4) if V <= 1024 else (2048, 8)


def pack(aligned: bool, dtype: torch.dtype, BLOCK_V: int, num_warps: int) -> int:
    """Return PACK, how the compiler spreads a tile over threads.

    Positive where all rows are aligned: a thread holds PACK neighbours, 16 bytes. Else negative: entries far
    apart.
    """
    return 16 // dtype.itemsize if aligned else -(BLOCK_V // (32 * num_warps))


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
