"""The GEMMs of the loss head: logits (or logit differences) into reused buffers, the hidden gradient, and the head's gradient into an fp32 accumulator.

The product of 16-bit matrices with an fp32 result has four homes. On CUDA: the library GEMM by `out_dtype`. On a CPU torch has no call for it. The first
usable one of these serves: the extension's `gemm_bf16_` on oneDNN's micro-kernel; `cblas_gemm_bf16bf16f32` / `f16f16f32` of the math library inside torch,
on Intel processors with units for the dtype; fp32 GEMMs over slices (`sliced_mm_`).

Without such units the libraries are no choice. At 256 x 151936 `cblas_gemm_f16f16f32` takes 148 MiB of fp32 copies per thread, and `torch.mm` of fp16 takes
14 times as long as slices do (N = 256, H = 512, V = 16000, AMD EPYC with AVX-512).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import extension
from .planner import SLICE_BYTES

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112  # CBLAS
_CBLAS_NAMES = {torch.bfloat16: "cblas_gemm_bf16bf16f32", torch.float16: "cblas_gemm_f16f16f32"}
_HUGE_PAGES, _PAGE = 14, 1 << 21  # MADV_HUGEPAGE and its page


def is_16_bit(dtype: torch.dtype) -> bool:
    return dtype in _CBLAS_NAMES


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if is_16_bit(dtype) else dtype


def same_storage(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same memory seen the same way. Two absent tensors are."""
    if a is None or b is None:
        return a is b
    return a is b or (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) == (b.data_ptr(), b.shape, b.stride(), b.dtype, b.device)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU in 2 MiB pages where the system grants them.

    First touch of 131 MiB takes 45 ms in 4 KiB pages and 14 ms in huge ones on a 2-core machine, a third of the four bf16 GEMMs it serves.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    nbytes = tensor.numel() * tensor.element_size()
    madvise = _madvise()
    if device.type == "cpu" and nbytes >= 2 * _PAGE and madvise is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        madvise(start, (tensor.data_ptr() + nbytes) // _PAGE * _PAGE - start, _HUGE_PAGES)  # advice only: a refusal changes nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # not a POSIX system
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


@functools.cache
def cblas_gemm(dtype: torch.dtype) -> Callable[..., None] | None:
    """Return the math library's 16-bit x 16-bit -> fp32 GEMM, or None where torch was built without it or the CPU lacks units for `dtype`."""
    if not (extension.has_amx() if dtype == torch.bfloat16 else extension.mm_has_units(dtype)):
        return None
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            gemm = getattr(ctypes.CDLL(str(library)), _CBLAS_NAMES[dtype])
        except (AttributeError, OSError):
            continue
        integer, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
        gemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
        gemm.restype = None
        return gemm
    return None


def _cblas_mm(gemm: Callable[..., None], a: Tensor, b: Tensor, out: Tensor, beta: float) -> None:
    """out = a @ b + beta * out; each matrix has one unit stride."""

    def layout(x: Tensor) -> tuple[int, int]:
        return (_NO_TRANS, x.stride(0)) if x.stride(1) == 1 else (_TRANS, x.stride(1))

    (trans_a, ld_a), (trans_b, ld_b) = layout(a), layout(b)
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    ld_a, ld_b = max(ld_a, k if trans_a == _NO_TRANS else m), max(ld_b, n if trans_b == _NO_TRANS else k)  # a single row may carry any stride
    gemm(
        _ROW_MAJOR, trans_a, trans_b, m, n, k, 1.0, a.data_ptr(), ld_a, b.data_ptr(), ld_b, beta, out.data_ptr(), max(out.stride(0), n)
    )  # fmt: skip


def sliced_mm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Write a @ b, or add it, into `out` by fp32 GEMMs over slices of the longest dimension. (M, K), (K, N) -> (M, N).

    The fp32 copies of a slice share one buffer of SLICE_BYTES; the operand that is not sliced is copied whole. A 16-bit `out` is rounded once.
    """
    (M, K), N = a.shape, b.shape[1]
    narrow = out.dtype != torch.float32
    if K >= max(M, N):
        total, step = (torch.empty(M, N) if narrow else out), _slice_length(M + N)
        buffer = torch.empty((M + N) * min(step, K))
        for k in range(0, K, step):
            left = _widened(a[:, k : k + step], buffer)
            right = _widened(b[k : k + step], buffer[left.numel() :])
            torch.addmm(total, left, right, beta=float(accumulate or k > 0), out=total)
        if narrow:
            out.copy_(total)
        return
    if M > N:
        a, b, out = b.t(), a.t(), out.t()
    (M, K), N = a.shape, b.shape[1]
    step = _slice_length(K + M * narrow)
    left, buffer = a.float(), torch.empty((K + M * narrow) * min(step, N))
    for n in range(0, N, step):
        part = out[:, n : n + step]
        right = _widened(b[:, n : n + step], buffer)
        if narrow:
            part.copy_(torch.mm(left, right, out=buffer[right.numel() :][: part.numel()].view(part.shape)))
        elif part.stride(1) == 1:
            torch.addmm(part, left, right, beta=float(accumulate), out=part)
        else:
            torch.addmm(part.t(), right.t(), left.t(), beta=float(accumulate), out=part.t())


def _slice_length(width: int) -> int:
    return max(64, SLICE_BYTES // (4 * width))


def _widened(x: Tensor, buffer: Tensor) -> Tensor:
    """Copy a matrix into the fp32 buffer, in its own order of memory."""
    if x.stride(0) == 1 != x.stride(1):
        return _widened(x.t(), buffer).t()
    return buffer[: x.numel()].view(x.shape).copy_(x)


def cpu_gemm_name(dtype: torch.dtype) -> str:
    """Return what multiplies 16-bit matrices into fp32 on this CPU."""
    if dtype == torch.bfloat16 and extension.gemm_unavailable() is None:
        return "oneDNN's micro-kernel"
    return _CBLAS_NAMES[dtype] if cblas_gemm(dtype) else "fp32 GEMMs over slices"


def _widening_mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write a @ b of 16-bit CPU matrices into an fp32 `out`, or add it."""
    if a.dtype == torch.bfloat16 and extension.gemm_unavailable() is None:
        torch.ops.opsd_kernels.gemm_bf16_(a, b, out, accumulate)
    elif gemm := cblas_gemm(a.dtype):
        _cblas_mm(gemm, a, b, out, beta=float(accumulate))
    else:
        sliced_mm_(a, b, out, accumulate)


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T. (C, H), (V, H) -> (C, V); `out` may be fp32 where the inputs are 16-bit."""
    if out.dtype == hidden.dtype:
        if out.device.type == "cpu" and not extension.mm_has_units(out.dtype):
            sliced_mm_(hidden, weight.t(), out)
        else:
            torch.mm(hidden, weight.t(), out=out)
    elif out.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        _widening_mm(hidden, weight.t(), out, accumulate=False)


def accumulate_weight_grad(G: Tensor, hidden: Tensor, dW: Tensor, first: bool) -> None:
    """dW (+)= G.T @ hidden. (C, V), (C, H) -> (V, H); `dW` may be fp32 where the inputs are 16-bit; what it held does not count if `first`."""
    Gt = G.t()
    if dW.dtype == G.dtype:
        if dW.device.type == "cpu" and first and not extension.mm_has_units(dW.dtype):
            sliced_mm_(Gt, hidden, dW)
        elif first:
            torch.mm(Gt, hidden, out=dW)
        else:
            dW.addmm_(Gt, hidden)
    elif dW.device.type == "cuda":  # `self` of the output's type: from torch 2.10 on; as it is `out`, nothing is copied
        _ = torch.mm(Gt, hidden, out_dtype=dW.dtype, out=dW) if first else torch.addmm(dW, Gt, hidden, out_dtype=dW.dtype, out=dW)
    else:
        _widening_mm(Gt, hidden, dW, accumulate=not first)


def stack_difference(student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """out (2C, H) = [student ; teacher - student]: the difference is formed in fp32 (fp64) and rounded once."""
    rows = student.shape[0]
    out[:rows].copy_(student)
    if is_16_bit(student.dtype):
        out[rows:].copy_(teacher.float().sub_(student))
    else:
        torch.sub(teacher, student, out=out[rows:])
