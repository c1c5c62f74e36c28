"""Multiply 16-bit matrices on a CPU with an fp32 result, for which torch has no call.

The first usable one of these runs:

* the extension's `gemm_bf16_`, on oneDNN's micro-kernel;
* `cblas_gemm_bf16bf16f32` of the math library inside torch, on Intel processors with tile units;
* fp32 GEMMs over slices (`sliced_mm_`), always in fp16.

The other library calls are too expensive. At 256 x 64 x 151936 `cblas_gemm_f16f16f32` takes 148 MiB of fp32
copies per thread, with AMX and avx512_fp16 too, where dW takes 339 ms and slices take 181. `torch.mm` of fp16
on a processor without units takes 14 times as long as slices (N = 256, H = 512, V = 16000, AMD EPYC with
AVX-512).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .._rows import extension
from .sizes import SLICE_BYTES

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_CBLAS_NAME = "cblas_gemm_bf16bf16f32"


@functools.cache
def cblas_gemm() -> Callable[..., None] | None:
    """Return the math library's GEMM from bf16 operands to fp32.

    None where torch was built without it or the CPU lacks tile units.
    """
    if not extension.has_amx():
        return None
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            gemm = getattr(ctypes.CDLL(str(library)), _CBLAS_NAME)
        except (AttributeError, OSError):
            continue
        integer, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
        gemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
        gemm.restype = None
        return gemm
    return None


def _cblas_mm(gemm: Callable[..., None], a: Tensor, b: Tensor, out: Tensor, beta: float) -> None:
    """Compute out = a @ b + beta * out. Each matrix has one unit stride."""

    def layout(x: Tensor) -> tuple[int, int]:
        return (_NO_TRANS, x.stride(0)) if x.stride(1) == 1 else (_TRANS, x.stride(1))

    (trans_a, ld_a), (trans_b, ld_b) = layout(a), layout(b)
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    # A matrix of a single row may have any row stride.
    ld_a = max(ld_a, k if trans_a == _NO_TRANS else m)
    ld_b = max(ld_b, n if trans_b == _NO_TRANS else k)
    operands = a.data_ptr(), ld_a, b.data_ptr(), ld_b
    gemm(_ROW_MAJOR, trans_a, trans_b, m, n, k, 1.0, *operands, beta, out.data_ptr(), max(out.stride(0), n))


def sliced_mm_(
    a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False, centre: Tensor | None = None
) -> None:
    """Compute out = a @ b, (M, K) @ (K, N), by fp32 GEMMs over slices of the longest dimension.

    With `accumulate` the product is added to `out`. The fp32 copies of a slice share one buffer of
    SLICE_BYTES; the unsliced operand is copied whole. A 16-bit `out` is rounded once, after
    `centre`, (M,), was subtracted from its rows.
    """
    (M, K), N = a.shape, b.shape[1]
    narrow = out.dtype != torch.float32
    shift = (out.new_zeros(1, dtype=torch.float32) if centre is None else centre)[:, None].expand(M, N)
    if K >= max(M, N):
        total, step = (_scratch(M, N) if narrow else out), _slice_length(M + N)
        buffer = _slice_buffer((M + N) * min(step, K))
        for k in range(0, K, step):
            left = _widened(a[:, k : k + step], buffer)
            right = _widened(b[k : k + step], buffer[left.numel() :])
            torch.addmm(total, left, right, beta=float(accumulate or k > 0), out=total)
        if narrow:
            out.copy_(total if centre is None else total.sub_(shift))
        return
    if M > N:
        a, b, out, shift = b.t(), a.t(), out.t(), shift.t()
    (M, K), N = a.shape, b.shape[1]
    step = _slice_length(K + M * narrow)
    left, buffer = a.float(), _slice_buffer((K + M * narrow) * min(step, N))
    for n in range(0, N, step):
        part = out[:, n : n + step]
        right = _widened(b[:, n : n + step], buffer)
        if narrow:
            total = torch.mm(left, right, out=buffer[right.numel() :][: part.numel()].view(part.shape))
            part.copy_(total if centre is None else total.sub_(shift[:, n : n + step]))
        elif part.stride(1) == 1:
            torch.addmm(part, left, right, beta=float(accumulate), out=part)
        else:
            torch.addmm(part.t(), right.t(), left.t(), beta=float(accumulate), out=part.t())


def _slice_length(width: int) -> int:
    return max(64, SLICE_BYTES // (4 * width))


_of_thread = threading.local()


def _slice_buffer(size: int) -> Tensor:
    """Return `size` fp32 entries, from memory that a thread keeps where they fit SLICE_BYTES.

    Products of different shapes would allocate and free different sizes, which leave holes in the heap. A
    storage is kept, since a tensor made in inference mode could not be written outside of it.
    """
    if 4 * size > SLICE_BYTES:
        return _scratch(size)
    kept = getattr(_of_thread, "slices", None)
    if kept is None or kept.nbytes() < 4 * size:
        kept = _of_thread.slices = torch.UntypedStorage(SLICE_BYTES, device="cpu")
    return _scratch(0).set_(kept, 0, (size,), (1,))


def _scratch(*shape: int) -> Tensor:
    """Allocate fp32 on the CPU, whatever torch's default dtype and device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _widened(x: Tensor, buffer: Tensor) -> Tensor:
    """Copy a matrix into the fp32 buffer, keeping its memory order."""
    if x.stride(0) == 1 != x.stride(1):
        return _widened(x.t(), buffer).t()
    return buffer[: x.numel()].view(x.shape).copy_(x)


def cpu_gemm_name(dtype: torch.dtype) -> str:
    """Return the name of the GEMM of 16-bit matrices with an fp32 result on this CPU."""
    if slices(dtype):
        return "fp32 GEMMs over slices"
    return "oneDNN's micro-kernel" if extension.gemm_unavailable() is None else _CBLAS_NAME


def slices(dtype: torch.dtype) -> bool:
    """Return True if `widening_mm` runs fp32 GEMMs over slices of 16-bit matrices."""
    return dtype != torch.bfloat16 or (extension.gemm_unavailable() is not None and cblas_gemm() is None)


def widening_mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write a @ b of 16-bit CPU matrices into an fp32 `out`, or add it to `out`."""
    if a.dtype == torch.bfloat16 and extension.gemm_unavailable() is None:
        torch.ops.opsd_kernels.gemm_bf16_(a, b, out, accumulate)
    elif a.dtype == torch.bfloat16 and (gemm := cblas_gemm()):
        _cblas_mm(gemm, a, b, out, beta=float(accumulate))
    else:
        sliced_mm_(a, b, out, accumulate)
