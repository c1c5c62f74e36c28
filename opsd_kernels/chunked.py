"""The one loop: walk the rows in chunks, project, sweep, and turn logit gradients into dh, dW and dbias. Every tensor with a vocabulary axis dies here.

The same loop computes gradients during the forward pass, statistics only, and, given saved statistics, the gradients of recompute mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import projection
from .divergences import transform
from .kernels.contract import Column, RowBackend, narrowed, offset, stats_dtype
from .planner import ChunkPlan
from .spec import RowSpec


@dataclass(frozen=True)
class Heads:
    """Inputs of a call. Weights are cut to the vocabulary in use; biases are of the dtype of the statistics."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V, H_s)
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (V, H_t)
    teacher_bias: Tensor | None  # (V,)
    padded_vocab: int  # rows of the student's whole head; its gradient beyond V is zero


@dataclass
class Outputs:
    """N-sized results over all rows, zeros where a row is not valid, and the gradients asked for."""

    loss: Tensor  # (N,) nats
    A: Tensor  # (N,) the row scalar of math.md
    stats: Tensor  # (N, len(Column))
    logprobs: Tensor | None  # (N, 2) student's and teacher's log-prob of the label
    dh: Tensor | None  # (N, H_s)
    dW: Tensor | None  # (padded_vocab, H_s)
    dbias: Tensor | None  # (padded_vocab,) float64 while chunks add up, then of the dtype of the statistics


@dataclass(frozen=True)
class Wanted:
    """What a call is to produce beside losses."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    metrics: bool = False

    @property
    def gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class Workspace:
    """The reused buffers of a call: a pair of logits buffers, the packed rows that feed them, and the narrowed gradient."""

    def __init__(self, heads: Heads, spec: RowSpec, plan: ChunkPlan) -> None:
        hidden, V = heads.student_hidden, heads.student_weight.shape[0]
        self.pair = projection.empty((2 * plan.rows, V), plan.logits_dtype, hidden.device)
        self.stack = hidden.new_empty(2 * plan.rows, hidden.shape[1]) if spec.difference else None
        self.narrow = hidden.dtype

    def project(self, heads: Heads, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits S and T (or T - S) of a chunk, (C, V) each."""
        rows = student.shape[0]
        pair = self.pair[: 2 * rows]
        if self.stack is not None:
            stack = self.stack[: 2 * rows]
            projection.stack_difference(student, teacher, stack)
            projection.project(stack, heads.student_weight, pair)
        else:
            projection.project(student, heads.student_weight, pair[:rows])
            projection.project(teacher, heads.teacher_weight, pair[rows:])
        return pair[:rows], pair[rows:]

    def gradient(self, S: Tensor) -> Tensor:
        """Where the gradient of S goes: over S, and in front of each row where the GEMMs want a narrower type."""
        return S if S.dtype == self.narrow else narrowed(S, self.narrow)


def run(
    heads: Heads,
    spec: RowSpec,
    plan: ChunkPlan,
    backend: RowBackend,
    wanted: Wanted,
    *,
    index: Tensor | None = None,  # (n_valid,) int64 rows that count; None: all
    factor: Tensor | None = None,  # (N,) row factors of the gradient
    labels: Tensor | None = None,  # (N,)
    saved: tuple[Tensor, Tensor] | None = None,  # (stats, A) of an earlier call: only the gradients are computed
) -> Outputs:
    """Losses, statistics and gradients of all chunks. `index` has plan.tokens rows."""
    out = _allocate(heads, plan, wanted, labels, saved)
    space = Workspace(heads, spec, plan)
    for start in range(0, plan.tokens, plan.rows):
        rows = slice(start, min(start + plan.rows, plan.tokens))
        _chunk(heads, spec, backend, wanted, space, out, rows if index is None else index[rows], factor, labels, saved, first=start == 0)
    del space  # before dW is cast: the two never stand together
    if wanted.weight and out.dW.dtype != plan.gradient_dtype:
        out.dW = projection.empty(tuple(out.dW.shape), plan.gradient_dtype, out.dW.device).copy_(out.dW)
    if wanted.bias:
        out.dbias = out.dbias.to(stats_dtype(heads.student_hidden.dtype))
    return out


def _allocate(heads: Heads, plan: ChunkPlan, wanted: Wanted, labels: Tensor | None, saved: tuple[Tensor, Tensor] | None) -> Outputs:
    hidden = heads.student_hidden
    N, wide = hidden.shape[0], stats_dtype(hidden.dtype)
    all_valid = plan.tokens == N

    def rows(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(N, *shape, dtype=dtype) if all_valid else hidden.new_zeros(N, *shape, dtype=dtype)

    stats, A = saved or (rows(len(Column)), rows())
    return Outputs(
        loss=rows(),
        A=A,
        stats=stats,
        logprobs=rows(2) if labels is not None and wanted.metrics else None,
        dh=rows(hidden.shape[1], dtype=plan.gradient_dtype) if wanted.hidden else None,
        dW=_weight_grad(heads, plan) if wanted.weight else None,
        dbias=hidden.new_zeros(heads.padded_vocab, dtype=torch.float64) if wanted.bias else None,
    )


def _weight_grad(heads: Heads, plan: ChunkPlan) -> Tensor:
    """Room for dW. A single chunk's GEMM may write the gradient's own dtype; several add up in the accumulator's."""
    weight = heads.student_weight
    dtype = projection.accumulator_dtype(weight.dtype) if plan.chunks > 1 else plan.gradient_dtype
    dW = projection.empty((heads.padded_vocab, weight.shape[1]), dtype, weight.device)
    dW[weight.shape[0] if plan.tokens else 0 :].zero_()
    return dW


def _chunk(heads, spec, backend, wanted, space, out, rows, factor, labels, saved, *, first) -> None:
    student, teacher = heads.student_hidden[rows], heads.teacher_hidden[rows]
    bias_s, bias_t = heads.student_bias, heads.teacher_bias
    S, T = space.project(heads, student, teacher)
    at_label = _label_logits(S, T, labels[rows], spec, bias_s, bias_t) if out.logprobs is not None else None
    if saved is not None:
        G = space.gradient(S)
        backend.row_grad_(S, T, out.stats[rows], out.A[rows], factor[rows], spec, bias_s, bias_t, G)
    else:
        if wanted.gradient:
            G = space.gradient(S)
            stats, loss, A = backend.row_fused_(S, T, factor[rows], spec, bias_s, bias_t, wanted.metrics, G)
        else:
            stats = backend.row_stats(S, T, spec, bias_s, bias_t, wanted.metrics)
            loss, A = backend.row_dot(S, T, stats, spec, bias_s, bias_t)
        out.stats[rows], out.loss[rows], out.A[rows] = stats, loss, A
        if at_label is not None:
            out.logprobs[rows] = _label_logprobs(at_label, stats, spec.linear_difference(bias_s is bias_t))
    if wanted.hidden:
        _hidden_grad(G, heads.student_weight, out.dh, rows)
    if wanted.weight:
        projection.accumulate_weight_grad(G, student, out.dW[: G.shape[1]], first)
    if wanted.bias:
        out.dbias[: G.shape[1]] += G.sum(0, dtype=stats_dtype(G.dtype))


def _hidden_grad(G: Tensor, weight: Tensor, dh: Tensor, rows: slice | Tensor) -> None:
    packed = dh[rows] if isinstance(rows, slice) else dh.new_empty(G.shape[0], dh.shape[1])
    projection.project(G, weight.t(), packed)
    if not isinstance(rows, slice):
        dh[rows] = packed


def _label_logits(S: Tensor, T: Tensor, labels: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """s, t and d = t - s at each row's label, before the gradient overwrites S."""
    column = labels[:, None]
    wide = stats_dtype(S.dtype)
    z, other = S.gather(1, column).to(wide), T.gather(1, column).to(wide)

    def at(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[column]

    s = transform(z, spec.student, at(bias_s))
    if spec.linear_difference(bias_s is bias_t):
        return s, s + spec.student.factor * other, spec.student.factor * other
    t = transform(z + other if spec.difference else other, spec.teacher, at(bias_t))
    return s, t, t - s


def _label_logprobs(at_label: tuple[Tensor, Tensor, Tensor], stats: Tensor, linear: bool) -> Tensor:
    """(n, 2) log q and log p of the label."""
    s, t, d = at_label
    column = stats[:, :, None]
    references = column[:, Column.STUDENT_MAX], column[:, Column.TEACHER_MAX]
    x = s - references[0]
    y = x + offset(s, t, d, *references, linear) if linear else t - references[1]
    return torch.cat([x - column[:, Column.STUDENT_LOGSUM], y - column[:, Column.TEACHER_LOGSUM]], dim=1)
