"""Walk the rows in chunks: project, sweep, and turn logit gradients into dh, dW and dbias.

The only module that allocates tensors with a vocabulary dimension; none outlives the loop. The same loop
computes gradients during the forward pass, statistics alone and, from saved statistics, the gradients of
recompute mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._rows.contract import Column, RowBackend, stats_dtype
from . import gemm, sweeps
from .memory import empty, on_host
from .planner import ChunkPlan, is_16_bit, row_stride
from .problem import ComputedRows, Outputs, Problem
from .reductions import RowWeigher
from .sweeps import Positions, Walk
from .topk_support import Rows


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
) -> Outputs:
    """Return losses, statistics and gradients. `bounds` replaces the plan's chunks by others, none longer."""
    padded_vocab = problem.student.weight.shape[0]
    problem = problem.for_gemms()
    out = _allocate(problem, plan, padded_vocab, saved)
    buffers = Buffers(problem, plan)
    walk = Walk(problem, backend, rows.valid, metrics, saved is not None, weigher, out)
    sweep, chunk = sweeps.choose(walk), None
    for position, part in enumerate(plan.bounds() if bounds is None else bounds):
        at = part if rows.index is None else rows.index[part]
        # Zeroed: inf or NaN in an invalid row times its zero gradient would put NaN into dW.
        student = walk.counted(problem.student.hidden[at], at)
        teacher = None if problem.teacher is None else walk.counted(problem.teacher.hidden[at], at)
        labels = None if problem.rows.labels is None else walk.label_columns(at)
        chunk = buffers.project(problem, student, teacher, labels)
        scale = sweep(walk, chunk, at)
        if walk.wants_gradient:
            _accumulate(walk, walk.gradient(chunk.S), student, at, scale, first=position == 0)
    del buffers, walk, chunk  # freed before dW is cast, which lowers the peak
    if out.dW is not None and out.dW.dtype != plan.gradient_dtype:
        out.dW = empty(tuple(out.dW.shape), plan.gradient_dtype, out.dW.device).copy_(out.dW)
    if out.dbias is not None:
        out.dbias = out.dbias.to(problem.stats_dtype)
    return out


class Buffers:
    """Own the reused buffers of a call: logits of each side, and stacked rows of the difference GEMM."""

    def __init__(self, problem: Problem, plan: ChunkPlan) -> None:
        hidden, V = problem.student.hidden, problem.student.weight.shape[0]
        sides = 1 if problem.teacher is None else 2
        stride = row_stride(V, plan.logits_dtype, hidden.device.type)
        self.pair = empty((sides * plan.rows, stride), plan.logits_dtype, hidden.device)[:, :V]
        self.zeros = self.pair.new_zeros(1, V if sides == 1 else 0)
        self.stack = hidden.new_empty(2 * plan.rows, hidden.shape[1]) if problem.spec.difference else None

    def project(
        self, problem: Problem, student: Tensor, teacher: Tensor | None, labels: Tensor | None
    ) -> Rows:
        """Return a chunk's logits S and T (or T - S), (C, V) each, with the biases.

        `labels` (C,) are columns of these heads, -1 where another rank holds the label.
        """
        C = student.shape[0]
        S, T = self.pair[:C], self.pair[C : 2 * C]
        heads = problem.student.weight, None if problem.teacher is None else problem.teacher.weight
        biases = problem.student.bias, None if problem.teacher is None else problem.teacher.bias
        centre = _centre(problem, student, teacher, labels, S)
        if self.stack is not None and teacher is not None:
            stack = self.stack[: 2 * C]
            gemm.stack_difference(student, teacher, stack)
            if centre is None or on_host(stack.device):
                both = None if centre is None else torch.cat([centre.s, centre.t])
                gemm.project(stack, heads[0], self.pair[: 2 * C], both)
            else:
                gemm.project(stack[:C], heads[0], S, centre.s)
                gemm.project(stack[C:], heads[0], T)
        else:
            gemm.project(student, heads[0], S, None if centre is None else centre.s)
            if teacher is None or heads[1] is None:
                T = self.zeros.expand(C, -1)
            else:
                gemm.project(teacher, heads[1], T, None if centre is None else centre.t)
        return Rows(S, T, *biases, None if centre is None else centre.at_label)


class Centre(NamedTuple):
    """Hold the constants that 16-bit logits of a chunk are held relative to, (C,) each."""

    s: Tensor
    t: Tensor  # of the teacher's logits, or of the differences
    at_label: tuple[Tensor, Tensor] | None  # (C, 1) fp32: the entries at the labels, relative to s and t


def _centre(
    problem: Problem, student: Tensor, teacher: Tensor | None, labels: Tensor | None, scratch: Tensor
) -> Centre | None:
    """Return the logits of a likely column, or of the label if it is likelier; None for other buffers.

    `scratch`, (C, V), is overwritten. All ranks of a shard take the same constants.
    """
    if not problem.centred:
        return None
    difference = problem.spec.difference

    def at(columns: Tensor) -> tuple[Tensor, Tensor]:
        s = gemm.logits_at(student, problem.student.weight, columns)
        if teacher is None or problem.teacher is None:
            return s, torch.zeros_like(s)
        t = gemm.logits_at(teacher, problem.teacher.weight, columns)
        return s, t - s if difference else t

    s, t = at(gemm.likely_columns(student, problem.student.weight, scratch))
    label = None
    if labels is not None:
        label = at(labels.clamp(min=0))
        likelier = (labels >= 0) & (label[0] > s)
        s, t = (torch.where(likelier, *pair) for pair in zip(label, (s, t), strict=True))
    if problem.shard is not None:
        s, t = problem.shard.of_largest(s, t)
    # On a GPU a centre costs a pass over the buffer; a difference, which is small, goes without.
    spared = difference and not on_host(s.device)
    s, t = torch.where(s.isfinite(), s, 0.0), torch.where(t.isfinite() & (not spared), t, 0.0)
    return Centre(s, t, None if label is None else ((label[0] - s)[:, None], (label[1] - t)[:, None]))


def _accumulate(
    walk: Walk, G: Tensor, student: Tensor, at: Positions, scale: Tensor | None, first: bool
) -> None:
    """Accumulate a chunk's logit gradient G, rows scaled by `scale`, into dh, dW and dbias."""
    out, V = walk.out, G.shape[1]
    if out.dh is not None:
        _hidden_gradient(walk, out.dh, G, at, scale)
    if out.dW is not None:
        scaled = student if scale is None else (student * scale[:, None]).to(student.dtype)
        gemm.accumulate_weight_grad(G, scaled, out.dW[:V], first)
    if out.dbias is not None:
        out.dbias[:V] += G.sum(0, dtype=stats_dtype(G.dtype)) if scale is None else _weighted_sum(G, scale)


def _hidden_gradient(walk: Walk, dh: Tensor, G: Tensor, at: Positions, scale: Tensor | None) -> None:
    """Write the chunk's rows of dh, summed over the ranks of a shard."""
    shard = walk.problem.shard
    in_place = isinstance(at, slice) and shard is None
    # Partial sums of ranks are reduced in fp32 and rounded to 16 bits once.
    dtype = dh.dtype if shard is None else gemm.accumulator_dtype(dh.dtype)
    packed = dh[at] if in_place else dh.new_empty(G.shape[0], dh.shape[1], dtype=dtype)
    gemm.project(G, walk.problem.student.weight.t(), packed)
    if shard is not None:
        shard.sum_hidden_grad(packed)
    if scale is not None:
        packed.mul_(scale[:, None])
    if not in_place:
        dh[at] = packed.to(dh.dtype)


def _weighted_sum(G: Tensor, scale: Tensor) -> Tensor:
    """Return scale @ G, (V,), casting 16 rows of a 16-bit G at a time."""
    step = 16 if is_16_bit(G.dtype) else G.shape[0]
    total = scale[:step] @ G[:step].to(scale.dtype)
    for start in range(step, G.shape[0], step):
        part = slice(start, start + step)
        total = total + scale[part] @ G[part].to(scale.dtype)
    return total


def _allocate(
    problem: Problem, plan: ChunkPlan, padded_vocab: int, saved: tuple[Tensor, Tensor] | None
) -> Outputs:
    """Allocate the outputs: zeroed where some rows stay unwritten, else uninitialised."""
    hidden, N = problem.student.hidden, problem.tokens
    all_valid = plan.tokens == N
    wants_hidden, wants_weight, wants_bias = problem.wants

    def rows(*shape: int, dtype: torch.dtype = problem.stats_dtype) -> Tensor:
        return (
            hidden.new_empty(N, *shape, dtype=dtype)
            if all_valid
            else hidden.new_zeros(N, *shape, dtype=dtype)
        )

    stats, A = saved or (rows(len(Column)), rows())
    return Outputs(
        loss=rows(),
        A=A,
        stats=stats,
        logprobs=rows(2) if problem.rows.labels is not None and saved is None else None,
        dh=rows(hidden.shape[1], dtype=plan.gradient_dtype) if wants_hidden else None,
        dW=_weight_gradient(problem.student.weight, plan, padded_vocab) if wants_weight else None,
        dbias=hidden.new_zeros(padded_vocab, dtype=torch.float64) if wants_bias else None,
    )


def _weight_gradient(weight: Tensor, plan: ChunkPlan, padded_vocab: int) -> Tensor:
    """Allocate dW, in the dtype of the gradient for one chunk and in that of the accumulator for several."""
    dtype = gemm.accumulator_dtype(weight.dtype) if plan.chunks > 1 else plan.gradient_dtype
    dW = empty((padded_vocab, weight.shape[1]), dtype, weight.device)
    dW[weight.shape[0] if plan.tokens else 0 :].zero_()
    return dW
