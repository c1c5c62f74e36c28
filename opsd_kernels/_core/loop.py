"""The one loop: walk the rows in chunks, project, sweep, and turn logit gradients into dh, dW and dbias. Every tensor with a vocabulary axis dies here.

The same loop computes gradients during the forward pass, statistics only, and, given saved statistics, the gradients of recompute mode; on the whole
vocabulary or on a support; with row factors known beforehand or found from the chunk's own statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .._rows import torch_rows
from .._rows.contract import Column, RowBackend, narrowed, stats_dtype
from ..spec import RowSpec, Support
from . import gemm, topk_support
from .memory import empty
from .planner import ChunkPlan, row_stride
from .topk_support import Entries, Restricted, Rows


@dataclass(frozen=True)
class Heads:
    """Inputs of a call. Weights are cut to the vocabulary in use; biases are of the dtype of the statistics. Without a teacher all its logits are 0."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V, H_s)
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher_weight: Tensor | None  # (V, H_t)
    teacher_bias: Tensor | None  # (V,)
    padded_vocab: int  # rows of the student's whole head; its gradient beyond V is zero


@dataclass(frozen=True)
class Tokens:
    """What a call knows of its rows, each (N,) or (N, K), or None."""

    index: Tensor | None = None  # (n_valid,) int64 rows that are computed; None: all
    valid: Tensor | None = (
        None  # (N,) bool where all are computed though not all count: those that do not are projected as zeros and give zeros
    )
    factor: Tensor | None = None  # of the divergence's gradient
    policy: Tensor | None = None  # of the gradient of -log q(label)
    labels: Tensor | None = None
    topk_ids: Tensor | None = None  # (N, K) a teacher's support, see topk_support.entries
    topk_logprobs: Tensor | None = None  # (N, K)


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


class Weigh(Protocol):
    """From the outputs so far and a chunk's rows to their factors and policies, (n,) each."""

    has_policy: bool  # else the second is None
    exchanges: bool  # ranks talk when it is called, and differ in their chunks

    def __call__(self, out: Outputs, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]: ...


class Shard(Protocol):
    """What a head whose rows are spread over ranks adds to the loop (vocab_parallel.VocabShard). The sweeps of its backend know whole rows."""

    def local(self, labels: Tensor) -> Tensor: ...

    def of_owner(self, values: Tensor, labels: Tensor) -> Tensor: ...

    def sum_hidden_grad(self, dh: Tensor) -> None: ...

    def entries(
        self,
        rows: Rows,
        stats: Tensor,
        spec: RowSpec,
        restriction: Support,
        ids: Tensor | None,
        logprobs: Tensor | None,
    ) -> tuple[Entries, Entries]: ...


class Workspace:
    """The reused buffers of a call: a pair of logits buffers (one without a teacher), and the packed rows that feed them."""

    def __init__(self, heads: Heads, spec: RowSpec, plan: ChunkPlan) -> None:
        hidden, V = heads.student_hidden, heads.student_weight.shape[0]
        sides = 1 if heads.teacher_hidden is None else 2
        stride = row_stride(V, plan.logits_dtype, hidden.device.type)
        self.pair = empty((sides * plan.rows, stride), plan.logits_dtype, hidden.device)[:, :V]
        self.zeros = self.pair.new_zeros(1, V) if sides == 1 else None
        self.stack = hidden.new_empty(2 * plan.rows, hidden.shape[1]) if spec.difference else None
        self.narrow = hidden.dtype

    def project(self, heads: Heads, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw logits S and T (or T - S) of a chunk, (C, V) each."""
        rows = student.shape[0]
        pair = self.pair[: 2 * rows]
        if self.stack is not None:
            stack = self.stack[: 2 * rows]
            gemm.stack_difference(student, teacher, stack)
            gemm.project(stack, heads.student_weight, pair)
            return pair[:rows], pair[rows:]
        gemm.project(student, heads.student_weight, pair[:rows])
        if teacher is None:
            return pair[:rows], self.zeros.expand(rows, -1)
        gemm.project(teacher, heads.teacher_weight, pair[rows:])
        return pair[:rows], pair[rows:]

    def gradient(self, S: Tensor) -> Tensor:
        """Where the gradient of S goes: over S, and in front of each row where the GEMMs want a narrower type."""
        return S if S.dtype == self.narrow else narrowed(S, self.narrow)


def on_host(device: torch.device) -> bool:
    """Whether Python may look at what a tensor holds, or index by a mask, without waiting for a device."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Loop:
    """A call: its inputs, what it wants and where that goes."""

    heads: Heads
    spec: RowSpec
    plan: ChunkPlan
    backend: RowBackend
    wanted: Wanted
    tokens: Tokens
    restriction: Support | None
    saved: bool  # stats and A in `out` are those of an earlier call: only the gradients are computed
    weigh: Weigh | None
    shard: Shard | None  # None: the heads are whole
    out: Outputs
    space: Workspace

    def chunk(self, rows: slice | Tensor, first: bool) -> None:
        heads, out = self.heads, self.out
        student = self._counted(
            heads.student_hidden[rows], rows
        )  # inf or NaN would pass a row gradient of zeros into dW
        teacher = None if heads.teacher_hidden is None else self._counted(heads.teacher_hidden[rows], rows)
        chunk = Rows(*self.space.project(heads, student, teacher), heads.student_bias, heads.teacher_bias)
        scale = self._sweep(chunk, rows)
        if not self.wanted.gradient:
            return
        G = self.space.gradient(chunk.S)
        if self.wanted.hidden:
            self._hidden_grad(G, rows, scale)
        if self.wanted.weight:
            scaled = student if scale is None else (student * scale[:, None]).to(student.dtype)
            gemm.accumulate_weight_grad(G, scaled, out.dW[: G.shape[1]], first)
        if self.wanted.bias:
            out.dbias[: G.shape[1]] += (
                G.sum(0, dtype=stats_dtype(G.dtype)) if scale is None else _weighted_sum(G, scale)
            )

    def _sweep(self, chunk: Rows, rows: slice | Tensor) -> Tensor | None:
        """Results of the rows, and the gradient over S. What comes back is still to multiply each row of the gradient."""
        if self.saved and self.restriction is None:
            self._gradient(
                chunk,
                rows,
                self.out.stats[rows],
                self.out.A[rows],
                self._known("factor", rows),
                self._known("policy", rows),
            )
            return None
        if self.restriction is not None:
            return self._restricted(chunk, rows)
        known = self.weigh is None
        deferred = not known and on_host(chunk.S.device) and not self.weigh.has_policy
        if self.wanted.gradient and (known or deferred):
            return self._fused(chunk, rows, deferred)
        stats = self.backend.row_stats(
            chunk.S, chunk.T, self.spec, chunk.bias_s, chunk.bias_t, self.wanted.metrics
        )
        loss, A = self.backend.row_dot(chunk.S, chunk.T, stats, self.spec, chunk.bias_s, chunk.bias_t)
        self._keep(rows, stats, loss, A, self._label_logits(chunk, rows))
        if self.wanted.gradient:
            self._gradient(chunk, rows, stats, A, *self._weighed(rows))
        return None

    def _fused(self, chunk: Rows, rows: slice | Tensor, deferred: bool) -> Tensor | None:
        """One pass over the logits. Factors that only the statistics tell are applied to the products of the gradient: G.T @ (w * h), w * (G @ W)."""
        at_label = self._label_logits(chunk, rows)
        factor = torch.ones_like(self.out.loss[rows]) if deferred else self._known("factor", rows)
        G = self.space.gradient(chunk.S)
        policy, labels = self._known("policy", rows), self._known("labels", rows)
        biases = chunk.bias_s, chunk.bias_t
        stats, loss, A = self.backend.row_fused_(
            chunk.S,
            chunk.T,
            factor,
            self.spec,
            *biases,
            self.wanted.metrics,
            G,
            policy,
            labels if policy is not None else None,
        )
        self._keep(rows, stats, loss, A, at_label)
        if not deferred:
            return None
        scale, _ = self._weighed(rows)
        G[scale == 0] = 0  # a row of weight zero may be infinite
        return scale

    def _restricted(self, chunk: Rows, rows: slice | Tensor) -> None:
        at_label = self._label_logits(chunk, rows)
        stats = (
            self.out.stats[rows]
            if self.saved
            else self.backend.row_stats(
                chunk.S, chunk.T, self.spec, chunk.bias_s, chunk.bias_t, self.wanted.metrics
            )
        )
        listed = (
            None if given is None else given[rows]
            for given in (self.tokens.topk_ids, self.tokens.topk_logprobs)
        )
        if self.shard is None:
            at = own = topk_support.entries(chunk, stats, self.spec, self.restriction, *listed)
        else:
            at, own = self.shard.entries(chunk, stats, self.spec, self.restriction, *listed)
        result: Restricted = topk_support.restricted(at, stats, self.spec, self.restriction.tail)
        if not self.saved:
            self._keep(rows, stats, result.loss, result.A, at_label)
        if self.wanted.gradient:
            factor, policy = (
                (self._known("factor", rows), self._known("policy", rows))
                if self.weigh is None
                else self._weighed(rows)
            )
            labels = None if policy is None else self._columns(rows)
            topk_support.write_gradient_(
                self.backend,
                chunk,
                stats,
                self.spec,
                own,
                result,
                factor,
                policy,
                labels,
                self.space.gradient(chunk.S),
            )

    def _gradient(
        self,
        chunk: Rows,
        rows: slice | Tensor,
        stats: Tensor,
        A: Tensor,
        factor: Tensor,
        policy: Tensor | None,
    ) -> None:
        labels = None if policy is None else self._known("labels", rows)
        G = self.space.gradient(chunk.S)
        self.backend.row_grad_(
            chunk.S, chunk.T, stats, A, factor, self.spec, chunk.bias_s, chunk.bias_t, G, policy, labels
        )

    def _known(self, name: str, rows: slice | Tensor) -> Tensor | None:
        value = getattr(self.tokens, name)
        return None if value is None else self._counted(value[rows], rows)

    def _columns(self, rows: slice | Tensor) -> Tensor:
        """(n,) where the labels lie in these heads; -1 where in another rank's."""
        labels = self._known("labels", rows)
        return labels if self.shard is None else self.shard.local(labels)

    def _counted(self, values: Tensor, rows: slice | Tensor) -> Tensor:
        """(n, ...) values of a chunk, 0 in the rows that are computed but do not count."""
        if self.tokens.valid is None:
            return values
        return torch.where(self.tokens.valid[rows].view(-1, *[1] * (values.dim() - 1)), values, 0)

    def _weighed(self, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        factor, policy = self.weigh(self.out, rows)
        return self._counted(factor, rows), None if policy is None else self._counted(policy, rows)

    def _keep(
        self, rows: slice | Tensor, stats: Tensor, loss: Tensor, A: Tensor, at_label: torch_rows.Logits | None
    ) -> None:
        out = self.out
        out.stats[rows], out.loss[rows], out.A[rows] = (self._counted(x, rows) for x in (stats, loss, A))
        if at_label is not None:
            logprobs = _label_logprobs(at_label, stats)
            if self.shard is not None:
                logprobs = self.shard.of_owner(logprobs, self._known("labels", rows))
            out.logprobs[rows] = self._counted(logprobs, rows)

    def _label_logits(self, chunk: Rows, rows: slice | Tensor) -> torch_rows.Logits | None:
        """Logits at each row's label, (n, 1), before the gradient overwrites S; any where the label lies in another rank's head."""
        if self.out.logprobs is None or self.saved:
            return None
        raw = chunk.at(self._columns(rows)[:, None].clamp(min=0))
        return torch_rows.logits(*raw[:2], self.spec, *raw[2:])

    def _hidden_grad(self, G: Tensor, rows: slice | Tensor, scale: Tensor | None) -> None:
        dh = self.out.dh
        in_place = isinstance(rows, slice) and self.shard is None
        # Parts that ranks add up are not rounded to 16 bits before.
        dtype = dh.dtype if self.shard is None else gemm.accumulator_dtype(dh.dtype)
        packed = dh[rows] if in_place else dh.new_empty(G.shape[0], dh.shape[1], dtype=dtype)
        gemm.project(G, self.heads.student_weight.t(), packed)
        if self.shard is not None:
            self.shard.sum_hidden_grad(packed)
        if scale is not None:
            packed.mul_(scale[:, None])
        if not in_place:
            dh[rows] = packed.to(dh.dtype)


def run(
    heads: Heads,
    spec: RowSpec,
    plan: ChunkPlan,
    backend: RowBackend,
    wanted: Wanted,
    tokens: Tokens,
    *,
    restriction: Support | None = None,
    saved: tuple[Tensor, Tensor]
    | None = None,  # (stats, A) of an earlier call: only the gradients are computed
    weigh: Weigh | None = None,  # the factors, where they depend on statistics
    bounds: list[slice] | None = None,  # chunks other than the plan's, none longer
    shard: Shard | None = None,
) -> Outputs:
    """Losses, statistics and gradients of all chunks. `tokens.index` has plan.tokens rows."""
    out = _allocate(heads, plan, wanted, tokens.labels, saved)
    space = Workspace(heads, spec, plan)
    loop = Loop(
        heads, spec, plan, backend, wanted, tokens, restriction, saved is not None, weigh, shard, out, space
    )
    for position, rows in enumerate(plan.bounds() if bounds is None else bounds):
        loop.chunk(rows if tokens.index is None else tokens.index[rows], first=position == 0)
    del loop, space  # before dW is cast: the two never stand together
    if wanted.weight and out.dW.dtype != plan.gradient_dtype:
        out.dW = empty(tuple(out.dW.shape), plan.gradient_dtype, out.dW.device).copy_(out.dW)
    if wanted.bias:
        out.dbias = out.dbias.to(stats_dtype(heads.student_hidden.dtype))
    return out


def _allocate(
    heads: Heads, plan: ChunkPlan, wanted: Wanted, labels: Tensor | None, saved: tuple[Tensor, Tensor] | None
) -> Outputs:
    hidden = heads.student_hidden
    N, wide = hidden.shape[0], stats_dtype(hidden.dtype)
    all_valid = plan.tokens == N

    def rows(*shape: int, dtype: torch.dtype = wide) -> Tensor:
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
        logprobs=rows(2) if labels is not None and saved is None else None,
        dh=rows(hidden.shape[1], dtype=plan.gradient_dtype) if wanted.hidden else None,
        dW=_weight_grad(heads, plan) if wanted.weight else None,
        dbias=hidden.new_zeros(heads.padded_vocab, dtype=torch.float64) if wanted.bias else None,
    )


def _weight_grad(heads: Heads, plan: ChunkPlan) -> Tensor:
    """Room for dW. A single chunk's GEMM may write the gradient's own dtype; several add up in the accumulator's."""
    weight = heads.student_weight
    dtype = gemm.accumulator_dtype(weight.dtype) if plan.chunks > 1 else plan.gradient_dtype
    dW = empty((heads.padded_vocab, weight.shape[1]), dtype, weight.device)
    dW[weight.shape[0] if plan.tokens else 0 :].zero_()
    return dW


def _weighted_sum(G: Tensor, scale: Tensor) -> Tensor:
    """scale @ G, (V,), with 16-bit rows widened a few at a time."""
    step = 16 if gemm.is_16_bit(G.dtype) else G.shape[0]
    return sum(
        scale[start : start + step] @ G[start : start + step].to(scale.dtype)
        for start in range(0, G.shape[0], step)
    )


def _label_logprobs(at: torch_rows.Logits, stats: Tensor) -> Tensor:
    """(n, 2) log q and log p of the label."""
    column = stats[:, :, None]
    references = column[:, Column.STUDENT_MAX], column[:, Column.TEACHER_MAX]
    return torch.cat(
        [
            at.s - references[0] - column[:, Column.STUDENT_LOGSUM],
            at.teacher_above(*references) - column[:, Column.TEACHER_LOGSUM],
        ],
        dim=1,
    )
