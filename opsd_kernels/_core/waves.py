"""The model of a GPU that the planner chooses rows by: GEMMs in whole waves of tiles.

Its numbers are assumptions, to be replaced by measured ones: the output tile that cuBLAS gives one
multiprocessor of an H100 in a large 16-bit GEMM; the most splits of long sums (of dh) where tiles are few;
the multiprocessors of an H100 SXM or H200; 730 TFLOP/s of such GEMMs at 2.85 TB/s of memory. By the last, dW
costs 25 % of four passes at 1024 rows and 6 % at 4096.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

TILE = (128, 256)
MOST_SPLITS, SPLIT_LENGTH = 8, 4096
SM_COUNT = 132
FLOPS_PER_BYTE = 256
CUDA_ROW_MULTIPLE = 128


class Gemms(Protocol):
    """The GEMMs of a call: `planner.Products`."""

    def of_chunk(self, rows: int) -> list[tuple[int, int, int]]: ...
    def wave_flops(self, tokens: int, rows: int, sm_count: int = ...) -> int: ...
    def head_bytes(self, chunks: int, itemsize: int) -> int: ...


def wave_flops(rows: int, columns: int, length: int, sm_count: int = SM_COUNT) -> int:
    """Return the operations that a GPU could do during a GEMM with sums of `length`.

    Multiprocessors work on whole tiles, and the last wave of tiles leaves some of them idle: 132 tiles cost
    as much as one.
    """
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    splits = range(1, max(1, min(MOST_SPLITS, length // SPLIT_LENGTH)) + 1)
    return min(
        2 * -(-tiles * split // sm_count) * sm_count * TILE[0] * TILE[1] * -(-length // split)
        for split in splits
    )


@lru_cache(maxsize=1024)
def whole_waves(tokens: int, most: int, gemms: Gemms, dW_itemsize: int, sm_count: int = SM_COUNT) -> int:
    """Return the rows per chunk with the lowest cost of idle multiprocessors and traffic of dW.

    They are a multiple of CUDA_ROW_MULTIPLE up to `most`, or `most` below one multiple. More rows win a tie,
    and a larger `most` never makes more chunks.
    """

    def cost(rows: int) -> tuple[int, int]:
        traffic = gemms.head_bytes(-(-tokens // rows), dW_itemsize)
        return gemms.wave_flops(tokens, rows, sm_count) + FLOPS_PER_BYTE * traffic, -rows

    return min(range(CUDA_ROW_MULTIPLE, most + 1, CUDA_ROW_MULTIPLE), key=cost, default=most)


def tile_share(gemms: Gemms, tokens: int, rows: int, sm_count: int) -> float:
    """Return the useful share of the operations in whole waves of tiles."""
    useful = sum(2 * m * n * k for m, n, k in gemms.of_chunk(tokens))
    return useful / gemms.wave_flops(tokens, rows, sm_count) if tokens else 1.0
