"""How many rows a chunk takes, which buffers that needs, and the peak it leads to. Pure arithmetic: the op follows it, `opsd plan` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from . import env, extension
from .kernels.contract import Column
from .spec import BACKWARDS, SCOPES, check_choice, expect

DEFAULT_WORKSPACE_BYTES = 1 << 30
ROW_MULTIPLE = 16
# Scratch of the math library and the row sweeps on a CPU, for the process and for each thread. Measured on an AMD
# EPYC at V = 151936 with H = 64 on 1, 2, 4, 8 and 16 threads: fp32 3.9, 9.7, 20, 48 and 96 MiB, bf16 6.3, 8.7, 11.6,
# 24 and 48 MiB. oneDNN packs more of 16-bit operands for tile units (AMX): 14.8 MiB on two threads under torch 2.13,
# 16.6 under 2.15. A budget gives scratch at most half of its bytes, and never those of the last row.
CPU_SCRATCH_BYTES, CPU_SCRATCH_PER_THREAD, CPU_SCRATCH_PER_THREAD_AMX = 2 << 20, 6 << 20, 9 << 20
# Rows beyond which a chunk gains nothing. A trainable head reads and writes the fp32 dW once per chunk. On two AVX-512 cores and bf16 inputs, 256, 512 and 1024
# rows take 1.19, 1.13 and 1.05 of the bare GEMMs (H = 1024); fp32 inputs, whose GEMMs take four times as long, 1.00 at 256 and 1.11 at 1024, for fresh buffers
# cost time as well. On CUDA 25 % of the floor goes into dW at 1024 rows and 6 % at 4096 (H = 4096).
ROW_LIMITS = {("cpu", True): 1024, ("cpu", False): 256, ("cuda", True): 4096, ("cuda", False): 1024}
WIDE_CPU_ROWS = 256  # of 32- and 64-bit inputs
ALIGNED_ROWS = 1024  # to which a chunk may grow for the sake of a whole sequence
SUPPORT_BYTES = 96  # of one entry of a support: a dozen numbers, each in a tensor of its own
SLICE_BYTES = 8 << 20  # of fp32 copies, which one product holds where the CPU has no units for a 16-bit dtype
QUEUE_BYTES = 16  # per column and thread while torch.topk runs
SWEEP_BYTES = 16  # per column and thread where a divergence takes two sweeps, which keep four rows (csrc/cpu/rows.cpp); else one or two
# The model of a GPU, for the choice of rows alone. Its numbers are assumptions, to be replaced by measured ones: the output tile that cuBLAS gives one
# multiprocessor of an H100 in a large 16-bit GEMM; how far it splits long sums (of dh) where the tiles are few; the multiprocessors of an H100 SXM or H200; 730
# TFLOP/s of such GEMMs beside 2.85 TB/s of memory. With the last, dW costs 25 % of four passes at 1024 rows and 6 % at 4096.
TILE = (128, 256)
MOST_SPLITS, SPLIT_LENGTH = 8, 4096
SM_COUNT = 132
FLOPS_PER_BYTE = 256
CUDA_ROW_MULTIPLE = 128
CUDA_ROW_BYTES = 128  # a row of logits takes a multiple: then any V has 16-byte accesses, and a GEMM the leading dimension that it is fastest with
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ChunkPlan:
    """What one call does. Bytes are of the whole call, predicted; `flops` counts multiply and add."""

    tokens: int
    rows: int  # per chunk
    chunks: int
    logits_dtype: torch.dtype
    difference: bool  # teacher buffer holds t - s from the stacked GEMM
    gradient_dtype: torch.dtype  # of dh and dW until backward multiplies them by what comes from upstream
    passes: int  # GEMM passes of 2 * tokens * hidden * vocabulary operations each
    flops: int
    workspace_bytes: int  # logits buffers and packed rows, freed before the call returns
    scratch_bytes: int  # of the math library and the sweeps on a CPU, on top of them: an estimate that grows with the threads
    accumulator_bytes: int  # fp32 dW beside a 16-bit gradient, likewise
    gradient_bytes: int  # dh, dW, dbias
    vector_bytes: int  # losses and statistics, N-sized
    peak_bytes: int  # above the inputs, at the worst moment of forward and backward
    sweep_bytes: int  # moved to and from the logits buffers, by GEMMs and by sweeps that read memory each time
    head_bytes: int  # moved to and from dW: it is read and written once per chunk
    tile_share: float  # of the time of whole waves of tiles that the GEMMs compute in; 1 on a CPU, which is not modelled
    weighting: str = "before"  # when token weights are found: before the pass, after it, in each chunk, in chunks aligned with sequences, in a pass of its own
    weighting_reason: str = ""

    def bounds(self) -> list[slice]:
        """The chunks, as slices of the valid rows."""
        return [slice(start, min(start + self.rows, self.tokens)) for start in range(0, self.tokens, self.rows)]

    def as_dict(self) -> dict[str, object]:
        return {name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for name, value in asdict(self).items()}


def parse_logits_dtype(logits_dtype: str | torch.dtype) -> str:
    """`auto`, `input` or `float32`."""
    known = logits_dtype in ("auto", "input", "float32", torch.float32)
    expect(known, "logits_dtype", "'auto', 'input' or torch.float32", repr(logits_dtype))
    return "float32" if logits_dtype is torch.float32 else logits_dtype


def resolve_logits(dtype: torch.dtype, logits_dtype: str | torch.dtype, shared_head: bool) -> tuple[torch.dtype, bool]:
    """(buffer dtype, difference form). `auto`: 16-bit buffers for a shared head, where the difference GEMM loses nothing; else fp32.

    In fp32 buffers of 16-bit inputs both sides are projected whole: rounding h_t - h_s to 16 bits would cost more than the subtraction does.
    """
    logits_dtype = parse_logits_dtype(logits_dtype)
    narrow = dtype in (torch.bfloat16, torch.float16)
    if narrow and (logits_dtype == "float32" or (logits_dtype == "auto" and not shared_head)):
        return torch.float32, False
    return dtype, shared_head


def held_dtype(dtype: torch.dtype, buffer: torch.dtype) -> torch.dtype:
    """What gradients are held in between forward and backward. With fp32 buffers, fp32: a second rounding, after the upstream factor, would take the
    gradient from 0.2 % to 0.3 % error. For fp16 inputs always: a mean's 1 / N underflows.
    """
    return torch.float32 if dtype == torch.float16 else buffer


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _balanced_rows(tokens: int, most: int) -> int:
    """Rows of equal chunks, none above `most`."""
    if tokens <= most:
        return max(tokens, 1)
    even = -(-tokens // -(-tokens // most))
    rounded = _round_up(even, ROW_MULTIPLE)
    return rounded if rounded <= most else even


def row_stride(V: int, buffer: torch.dtype, device_type: str) -> int:
    """Entries from one row of a logits buffer to the next."""
    return _round_up(V, CUDA_ROW_BYTES // buffer.itemsize) if device_type == "cuda" else V


def row_bytes(V: int, H_student: int, H_teacher: int, dtype: torch.dtype, buffer: torch.dtype, topk: int = 0, device_type: str = "cpu") -> int:
    """Workspace of one row: the logits pair, its packed hidden rows, the hidden gradient before it is scattered, a support. H_teacher 0: no teacher."""
    logits = (2 if H_teacher else 1) * row_stride(V, buffer, device_type) * buffer.itemsize
    return SUPPORT_BYTES * topk + logits + (H_student + H_teacher) * dtype.itemsize + H_student * held_dtype(dtype, buffer).itemsize


def wave_flops(rows: int, columns: int, length: int, sm_count: int = SM_COUNT) -> int:
    """Of a GEMM with sums of `length`. Multiprocessors work on whole tiles, and the last wave of tiles leaves some of them idle: 132 tiles cost what 1 does."""
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    splits = range(1, max(1, min(MOST_SPLITS, length // SPLIT_LENGTH)) + 1)
    return min(2 * _round_up(tiles * split, sm_count) * TILE[0] * TILE[1] * -(-length // split) for split in splits)


@dataclass(frozen=True)
class Products:
    """The GEMMs of a call, and the time they take on a GPU, counted in what its multiprocessors could compute meanwhile."""

    V: int
    H_student: int
    H_teacher: int
    difference: bool
    grad: bool
    trainable: bool

    def of_chunk(self, rows: int) -> list[tuple[int, int, int]]:
        """(rows and columns of the output, length of the sums): logits, dh, dW."""
        sides = [(2 * rows, self.V, self.H_student)] if self.difference else [(rows, self.V, H) for H in (self.H_student, self.H_teacher) if H]
        return sides + [(rows, self.H_student, self.V)] * self.grad + [(self.V, self.H_student, rows)] * self.trainable

    def wave_flops(self, tokens: int, rows: int, sm_count: int = SM_COUNT) -> int:
        """Of `tokens` in chunks of `rows`."""
        full, last = divmod(tokens, rows)
        chunks = [(full, rows)] * (full > 0) + [(1, last)] * (last > 0)
        return sum(times * wave_flops(*product, sm_count) for times, size in chunks for product in self.of_chunk(size))

    def head_bytes(self, chunks: int, itemsize: int) -> int:
        """Moved by the GEMMs of dW: written by each, and read by all but the first."""
        return self.V * self.H_student * itemsize * (2 * chunks - 1) if chunks and self.trainable else 0


def logit_bytes(buffer: torch.dtype, gradient: torch.dtype, sides: int = 2, sweeps: int = 1, products: int = 2, on_chip: bool = False) -> int:
    """Bytes moved per token and vocabulary entry: logits written by GEMMs and read by `sweeps`; then read for a gradient, written and read by `products` GEMMs.

    Where a kernel holds a row pair `on_chip`, one read serves all sweeps and the gradient.
    """
    reads = 1 if on_chip else sweeps + (products > 0)
    return sides * buffer.itemsize * (1 + reads) + gradient.itemsize * (1 + products) * (products > 0)


@lru_cache(maxsize=1024)
def whole_waves(tokens: int, most: int, gemms: Products, dW_itemsize: int, sm_count: int = SM_COUNT) -> int:
    """Rows per chunk, a multiple of CUDA_ROW_MULTIPLE up to `most`, with which idle multiprocessors and the traffic of dW cost least.

    More rows win a tie, and a larger `most` never makes more chunks. Below the multiple, as many rows as there may be.
    """

    def cost(rows: int) -> tuple[int, int]:
        return gemms.wave_flops(tokens, rows, sm_count) + FLOPS_PER_BYTE * gemms.head_bytes(-(-tokens // rows), dW_itemsize), -rows

    return min(range(CUDA_ROW_MULTIPLE, most + 1, CUDA_ROW_MULTIPLE), key=cost, default=most)


def _tile_share(gemms: Products, tokens: int, rows: int, sm_count: int) -> float:
    useful = sum(2 * m * n * k for m, n, k in gemms.of_chunk(tokens))
    return useful / gemms.wave_flops(tokens, rows, sm_count) if tokens else 1.0


def align(lengths: list[int], rows: int) -> list[slice]:
    """Chunks of whole sequences, none above `rows` unless a sequence alone is; `lengths` count valid rows."""
    bounds, start, stop = [], 0, 0
    for length in lengths:
        if stop > start and stop + length - start > rows:
            bounds.append(slice(start, stop))
            start = stop
        stop += length
    return [*bounds, slice(start, stop)] if stop > start else bounds


def _weighting(scope: str, longest: int | None, most: int, in_loop: bool) -> tuple[str, str]:
    """(when token weights are found, why then). `in_loop`: the gradients that need them are computed in the forward pass."""
    if scope == "index":
        return "before", "they need positions alone"
    if not in_loop:
        return "after", "the rows of the gradient are scaled then, or backward projects again"
    if scope == "row":
        return "chunk", "they need a token's own statistics"
    if longest is None:
        return "own pass", "the sequences have no known length"
    fits = longest <= most
    return "aligned" if fits else "own pass", f"the longest sequence has {longest} rows, a chunk {'holds' if fits else 'at most'} {most}"


def _row_limit(dtype: torch.dtype, trainable: bool, device_type: str, longest_sequence: int) -> int:
    on_cuda = device_type == "cuda"
    limit = ROW_LIMITS["cuda" if on_cuda else "cpu", trainable]
    if not on_cuda and dtype.itemsize > 2:
        limit = min(limit, WIDE_CPU_ROWS)
    return max(limit, longest_sequence) if longest_sequence <= ALIGNED_ROWS else limit


def workspace_budget(workspace_bytes: int | None) -> int:
    """The byte budget of a call: its own, else OPSD_WORKSPACE_BYTES, else 1 GiB."""
    if workspace_bytes is None:
        return env.workspace_bytes() or DEFAULT_WORKSPACE_BYTES
    expect(isinstance(workspace_bytes, int) and not isinstance(workspace_bytes, bool), "workspace_bytes", "an int", type(workspace_bytes).__name__, TypeError)
    expect(workspace_bytes > 0, "workspace_bytes", "a positive number of bytes", workspace_bytes)
    return workspace_bytes


def _check(dtype: torch.dtype, backward: str, weights_scope: str, **sizes: int) -> None:
    for name, value in sizes.items():
        expect(isinstance(value, int) and value >= (name == "V"), name, "a size", repr(value))
    check_choice("weights_scope", weights_scope, SCOPES)
    expect(dtype in DTYPES, "dtype", "float64, float32, bfloat16 or float16", dtype, TypeError)
    check_choice("backward", backward, BACKWARDS)


def _room(tokens: int, limit: int, budget: int, per_row: int, head: int, held: bool) -> tuple[int, int]:
    """(most rows of a chunk, bytes of an fp32 accumulator). `head`: entries of a 16-bit dW, else 0; `held`: in fp32 until backward."""
    most, accumulator = min(limit, budget // per_row), 0
    if head and (tokens > most or held):  # else a single chunk's GEMM writes the gradient itself
        accumulator, half = 4 * head, 2 * head
        most = min(most, max(budget - half, min(budget, half)) // per_row)
    return most, accumulator


def _cpu_scratch(dtype: torch.dtype, V: int, topk: int, one_sweep: bool, threads: int | None) -> int:
    """Scratch bytes of the math library and of the sweeps on a CPU, on top of the logits buffers."""
    per_thread = CPU_SCRATCH_PER_THREAD_AMX if dtype.itemsize == 2 and extension.has_amx() else CPU_SCRATCH_PER_THREAD
    columns = QUEUE_BYTES * (topk > 0) + SWEEP_BYTES * (not one_sweep)
    slices = 0 if extension.mm_has_units(dtype) else SLICE_BYTES
    return CPU_SCRATCH_BYTES + slices + (threads or torch.get_num_threads()) * (per_thread + V * columns)


def _bytes_per_logit(buffer: torch.dtype, dtype: torch.dtype, sides: int, sweeps: int, products: int, again: bool, twice: bool) -> int:
    """Of a whole call: `again`, projected once more in backward; `twice`, that or a statistics pass of its own."""
    known = logit_bytes(buffer, dtype, sides, sweeps, 0) if twice else 0
    return known + logit_bytes(buffer, dtype, sides, 0 if again else sweeps, products)


def plan(
    N: int,
    V: int,
    H_student: int,
    H_teacher: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shared_head: bool = True,
    trainable_head: bool = True,
    grad: bool = True,
    backward: str = "in_forward",
    logits_dtype: str | torch.dtype = "auto",
    bias_grad: bool = False,
    workspace_bytes: int | None = None,
    device_type: str = "cpu",
    weights_scope: str = "index",
    longest_sequence: int | None = None,
    policy: bool = False,
    topk: int = 0,
    one_sweep: bool = True,
    sm_count: int = SM_COUNT,
    threads: int | None = None,
) -> ChunkPlan:
    """Plan `linear_divergence` for N valid tokens, a vocabulary of V and hidden sizes H_student and H_teacher (default: the same; 0: no teacher's head).

    `weights_scope` is that of the token weights. Those of scope `sequence` need all statistics of a sequence before its gradients: chunks end with
    sequences where `longest_sequence` rows fit one (four passes), else a statistics pass goes first (six): `ChunkPlan.weighting` and `weighting_reason`.
    With `policy`, a term of `objectives` is mixed in; with `topk`, a support has that many entries; `one_sweep` is RowSpec's. On CUDA (`device_type`,
    `sm_count` multiprocessors) the rows of a chunk make whole waves of GEMM tiles, by a model whose assumptions stand at TILE. CPU scratch: by `threads`.

    `workspace_bytes` is the budget (default OPSD_WORKSPACE_BYTES or 1 GiB) for logits buffers, packed rows, the math library's scratch, and the fp32 dW that
    stands beside a 16-bit gradient. The last claims half its size, but leaves the logits the bytes of the 16-bit dW, which takes their place in the end.
    Raises ValueError if the budget does not hold one row.
    """
    H_teacher = H_student if H_teacher is None else H_teacher
    _check(dtype, backward, weights_scope, N=N, V=V, H_student=H_student, H_teacher=H_teacher)
    budget = workspace_budget(workspace_bytes)
    buffer, difference = resolve_logits(dtype, logits_dtype, shared_head)
    trainable = trainable_head and grad
    per_row = row_bytes(V, H_student, H_teacher, dtype, buffer, min(topk, V), device_type)
    scratch = _cpu_scratch(dtype, V, topk, one_sweep, threads) if device_type == "cpu" else 0
    held, head = held_dtype(dtype, buffer), V * H_student * (trainable and dtype.itemsize == 2)
    limit = _row_limit(dtype, trainable, device_type, longest_sequence or 0)
    most, accumulator = _room(N, limit, budget - min(scratch, budget // 2, max(budget - per_row, 0)), per_row, head, held != dtype)
    expect(most >= 1, "workspace_bytes", f"at least {3 * per_row} bytes, for a row of logits pairs", budget)
    weighting, reason = _weighting(weights_scope, longest_sequence, most, in_loop=(trainable or policy) and grad and backward != "recompute")
    gemms = Products(V, H_student, H_teacher, difference, grad, trainable)
    dW_itemsize = 4 if accumulator else dtype.itemsize
    rows = max(min(N, most), 1)
    if weighting != "aligned" and N > most:
        rows = whole_waves(N, most, gemms, dW_itemsize, sm_count) if device_type == "cuda" else _balanced_rows(N, most)
    gradient = {"dh": N * H_student * dtype.itemsize * grad, "dW": V * H_student * dtype.itemsize * trainable, "dbias": 4 * V * bias_grad}
    gradient["dh"] *= 3 if held != dtype else 1  # the fp32 one, and the 16-bit one beside it
    workspace = min(rows, N) * per_row
    vectors = N * 4 * (len(Column) + 8)  # statistics; loss, A, weights, factors and what multiplies them
    walking = workspace + scratch + (accumulator or gradient["dW"])
    again, projections = backward == "recompute" and grad, 1 + bool(H_teacher)
    twice = again or weighting == "own pass"
    passes = projections + grad + trainable + projections * twice
    return ChunkPlan(
        tokens=N,
        rows=rows,
        chunks=-(-N // rows),
        logits_dtype=buffer,
        difference=difference,
        gradient_dtype=held,
        passes=passes,
        flops=2 * N * V * (H_student * (1 + twice + grad + trainable) + H_teacher * (1 + twice)),
        workspace_bytes=workspace,
        scratch_bytes=scratch,
        accumulator_bytes=accumulator,
        gradient_bytes=sum(gradient.values()),
        vector_bytes=vectors,
        peak_bytes=max(walking, accumulator + gradient["dW"] + scratch) + gradient["dh"] + gradient["dbias"] + vectors,
        sweep_bytes=N * V * _bytes_per_logit(buffer, dtype, projections, 1 if one_sweep else 2, grad + trainable, again, twice),
        head_bytes=gemms.head_bytes(-(-N // rows), dW_itemsize),
        tile_share=_tile_share(gemms, N, rows, sm_count) if device_type == "cuda" else 1.0,
        weighting=weighting,
        weighting_reason=reason,
    )
