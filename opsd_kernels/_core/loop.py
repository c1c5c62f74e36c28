"""Walk the rows in chunks: project, sweep, and turn logit gradients into dh, dW and dbias.

Logits go into reused buffers, which end with the loop, the head's gradient into an fp32 accumulator. The
same loop computes gradients during the forward pass, statistics alone and, from saved statistics, the
gradients of recompute mode. A plan may split the projections and sweeps of a chunk into parts, which share
the teacher's buffer.

A sweep of a divergence has one of four forms, chosen before the loop. `fused` reads the logits once and
overwrites them with the gradient. `late_gradients.two_pass` sweeps for statistics first, where row factors or
a z-loss depend on them. `late_gradients.replay` computes gradients from the statistics of an earlier run.
`topk_support.top_k` works on a support. Each writes losses and statistics of its rows into the outputs, and
the logit gradient over S. `fused` may return row factors, (C,), which `_accumulate` is still to apply to dh,
dW and dbias. The ops of one head pass sweeps of their own (listed.py, forward_cache.py).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import extension, torch_rows
from .._rows.contract import Column, RowBackend, narrowed
from . import cpu_gemm, late_gradients, topk_support
from .accumulate import accumulate_weight_grad, sum_over_slices
from .centre import NO_CENTRE, Centre, exact_argmax, likely_columns, pilot_columns
from .columns import ColumnFilter, accumulate_kept
from .planner import ChunkPlan, row_stride
from .problem import ComputedRows, Outputs, Problem
from .reductions import RowWeigher
from .targets import comparing
from .teachers import walks_of
from .topk_support import Rows

_HUGE_PAGES, _PAGE = 14, 1 << 21  # MADV_HUGEPAGE and its page
Positions = slice | Tensor  # of a chunk's rows among all rows
Sweep = Callable[["Walk", Rows, Positions], Tensor | None]


def run(
    problem: Problem,
    plan: ChunkPlan,
    backend: RowBackend,
    rows: ComputedRows,
    metrics: bool,
    *,
    saved: tuple[Tensor, Tensor] | None = None,
    weigher: RowWeigher | None = None,
    bounds: list[slice] | None = None,
    sweep: Sweep | None = None,
) -> Outputs:
    """Return losses, statistics and gradients. `bounds` replaces the plan's chunks by others, none longer."""
    assert bounds is None or plan.part_rows == plan.rows, "weights of a sequence need it whole, not in parts"
    padded_vocab = problem.student.weight.shape[0]
    problem = problem.for_gemms()
    out = _allocate(problem, plan, padded_vocab, saved, metrics)
    adapters = None if rows.adapters is None else rows.adapters(problem, plan, out, padded_vocab)
    buffers = Buffers(problem, plan, adapters)
    wants_gradient = any(problem.wants)
    walk = Walk(
        problem, backend, rows.valid, metrics, saved is not None, wants_gradient, weigher, out, adapters
    )
    several = None if rows.segments is None else walks_of(walk, rows)
    sweep, logits, G = sweep or choose(walk), None, None
    if problem.rows.target is not None:
        sweep = comparing(sweep, problem.rows.target, plan.target_copied)
    skips = wants_gradient and problem.gradient_tolerance is not None
    columns = ColumnFilter.of(problem, backend, out.dropped) if skips else None
    with torch.autocast(problem.student.hidden.device.type, enabled=False):
        for position, whole in enumerate(plan.bounds() if bounds is None else bounds):
            at = whole if rows.index is None else rows.index[whole]
            # Zeroed: inf or NaN in an invalid row times its zero gradient would put NaN into dW.
            student = walk.zero_invalid(problem.student.hidden[at], at)
            scales = []
            for own, segment in [(walk, whole)] if several is None else several(position, whole):
                theirs, inner = own.problem.teacher, segment.start - whole.start
                its = segment if rows.index is None else rows.index[segment]
                teacher, mine = None, student[inner : segment.stop - whole.start]
                if theirs is not None:
                    places = its if theirs.rows is None else theirs.rows[its]
                    teacher = own.zero_invalid(theirs.hidden[places], its)
                centre = buffers.centre(own, its, mine, teacher, inner) if plan.centred else NO_CENTRE
                for start in range(segment.start, segment.stop, plan.part_rows):
                    part = slice(start, min(start + plan.part_rows, segment.stop))
                    inside = slice(start - segment.start, part.stop - segment.start)
                    held = centre if plan.part_rows >= len(mine) else centre.part(inside)
                    other = None if teacher is None else teacher[inside]
                    logits = buffers.fill(own.problem, mine[inside], other, held, start - whole.start)
                    scales.append(sweep(own, logits, part if rows.index is None else rows.index[part]))
            if wants_gradient:
                G = walk.gradient(buffers.pair[: student.shape[0]])
                scale = None if scales[0] is None else torch.cat([x for x in scales if x is not None])
                _accumulate(walk, G, student, at, scale, columns, first=position == 0)
    del buffers, walk, logits, G  # freed before dW is cast, which lowers the peak
    if out.dW is not None and out.dW.dtype != plan.gradient_dtype:
        out.dW = empty(tuple(out.dW.shape), plan.gradient_dtype, out.dW.device).copy_(out.dW)
    if out.dbias is not None:
        out.dbias = out.dbias.to(problem.stats_dtype)
    if adapters is not None:
        adapters.finish()
    return out


def _allocate(
    problem: Problem, plan: ChunkPlan, padded_vocab: int, saved: tuple[Tensor, Tensor] | None, metrics: bool
) -> Outputs:
    """Allocate the outputs: zeroed where some rows stay unwritten, else uninitialised."""
    hidden, weight, wide = problem.student.hidden, problem.student.weight, problem.stats_dtype
    (N, H), (wants_hidden, wants_weight, wants_bias, *_) = hidden.shape, problem.wants
    rows = hidden.new_empty if plan.tokens == N else hidden.new_zeros
    dW = None
    if wants_weight:
        # In the dtype of the gradient for one chunk, in that of the accumulator for several.
        dtype = torch.promote_types(weight.dtype, torch.float32) if plan.chunks > 1 else plan.gradient_dtype
        dW = empty((padded_vocab, H), dtype, weight.device)
        dW[weight.shape[0] if plan.tokens else 0 :].zero_()
    logs = 4 if metrics or problem.spec.z_loss else 2 * (problem.rows.labels is not None)
    stats, A = saved or (rows((N, len(Column)), dtype=wide), rows((N,), dtype=wide))
    return Outputs(
        loss=rows((N,), dtype=wide),
        A=A,
        stats=stats,
        logprobs=rows((N, logs), dtype=wide) if logs and saved is None else None,
        dh=rows((N, H), dtype=plan.gradient_dtype) if wants_hidden else None,
        dW=dW,
        dbias=hidden.new_zeros(padded_vocab, dtype=torch.float64) if wants_bias else None,
        dropped=hidden.new_zeros((), dtype=wide),
    )


class Buffers:
    """Own the reused buffers of a call: logits of each side, and stacked rows of the difference GEMM.

    The student's hold a chunk, and become its gradient; the teacher's hold a part of one.
    """

    def __init__(self, problem: Problem, plan: ChunkPlan, adapters: Any) -> None:
        hidden, V = problem.student.hidden, problem.student.weight.shape[0]
        alone, part = problem.teacher is None and not plan.target_copied, plan.part_rows
        self.adapters = adapters
        stride = row_stride(V, plan.logits_dtype, hidden.device.type)
        shape = plan.rows + (0 if alone else part), stride
        self.pair = empty(shape, plan.logits_dtype, hidden.device)[:, :V]
        self.behind = None if part == plan.rows else plan.rows  # row of T; None: it follows S
        self.zeros = self.pair.new_zeros(1, V if alone else 0)
        self.stack = hidden.new_empty(2 * part, hidden.shape[1]) if problem.spec.difference else None

    def centre(
        self, walk: Walk, at: Positions, student: Tensor, teacher: Tensor | None, start: int
    ) -> Centre:
        """Return the constants of rows from `start` of a chunk on, with a few logits in their buffer."""
        problem, head = walk.problem, walk.problem.student.weight
        labels = None if problem.rows.labels is None else walk.label_columns(at)
        n = pilot_columns(head.shape[0])
        pilot = self.pair[start:].as_strided((student.shape[0], n), (n, 1))
        if self.adapters is None:
            project(student, head[:n], pilot)
        else:
            self.adapters.pilot(student, pilot)
        rounded = not subtracts_exactly(pilot)
        return Centre.of(problem, student, teacher, labels, pilot.argmax(1), rounded)

    def fill(
        self, problem: Problem, student: Tensor, teacher: Tensor | None, centre: Centre, start: int
    ) -> Rows:
        """Return the logits S and T (or T - S) of rows from `start` of a chunk on, (C, V), with biases."""
        head, C = problem.student.weight, student.shape[0]
        part = slice(start, start + C)
        behind = part.stop if self.behind is None else self.behind
        S, T, stack, other = self.pair[part], self.pair[behind : behind + C], None, problem.teacher
        if teacher is None:
            T = self.zeros.expand(C, -1) if self.zeros.numel() else T
        elif self.stack is not None:
            stack = self.stack[: 2 * C]
            stack_difference(student, teacher, stack)
        beside = stack is not None and self.behind is None and (centre.s is None or centre.t is not None)
        both = self.pair[start : start + 2 * C] if beside else None
        if self.adapters is not None:
            self.adapters.fill(problem, student, teacher, S, T, centre, part, stack, both)
        elif stack is not None and both is not None:
            project(stack, head, both, centre.stacked)
        else:
            project(student, head, S, centre.s)
            if teacher is not None and other is not None:
                project(teacher if stack is None else stack[C:], other.weight, T, centre.t)
        biases = problem.student.bias, None if other is None else other.bias
        return Rows(S, T, *biases, centre.at_label, (centre.s, centre.t))


def _accumulate(
    walk: Walk,
    G: Tensor,
    student: Tensor,
    at: Positions,
    scale: Tensor | None,
    columns: ColumnFilter | None,
    first: bool,
) -> None:
    """Accumulate a chunk's logit gradient G, rows scaled by `scale`, into dh, dW and dbias."""
    out, shard, V = walk.out, walk.problem.shard, G.shape[1]
    scaled, dW = student, None if out.dW is None else out.dW[:V]
    if dW is not None and scale is not None:
        scaled = (student * scale[:, None]).to(student.dtype)
    kept = None if columns is None else columns.select(G, scale)
    head, packed = walk.problem.student.weight, None
    # Partial sums, of ranks, of head and adapter or of slices, are in fp32 and rounded to 16 bits once.
    whole = shard is None and walk.adapters is None and isinstance(head, Tensor)
    in_place = isinstance(at, slice) and whole
    if out.dh is not None:
        dtype = out.dh.dtype if whole else torch.promote_types(out.dh.dtype, torch.float32)
        packed = out.dh[at] if in_place else out.dh.new_empty(student.shape, dtype=dtype)
        if kept is not None:
            packed.copy_(accumulate_kept(walk, G, scaled, kept, dW, first))
        elif isinstance(head, Tensor):
            project(G, head.t(), packed)
        else:
            sum_over_slices(G, head, packed)
    elif kept is not None:
        accumulate_kept(walk, G, scaled, kept, dW, first)
    if walk.adapters is not None:
        walk.adapters.accumulate(G, student, packed, scale)
    if packed is not None and out.dh is not None:
        if shard is not None:
            shard.sum_hidden_grad(packed)
        if scale is not None:
            packed.mul_(scale[:, None])
        if not in_place:
            out.dh[at] = packed.to(out.dh.dtype)
    if dW is not None and kept is None:
        accumulate_weight_grad(G, scaled, dW, first)
    if out.dbias is not None:
        wide = torch.promote_types(G.dtype, torch.float32)
        out.dbias[:V] += G.sum(0, dtype=wide) if scale is None else torch_rows.weighted_sum(G, scale)


# ---------------------------------------------------------------- GEMMs


def project(hidden: Tensor, weight: Any, out: Tensor, centre: Tensor | None = None) -> None:
    """Compute out = hidden @ weight.T, (C, H), (V, H) -> (C, V). `out` may be fp32 for 16-bit inputs.

    `weight` is a tensor or a SlicedHead. `centre`, (C,) fp32 beside a 16-bit `out`, is subtracted from the
    rows before their one rounding.
    """
    if not isinstance(weight, Tensor):
        for part, rows in weight.slices():
            project(hidden, rows, out[:, part], centre)
        return
    columns, on_cpu = weight.t(), out.device.type == "cpu"
    if out.dtype != hidden.dtype and on_cpu:
        cpu_gemm.widening_mm(hidden, columns, out, accumulate=False)
    elif out.dtype != hidden.dtype:
        torch.mm(hidden, columns, out_dtype=out.dtype, out=out)
    elif on_cpu and not extension.mm_has_units(out.dtype):
        cpu_gemm.sliced_mm_(hidden, columns, out, centre=centre)
    elif on_cpu and extension.gemm_fp32_serves(out.dtype):
        torch.ops.opsd_kernels.gemm_fp32_(hidden, columns, out, False)
    elif centre is None:
        torch.mm(hidden, columns, out=out)
    elif subtracts_exactly(out):
        torch.ops.opsd_kernels.gemm_bf16_(hidden, columns, out, False, centre)
    else:
        # The product is added to `out` in fp32.
        torch.addmm(out.copy_(-centre[:, None]), hidden, columns, out=out)


def subtracts_exactly(out: Tensor) -> bool:
    """Return True if `project` subtracts an fp32 centre. Else it rounds the centre to the dtype of `out`."""
    if not on_host(out.device) or not extension.mm_has_units(out.dtype):
        return on_host(out.device)
    return out.dtype == torch.bfloat16 and extension.gemm_unavailable() is None


def stack_difference(student: Tensor, teacher: Tensor, out: Tensor) -> None:
    """Write [student ; teacher - student] into out (2C, H). The fp32 (fp64) difference is rounded once."""
    rows = student.shape[0]
    out[:rows].copy_(student)
    if student.dtype.itemsize == 2:
        out[rows:].copy_(teacher.float().sub_(student))
    else:
        torch.sub(teacher, student, out=out[rows:])


# ---------------------------------------------------------------- sweeps


class Exact(NamedTuple):
    """Hold what statistics take beside the sweeps' results, or None where none is asked for."""

    label: torch_rows.Logits | None  # (n, 1): the logits at the labels
    likely: Tensor | None  # (n, K): columns with the largest of 16-bit logits, where rounding may make ties
    constants: tuple[Tensor | None, Tensor | None]  # of the rows


@dataclass(frozen=True)
class Walk:
    """Hold the inputs and outputs shared by the sweeps of all chunks."""

    problem: Problem  # of Problem.for_gemms
    backend: RowBackend
    valid: Tensor | None  # (N,) bool where invalid rows are computed too
    metrics: bool
    saved: bool  # stats and A in `out` come from an earlier run: only the gradients are computed
    wants_gradient: bool
    weigher: RowWeigher | None  # where row factors depend on statistics
    out: Outputs
    adapters: Any  # adapted.Adapters, or None

    def zero_invalid(self, values: Tensor, at: Positions) -> Tensor:
        """Set the (n, ...) values of masked rows to 0. They reach the loop only where packing is off."""
        if self.valid is None:
            return values
        return torch.where(self.valid[at].view(-1, *[1] * (values.dim() - 1)), values, 0)

    def factors(self, at: Positions) -> tuple[Tensor, Tensor | None]:
        """Return the row factors and policy slopes of a chunk, given or from its own statistics."""
        rows = self.problem.rows
        if self.weigher is not None:
            factor, slope = self.weigher(self.out, at)
        else:
            assert rows.factor is not None, "a gradient needs row factors"
            factor, slope = rows.factor[at], None if rows.policy_slope is None else rows.policy_slope[at]
        return self.zero_invalid(factor, at), None if slope is None else self.zero_invalid(slope, at)

    def labels(self, at: Positions) -> Tensor:
        labels = self.problem.rows.labels
        assert labels is not None, "log-probs and policy terms need labels"
        return self.zero_invalid(labels[at], at)

    def label_columns(self, at: Positions) -> Tensor:
        """Return the (n,) columns of the labels in these heads, -1 where another rank holds the label."""
        return self.columns(self.labels(at))

    def columns(self, ids: Tensor) -> Tensor:
        """Return ids as columns of these heads, -1 where another rank holds the id."""
        return ids if self.problem.shard is None else self.problem.shard.local(ids)

    def exact(self, chunk: Rows, at: Positions) -> Exact:
        """Return what is read before the gradient overwrites S.

        Label logits are arbitrary where another rank holds the label.
        """
        problem, label, likely = self.problem, None, None
        labels = problem.rows.labels is not None
        if labels and self.out.logprobs is not None and not self.saved:
            raw = chunk.at(self.label_columns(at)[:, None].clamp(min=0))
            S, T = chunk.at_label or (raw.S, raw.T)
            label = torch_rows.logits(S, T, problem.spec.at(at), raw.bias_s, raw.bias_t)
        # A teacher's rows have no head for exact products.
        listed = problem.support is not None and problem.rows.target is None
        judged = problem.teacher is not None or listed
        if self.metrics and judged and problem.logits_dtype.itemsize == 2:
            found = [likely_columns(chunk.S, chunk.bias_s)]
            if problem.teacher is not None and not problem.spec.difference:
                found.append(likely_columns(chunk.T, chunk.bias_t))
            if labels:
                found.append(self.label_columns(at)[:, None])
            likely = torch.cat(found, 1)
        return Exact(label, likely, chunk.constants)

    def keep(self, at: Positions, stats: Tensor, loss: Tensor, A: Tensor, exact: Exact) -> None:
        """Store the results of a chunk."""
        out, problem = self.out, self.problem
        if exact.likely is not None:
            student, teacher, other = self.zero_invalid(problem.student.hidden[at], at), None, problem.teacher
            if other is not None:
                teacher = self.zero_invalid(other.hidden[at if other.rows is None else other.rows[at]], at)
            argmax = stats[:, Column.STUDENT_ARGMAX : Column.CLIPPED]
            argmax.copy_(exact_argmax(problem, problem.spec.at(at), student, teacher, exact.likely, argmax))
        out.stats[at], out.loss[at], out.A[at] = (self.zero_invalid(x, at) for x in (stats, loss, A))
        if out.logprobs is None:
            return
        logprobs = stats.new_zeros(len(stats), 2)
        if exact.label is not None:
            logprobs = torch_rows.label_logprobs(exact.label, stats)
            if problem.shard is not None:
                logprobs = problem.shard.of_owner(logprobs, self.labels(at))
        if out.logprobs.shape[1] > 2:
            levels = late_gradients.logsumexps(stats, problem.spec.at(at), exact.constants)
            logprobs = torch.cat([logprobs, levels], 1)
        out.logprobs[at] = self.zero_invalid(logprobs, at)

    def gradient(self, S: Tensor) -> Tensor:
        """Return the gradient's buffer: S itself, or the front of each row for GEMMs in a narrower dtype."""
        narrow = self.problem.student.hidden.dtype
        return S if S.dtype == narrow else narrowed(S, narrow)


def choose(walk: Walk) -> Sweep:
    """Return the sweep that all chunks of a call use."""
    if walk.problem.support is not None:
        return topk_support.top_k
    if walk.saved:
        return late_gradients.replay
    # Factors from statistics still allow one read of the logits, if the GEMMs apply them.
    weigher = walk.weigher
    given = weigher is None or (on_host(walk.out.loss.device) and weigher.policy is None)
    return (
        fused if walk.wants_gradient and given and not walk.problem.spec.z_loss else late_gradients.two_pass
    )


def fused(walk: Walk, chunk: Rows, at: Positions) -> Tensor | None:
    """Read the logits once. Factors w from statistics scale the products: G.T @ (w * h), w * (G @ W)."""
    exact = walk.exact(chunk, at)
    deferred = walk.weigher is not None
    factor, slope = (torch.ones_like(walk.out.loss[at]), None) if deferred else walk.factors(at)
    G = walk.gradient(chunk.S)
    labels = None if slope is None else walk.labels(at)
    biases = chunk.bias_s, chunk.bias_t
    stats, loss, A = walk.backend.row_fused_(
        chunk.S, chunk.T, factor, walk.problem.spec.at(at), *biases, walk.metrics, G, slope, labels
    )
    walk.keep(at, stats, loss, A, exact)
    if not deferred:
        return None
    scale, _ = walk.factors(at)
    G[scale == 0] = 0  # a row of factor zero may hold inf
    return scale


# ---------------------------------------------------------------- memory


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an uninitialised tensor, on a CPU in 2 MiB pages where the system grants them.

    The first touch of 131 MiB takes 45 ms in 4 KiB pages and 14 ms in huge ones on a 2-core machine: 45 ms is
    a third of the four bf16 GEMMs that use the memory.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    nbytes = tensor.numel() * tensor.element_size()
    madvise = _madvise()
    if device.type == "cpu" and nbytes >= 2 * _PAGE and madvise is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        length = (tensor.data_ptr() + nbytes) // _PAGE * _PAGE - start
        madvise(start, length, _HUGE_PAGES)  # advice only: a refusal changes nothing
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # not a POSIX system
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def on_host(device: torch.device) -> bool:
    """Return True on CPU, where reading values or boolean indexing needs no device sync."""
    return device.type == "cpu"
