"""Triton kernels over the columns of a logit gradient: norms, and kept columns. Contract: contract.py.

A program holds a tile of HEIGHT rows and BLOCK columns, and writes sums of its own place in a buffer, which
torch adds up afterwards: no atomics. With 16-byte loads a warp reads whole rows of a tile and sums them
without shared memory, which only their sums pass, to be stored side by side. Loops are `while` loops, as in
triton_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "rows"])
def _column_norms_kernel(
    G, Scale, Norms, Sums, stride_g, n, V, rows, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the squares of BLOCK columns over `rows` rows, and each of these rows over the columns.

    Norms is (splits, V), Sums (blocks, n).
    """
    ACC: tl.constexpr = Norms.dtype.element_ty
    block, split = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    Sums += block.to(tl.int64) * n
    squares = tl.full([HEIGHT, BLOCK], 0.0, ACC)
    start = split * rows
    end = tl.minimum(start + rows, n)
    while start < end:
        i = start + tl.arange(0, HEIGHT)
        # n * V passes 2**31 at 16k rows x 152k columns
        places = i.to(tl.int64)[:, None] * stride_g + v[None, :]
        g = tl.load(G + places, mask=(i < end)[:, None] & (v < V)[None, :], other=0.0).to(ACC)
        scaled = g
        if Scale is not None:  # loaded before the barrier of the sums
            scaled = g * tl.load(Scale + i, mask=i < end, other=0.0)[:, None]
        tl.store(Sums + i, tl.sum(g, 1), mask=i < end)
        squares += scaled * scaled
        start += HEIGHT
    tl.store(Norms + split.to(tl.int64) * V + v, tl.sum(squares, 0), mask=v < V)


@triton.jit(do_not_specialize=["n", "K"])
def _gather_columns_kernel(
    G, Columns, Out, Sums, stride_g, stride_out, n, K, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy BLOCK of the K columns in HEIGHT rows, and sum each row over them. Sums is (blocks, n)."""
    ACC: tl.constexpr = Sums.dtype.element_ty
    blocks = tl.cdiv(K, BLOCK)
    # One dimension of the grid: the others end at 65535.
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    k, i = block * BLOCK + tl.arange(0, BLOCK), tile * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.load(Columns + k, mask=k < K, other=0)
    inside = (i < n)[:, None] & (k < K)[None, :]
    row = i.to(tl.int64)[:, None]
    g = tl.load(G + row * stride_g + column[None, :], mask=inside, other=0.0)
    tl.store(Out + row * stride_out + k[None, :], g, mask=inside)
    tl.store(Sums + block.to(tl.int64) * n + i, tl.sum(g.to(ACC), 1), mask=i < n)


COLUMN_KERNELS = {"norms": _column_norms_kernel, "gather": _gather_columns_kernel}
