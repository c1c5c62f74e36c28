"""Choose the rows of a chunk; on a GPU by a model of its GEMMs, in whole waves of tiles.

The model's numbers are assumptions, to be replaced by measured ones: the output tile that cuBLAS gives one
multiprocessor of an H100 in a large 16-bit GEMM; the most splits of long sums (of dh) where tiles are few;
the multiprocessors of an H100 SXM or H200; 730 TFLOP/s of such GEMMs at 2.85 TB/s of memory. By the last, dW
costs 25 % of four passes at 1024 rows and 6 % at 4096.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from .sizes import LEAST_PART_ROWS, MOST_PARTS, ROW_MULTIPLE

TILE = (128, 256)
MOST_SPLITS, SPLIT_LENGTH = 8, 4096
SM_COUNT = 132
FLOPS_PER_BYTE = 256
CUDA_ROW_MULTIPLE = 128


class Gemms(Protocol):
    """The GEMMs of a call: `planner.Products`."""

    @property
    def trainable(self) -> bool: ...
    def of_chunk(self, rows: int) -> list[tuple[int, int, int]]: ...
    def wave_flops(self, tokens: int, rows: int, sm_count: int = ...) -> int: ...
    def head_bytes(self, chunks: int, itemsize: int) -> int: ...
    def __hash__(self) -> int: ...


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def balanced_rows(tokens: int, most: int) -> int:
    """Return the rows per chunk of equal chunks, none above `most`."""
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    rounded = round_up(even, ROW_MULTIPLE)
    return rounded if rounded <= most else even


def fewest_chunks(
    tokens: int,
    waves: tuple[Gemms, int, int] | None,
    most_rows: Callable[..., tuple[int, int]],
    budget: int,
    per_row: int,
    teacher_row: int,
) -> tuple[int, int, int]:
    """Return rows per chunk, bytes of an fp32 accumulator, rows per part: the fewest chunks, then parts.

    `waves` are the GEMMs, bytes of a number of dW and multiprocessors of a GPU, None on a CPU, which has no
    parts. `most_rows(budget, per_row, spare)` is `_most_rows`, `teacher_row` the bytes of a teacher's row.
    """
    if waves is None:
        most, accumulator = most_rows(budget, per_row)
        rows = balanced_rows(tokens, most)
        return rows, accumulator, rows
    (gemms, itemsize, sm_count), best = waves, (tokens, 0, 0)
    # Longer chunks save traffic of dW, and nothing with a frozen head.
    for parts in range(1, MOST_PARTS + 1 if gemms.trainable else 2):
        # A part may be longer than its share by less than CUDA_ROW_MULTIPLE.
        spare = CUDA_ROW_MULTIPLE * teacher_row * (parts > 1)
        most, accumulator = most_rows(budget, per_row - teacher_row + -(-teacher_row // parts), spare)
        dW_itemsize = 4 if accumulator else itemsize
        rows = tokens if tokens <= most else whole_waves(tokens, most, gemms, dW_itemsize, sm_count)
        part = rows if parts == 1 else min(rows, round_up(-(-rows // parts), CUDA_ROW_MULTIPLE))
        if parts == 1 or (part >= LEAST_PART_ROWS and -(-tokens // rows) < -(-tokens // best[0])):
            best = rows, accumulator, part
    return best


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
