"""Plan a call: rows per chunk, buffers, passes and peak memory.

Pure arithmetic. The op follows the plan, and `opsd plan` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from .. import env
from .._rows import extension
from .._rows.contract import Column
from ..spec import BACKWARDS, SCOPES, LogitTransform, check_choice, expect
from . import cpu_gemm
from .lora import AdapterPlan
from .sizes import (
    ALIGNED_ROWS,
    CPU_SCRATCH_BYTES,
    CPU_SCRATCH_PER_THREAD,
    CPU_SCRATCH_PER_THREAD_AMX,
    CUDA_ROW_BYTES,
    DEFAULT_WORKSPACE_BYTES,
    DTYPES,
    HOLES_BYTES,
    KEPT_BYTES,
    LARGEST_FACTOR,
    LIST_SCRATCH,
    LISTED_BYTES,
    NARROW_BYTES,
    NARROWING_BYTES,
    PACKED_COLUMNS,
    PACKED_WIDTH,
    QUEUE_BYTES,
    ROW_BYTES,
    ROW_LIMITS,
    SELECT_BYTES,
    SLICE_BYTES,
    SUPPORT_BYTES,
    SWEEP_BYTES,
    WIDE_CPU_ROWS,
)
from .sliced_head import SlicePlan
from .waves import SM_COUNT, fewest_chunks, round_up, tile_share, wave_flops


@dataclass(frozen=True)
class ChunkPlan:
    """Describe a call. Bytes are predictions for all of it; `flops` counts multiplications and additions."""

    tokens: int
    rows: int  # per chunk
    part_rows: int  # of a chunk, projected and swept at once
    chunks: int
    logits_dtype: torch.dtype
    difference: bool  # the teacher buffer holds t - s, from the stacked GEMM
    centred: bool  # 16-bit logits are held relative to a constant of their row
    gradient_dtype: torch.dtype  # of dh and dW until backward multiplies them by the upstream gradient
    passes: int  # GEMM passes of 2 * tokens * hidden * vocabulary operations each
    flops: int
    workspace_bytes: int  # logits buffers and packed rows, freed before the call returns
    # CPU scratch of the math library and the sweeps, on top of the buffers: an estimate that grows with the
    # threads.
    scratch_bytes: int
    accumulator_bytes: int  # fp32 dW on top of a 16-bit gradient, freed before the call returns
    gradient_bytes: int  # dh, dW, dbias
    vector_bytes: int  # losses, statistics and lists, N-sized
    peak_bytes: int  # above the inputs, at the worst moment of forward and backward
    sweep_bytes: int  # moved to and from the logits buffers, if each sweep reads memory
    head_bytes: int  # moved to and from dW, which is read and written once per chunk
    tile_share: (
        float  # useful share of the time of whole waves of GEMM tiles; 1 on a CPU, which is not modelled
    )
    # When token weights are computed: "before" the pass, "after" it, in each "chunk", in chunks "aligned"
    # with sequences, or in a statistics pass of their "own pass".
    weighting: str = "before"
    weighting_reason: str = ""
    target_copied: bool = False  # a teacher's rows are copied into a buffer of their own

    def bounds(self) -> list[slice]:
        """Return the chunks, as slices of the valid rows."""
        return [
            slice(start, min(start + self.rows, self.tokens)) for start in range(0, self.tokens, self.rows)
        ]

    @property
    def parts(self) -> int:
        """Count the parts of all chunks."""
        return sum(-(-(chunk.stop - chunk.start) // self.part_rows) for chunk in self.bounds())

    def as_dict(self) -> dict[str, object]:
        """Return the fields with dtypes as strings, for JSON."""
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in asdict(self).items()
        }


def resolve_logits(
    dtype: torch.dtype,
    logits_dtype: str | torch.dtype,
    shared_head: bool,
    exact: bool = False,
    transforms: Sequence[LogitTransform] = (),
) -> tuple[torch.dtype, bool]:
    """Return the dtype of the logits buffers, and True if the teacher's buffer holds the difference t - s.

    "auto" takes 16-bit buffers for a shared head: held relative to a constant of their row, and with the
    difference GEMM, they keep the gradient's error under 1 %. It takes fp32 for two heads; under a transform
    with a softcap, which needs the logits themselves, or with a factor above LARGEST_FACTOR, which multiplies
    what is left of the rounding (temperatures in a tensor may be as small: reading them would sync with a
    GPU); and where a result must be `exact`. That is a kink at p = q (tvd, an entry clip), and log-probs that
    weights or policy terms read (off by up to .02 nats, and so would be the logarithm of a ratio of
    probabilities). With fp32 buffers of 16-bit inputs both sides are projected in full: rounding h_t - h_s to
    16 bits would lose more than the subtraction of the logits.
    """
    known = logits_dtype in ("auto", "input", "float32", torch.float32)
    expect(known, "logits_dtype", "'auto', 'input' or torch.float32", repr(logits_dtype))
    narrow = dtype.itemsize == 2
    coarse = any(
        side.softcap is not None
        or isinstance(side.temperature, Tensor)
        or not 0 < side.scale / side.temperature <= LARGEST_FACTOR
        for side in transforms
    )
    wide = logits_dtype in ("float32", torch.float32) or (
        logits_dtype == "auto" and (exact or coarse or not shared_head)
    )
    return (torch.float32, False) if narrow and wide else (dtype, shared_head)


def held_dtype(dtype: torch.dtype, buffer: torch.dtype) -> torch.dtype:
    """Return the dtype of gradients held between forward and backward.

    It is fp32 with fp32 buffers: a second rounding, after the upstream factor, would raise the error of the
    gradient from 0.2 % to 0.3 %. It is always fp32 for fp16 inputs, because the 1 / N of a mean underflows.
    """
    return torch.float32 if dtype == torch.float16 else buffer


def row_stride(V: int, buffer: torch.dtype, device_type: str) -> int:
    """Return the row stride of a logits buffer, in entries."""
    return round_up(V, CUDA_ROW_BYTES // buffer.itemsize) if device_type == "cuda" else V


def row_bytes(
    V: int,
    H_student: int,
    H_teacher: int,
    dtype: torch.dtype,
    buffer: torch.dtype,
    topk: int = 0,
    device_type: str = "cpu",
    selects: bool = False,
) -> int:
    """Return the workspace bytes of one row.

    Counted are the logits pair, its packed hidden rows, the hidden gradient before it is scattered, `topk`
    entries of a support, and with `selects` the sum of the kept columns' products (columns.py). `H_teacher`
    is 0 without a teacher.
    """
    wide = torch.promote_types(dtype, torch.float32)
    logits = (2 if H_teacher else 1) * row_stride(V, buffer, device_type) * buffer.itemsize
    return (
        SUPPORT_BYTES * topk
        + logits
        + (H_student + H_teacher) * dtype.itemsize
        + H_student * (held_dtype(dtype, buffer).itemsize + wide.itemsize * selects)
    )


@dataclass(frozen=True)
class Products:
    """Hold the sizes of a call's GEMMs, and model their time on a GPU in operations it could do meanwhile."""

    V: int
    H_student: int
    H_teacher: int
    difference: bool
    grad: bool
    trainable: bool

    def of_chunk(self, rows: int) -> list[tuple[int, int, int]]:
        """Return (rows and columns of the output, length of the sums) of each GEMM: logits, dh, dW."""
        if self.difference:
            sides = [(2 * rows, self.V, self.H_student)]
        else:
            sides = [(rows, self.V, H) for H in (self.H_student, self.H_teacher) if H]
        dh, dW = (rows, self.H_student, self.V), (self.V, self.H_student, rows)
        return sides + [dh] * self.grad + [dW] * self.trainable

    def wave_flops(self, tokens: int, rows: int, sm_count: int = SM_COUNT) -> int:
        """Return the sum of `wave_flops` over all GEMMs of `tokens` in chunks of `rows`."""
        full, last = divmod(tokens, rows)
        chunks = [(full, rows)] * (full > 0) + [(1, last)] * (last > 0)
        return sum(
            times * wave_flops(*product, sm_count)
            for times, size in chunks
            for product in self.of_chunk(size)
        )

    def head_bytes(self, chunks: int, itemsize: int) -> int:
        """Return the bytes moved by the GEMMs of dW: each writes it, and all but the first read it."""
        return self.V * self.H_student * itemsize * (2 * chunks - 1) if chunks and self.trainable else 0


def logit_bytes(
    buffer: torch.dtype,
    gradient: torch.dtype,
    sides: int = 2,
    sweeps: int = 1,
    products: int = 2,
    on_chip: bool = False,
) -> int:
    """Return the bytes moved per token and vocabulary entry.

    GEMMs write the logits and `sweeps` read them. A gradient reads them once more, and is written once and
    read by `products` GEMMs. If a kernel holds a row pair `on_chip`, one read serves all sweeps and the
    gradient.
    """
    reads = 1 if on_chip else sweeps + (products > 0)
    return sides * buffer.itemsize * (1 + reads) + gradient.itemsize * (1 + products) * (products > 0)


def _when_weighted(
    scope: str, longest: int | None, most: int, in_loop: bool, dtype: torch.dtype
) -> tuple[str, str]:
    """Return when token weights that read statistics are computed, and why.

    `in_loop`: the gradients that need them are computed in the forward pass.
    """
    if not in_loop:
        return "after", "the rows of the gradient are scaled then, or backward projects again"
    if dtype == torch.float16:
        return "own pass", "gradients in fp16 are scaled by the largest of all weights"
    if scope == "row":
        return "chunk", "they need a token's own statistics"
    if longest is None:
        return "own pass", "the sequences have no known length"
    fits = longest <= most
    reason = f"the longest sequence has {longest} rows, a chunk {'holds' if fits else 'at most'} {most}"
    return "aligned" if fits else "own pass", reason


def workspace_budget(workspace_bytes: int | None) -> int:
    """Return the byte budget of a call: the given one, else OPSD_WORKSPACE_BYTES, else 1 GiB."""
    if workspace_bytes is None:
        return env.workspace_bytes() or DEFAULT_WORKSPACE_BYTES
    integer = isinstance(workspace_bytes, int) and not isinstance(workspace_bytes, bool)
    expect(integer, "workspace_bytes", "an int", type(workspace_bytes).__name__, TypeError)
    expect(workspace_bytes > 0, "workspace_bytes", "a positive number of bytes", workspace_bytes)
    return workspace_bytes


def _check(dtype: torch.dtype, backward: str, weights_scope: str, **sizes: int) -> None:
    for name, value in sizes.items():
        least = 1 if name in ("V", "H_student") else 0
        whole = isinstance(value, int) and not isinstance(value, bool)
        expect(whole and value >= least, name, f"a whole number of at least {least}", repr(value))
    check_choice("weights_scope", weights_scope, SCOPES)
    expect(dtype in DTYPES, "dtype", "float64, float32, bfloat16 or float16", dtype, TypeError)
    check_choice("backward", backward, BACKWARDS)


def _most_rows(
    tokens: int,
    gemms: Products,
    dtype: torch.dtype,
    held: torch.dtype,
    device_type: str,
    longest_sequence: int,
    sliced: bool,
    budget: int,
    per_row: int,
    spare: int = 0,
) -> tuple[int, int]:
    """Return the most rows of a chunk that pay and fit the budget, and the bytes of an fp32 accumulator.

    The limit of rows that pay is raised to the longest sequence, up to ALIGNED_ROWS. `spare` bytes of the
    rows' share are left.
    """
    on_cuda = device_type == "cuda"
    # A chunk reads the slices of a head anew, which costs as dW does.
    limit = ROW_LIMITS["cuda" if on_cuda else "cpu", gemms.trainable or sliced]
    if not on_cuda and dtype.itemsize > 2 and not sliced:
        limit = min(limit, WIDE_CPU_ROWS)
    if longest_sequence <= ALIGNED_ROWS:
        limit = max(limit, longest_sequence)
    most, accumulator = min(limit, (budget - spare) // per_row), 0
    # A 16-bit dW needs an fp32 accumulator, unless the GEMM of a single chunk writes the gradient.
    if gemms.trainable and dtype.itemsize == 2 and (tokens > most or held != dtype):
        half = gemms.V * gemms.H_student * dtype.itemsize
        accumulator = 2 * half
        most = min(most, (max(budget - half, min(budget, half)) - spare) // per_row)
    return most, accumulator


def _cpu_scratch(
    dtype: torch.dtype, V: int, widths: tuple[int, int], topk: int, listed: int, one: bool, grad: bool,
    wide: bool, whole: bool, threads: int | None,
) -> tuple[int, int]:  # fmt: skip
    """Return the scratch bytes of the math library and the sweeps on a CPU, on top of the logits buffers.

    And the bytes of the budget to leave beside them, for more of the same: in bf16 three teachers take 15 MiB
    where one takes 7.

    `widths`: hidden sizes of student and teacher, 0 without a second head. `wide`: of 16-bit inputs the
    buffers are in fp32. `whole`: the student's head is not read by slices.
    """
    width, alone = max(widths), not widths[1]
    n, narrow = threads or torch.get_num_threads(), dtype.itemsize == 2
    tiled = narrow and extension.has_amx()
    sliced = narrow and (not extension.mm_has_units(dtype) or cpu_gemm.slices(dtype))
    columns = QUEUE_BYTES * (topk > 0) + SWEEP_BYTES * (not one)
    if sliced or not (narrow or extension.gemm_fp32_serves(dtype)):  # products of the library, MKL
        packed = max(dtype.itemsize, 4) * min(V, n * PACKED_COLUMNS) * min(width, PACKED_WIDTH)
        if sliced:
            packed = min(packed, SLICE_BYTES * min(width, 2 * PACKED_WIDTH) // width) + SLICE_BYTES
        columns += ROW_BYTES * (not listed)
        return CPU_SCRATCH_BYTES + packed + n * V * columns, n * HOLES_BYTES
    per_thread, left = CPU_SCRATCH_PER_THREAD_AMX if tiled else CPU_SCRATCH_PER_THREAD, 0
    if alone and not tiled:
        per_thread = LIST_SCRATCH if listed or (wide and grad) else per_thread // 2
        growth = NARROWING_BYTES * (wide and grad)
        columns, left = columns + growth * whole, n * V * growth * (not whole)
    library = CPU_SCRATCH_BYTES + n * (per_thread + V * columns)
    if alone or tiled:
        return library, left
    rows = n * V * (columns + ROW_BYTES) + NARROW_BYTES * narrow
    return rows, max(library - rows, 0)


def plan(
    N: int, V: int, H_student: int, H_teacher: int | None = None, dtype: torch.dtype = torch.bfloat16, *,
    shared_head: bool = True, trainable_head: bool = True, grad: bool = True, backward: str = "in_forward",
    logits_dtype: str | torch.dtype = "auto", bias_grad: bool = False, workspace_bytes: int | None = None,
    device_type: str = "cpu", weights_scope: str = "index", longest_sequence: int | None = None,
    policy: bool = False, topk: int = 0, listed: int = 0, target_copied: bool = False, one_sweep: bool = True,
    factor: float = 1.0, softcap: bool = False, sm_count: int = SM_COUNT, threads: int | None = None,
    gradient_tolerance: float | None = None, ranks: Sequence[int] = (0, 0),
    heads: tuple[str, str] = ("whole", "whole"), teacher_dtype: torch.dtype | None = None,
) -> ChunkPlan:  # fmt: skip
    """Plan `linear_divergence` for N valid tokens, a vocabulary of V and the hidden sizes of both sides.

    * `H_teacher`: defaults to `H_student`; 0 means no teacher's head. `target_copied`: but rows to be cast.
    * `shared_head`: of both sides. `trainable_head`, `grad`, `bias_grad`: a gradient of it, any, of the bias.
    * `backward`, `logits_dtype`, `gradient_tolerance`: as in `linear_divergence`.
    * `weights_scope`: of the token weights. "sequence": chunks end where sequences do if one chunk holds
      `longest_sequence` rows (four passes). Otherwise, and for "row" in fp16, statistics go first (six).
    * `topk`, `listed`, `policy`, `one_sweep`: entries of a support; of a list; an objective; a plain KL.
    * `factor`, `softcap`: the larger scale / temperature; if there is one. `ranks`: of each side's adapter.
    * `heads` of student and teacher: "whole"; "sliced", of another dtype than its GEMM, on another device, or
      read by `student_vocab_ids` (`V` of them); or "quantised". `dtype` and `teacher_dtype` are those of the
      GEMMs, the teacher's by default `dtype`.
    * `device_type`, `sm_count`: on CUDA a chunk's rows make whole waves of GEMM tiles (waves.py). `threads`:
      of a CPU, with which scratch grows; default torch's. `workspace_bytes`: for logits, packed rows, scratch
      and half of an fp32 dW, whose bytes the 16-bit dW takes later; default OPSD_WORKSPACE_BYTES, else 1 GiB.

    Raises ValueError if the budget does not hold one row, and ValueError or TypeError for a bad argument.
    """
    H_teacher = H_student if H_teacher is None else H_teacher
    _check(dtype, backward, weights_scope, N=N, V=V, H_student=H_student, H_teacher=H_teacher)
    budget = workspace_budget(workspace_bytes)
    transforms = [LogitTransform(factor, 1.0 if softcap else None)]
    sliced = None
    if heads != ("whole", "whole") or teacher_dtype not in (None, dtype):
        sliced = SlicePlan.of(
            V, (H_student, H_teacher), heads, (dtype, teacher_dtype or dtype), shared_head, device_type
        )
        dtype = sliced.dtype
    widest = dtype if sliced is None else sliced.widest
    buffer, difference = resolve_logits(widest, logits_dtype, shared_head, False, transforms)
    selects = grad and gradient_tolerance is not None
    per_row = row_bytes(V, H_student, H_teacher, dtype, buffer, min(topk, V) + listed, device_type, selects)
    teacher_row = row_stride(V, buffer, device_type) * buffer.itemsize * (H_teacher > 0 or target_copied)
    use = (H_student, H_teacher), topk, listed, one_sweep, grad, buffer != dtype, heads[0] == "whole", threads
    scratch, left = _cpu_scratch(dtype, V, *use) if device_type == "cpu" else (0, 0)
    gemms = Products(V, H_student, H_teacher, difference, grad, trainable_head and grad)
    adapted = AdapterPlan()
    if any(ranks):
        adapted = AdapterPlan.of(gemms, ranks, dtype, buffer, device_type, sliced is None)
    per_row += adapted.per_row + teacher_row * target_copied
    scratch += adapted.scratch + (KEPT_BYTES + SELECT_BYTES * V) * selects
    if sliced is not None:
        per_row += sliced.per_row
        scratch += sliced.scratch
    held, again, small = held_dtype(dtype, buffer), backward == "recompute" and grad, 4 * V * bias_grad
    room = budget - min(scratch + left, budget // 2, max(budget - per_row, 0))
    by_slices, longest = sliced is not None and sliced.scratch > 0, longest_sequence or 0
    most_rows = partial(_most_rows, N, gemms, dtype, held, device_type, longest, by_slices)
    most, accumulator = most_rows(room, per_row)
    expect(most >= 1, "workspace_bytes", f"at least {3 * per_row} bytes, for a row of logits pairs", budget)
    weighting, reason = "before", "they need positions alone"
    if weights_scope != "index":
        weighed = gemms.trainable or bias_grad or policy or selects or ranks[0] > 0
        in_loop = weighed and grad and not again
        weighting, reason = _when_weighted(weights_scope, longest_sequence, most, in_loop, dtype)
    rows = part = max(min(N, most), 1)
    waves = (gemms, dtype.itemsize, sm_count) if device_type == "cuda" else None
    if weighting != "aligned" and N > most:
        rows, accumulator, part = fewest_chunks(N, waves, most_rows, room, per_row, teacher_row)
    workspace = min(rows, N) * per_row - (rows - part) * teacher_row
    return ChunkPlan(
        tokens=N, rows=rows, part_rows=part, logits_dtype=buffer, difference=difference, gradient_dtype=held,
        centred=buffer.itemsize == 2 and not softcap, target_copied=target_copied, weighting=weighting,
        tile_share=tile_share(gemms, N, rows, sm_count) if waves else 1.0, weighting_reason=reason,
        **_memory(
            N, gemms, dtype, held, workspace, scratch, accumulator, small + adapted.gradients, listed,
            heads[0] == "sliced",
        ),
        **_work(N, rows, gemms, dtype, buffer, 2 - one_sweep, again, weighting, accumulator, adapted),
    )  # fmt: skip


def _memory(
    N: int,
    gemms: Products,
    dtype: torch.dtype,
    held: torch.dtype,
    workspace: int,
    scratch: int,
    accumulator: int,
    small: int,
    listed: int,
    cast: bool,
) -> dict[str, int]:
    """Return the bytes of a call by kind, and its peak: during the loop, or while dW is cast.

    `small` are the bytes of the other gradients. `cast`: the head is stored in half the width of its GEMMs.
    """
    # Statistics, loss, A, weights, factors and their products; lists.
    vectors = N * (4 * (len(Column) + 8) + LISTED_BYTES * listed)
    dh = N * gemms.H_student * dtype.itemsize * gemms.grad
    dW = gemms.V * gemms.H_student * dtype.itemsize * gemms.trainable
    if cast:
        dW, accumulator = dW // 2, dW
    if held != dtype:
        dh *= 3  # the fp32 one and the 16-bit one
    return {
        "workspace_bytes": workspace,
        "scratch_bytes": scratch,
        "accumulator_bytes": accumulator,
        "gradient_bytes": dh + dW + small,
        "vector_bytes": vectors,
        "peak_bytes": max(workspace + (accumulator or dW), accumulator + dW) + scratch + dh + small + vectors,
    }


def _work(
    N: int,
    rows: int,
    gemms: Products,
    dtype: torch.dtype,
    buffer: torch.dtype,
    sweeps: int,
    again: bool,
    weighting: str,
    accumulator: int,
    adapted: AdapterPlan,
) -> dict[str, int]:
    """Return the counts of GEMM passes, operations and bytes moved.

    `again`: backward projects once more.
    """
    twice = again or weighting == "own pass"
    sides, products, chunks = 1 + bool(gemms.H_teacher), gemms.grad + gemms.trainable, -(-N // rows)
    per_pass = gemms.H_student * products + adapted.backward
    per_pass += (gemms.H_student + gemms.H_teacher + adapted.forward) * (1 + twice)
    first_pass = logit_bytes(buffer, dtype, sides, sweeps, 0) if twice else 0
    per_logit = first_pass + logit_bytes(buffer, dtype, sides, 0 if again else sweeps, products)
    return {
        "chunks": chunks,
        "passes": sides + products + sides * twice,
        "flops": 2 * N * gemms.V * per_pass,
        "sweep_bytes": N * gemms.V * per_logit,
        "head_bytes": gemms.head_bytes(chunks, 4 if accumulator else dtype.itemsize),
    }
