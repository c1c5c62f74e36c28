"""Sweep the logits of a chunk in one of four ways, chosen before the loop.

`fused` reads the logits once and overwrites them with the gradient. `two_pass` sweeps for statistics first,
where row factors depend on them. `replay` computes gradients from the statistics of an earlier run. `top_k`
works on a support. Each writes losses and statistics of its rows into the outputs, and the logit gradient
over S. It returns the per-row scales that the caller must still apply to the gradient, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rows import torch_rows
from .._rows.contract import Column, RowBackend, narrowed
from . import topk_support
from .memory import on_host
from .problem import Outputs, Problem
from .reductions import RowWeigher
from .topk_support import Rows

Positions = slice | Tensor  # of a chunk's rows among all rows
Sweep = Callable[["Walk", Rows, Positions], Tensor | None]


@dataclass(frozen=True)
class Walk:
    """Hold the inputs and outputs shared by the sweeps of all chunks."""

    problem: Problem  # of Problem.for_gemms
    backend: RowBackend
    valid: Tensor | None  # (N,) bool where invalid rows are computed too
    metrics: bool
    saved: bool  # stats and A in `out` come from an earlier run: only the gradients are computed
    weigher: RowWeigher | None  # where row factors depend on statistics
    out: Outputs

    @property
    def wants_gradient(self) -> bool:
        return any(self.problem.wants)

    def counted(self, values: Tensor, at: Positions) -> Tensor:
        """Zero the (n, ...) values of a chunk in computed rows that are invalid."""
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
        return self.counted(factor, at), None if slope is None else self.counted(slope, at)

    def labels(self, at: Positions) -> Tensor:
        labels = self.problem.rows.labels
        assert labels is not None, "log-probs and policy terms need labels"
        return self.counted(labels[at], at)

    def label_columns(self, at: Positions) -> Tensor:
        """Return the (n,) columns of the labels in these heads, -1 where another rank holds the label."""
        labels = self.labels(at)
        return labels if self.problem.shard is None else self.problem.shard.local(labels)

    def label_logits(self, chunk: Rows, at: Positions) -> torch_rows.Logits | None:
        """Return the logits at the labels, (n, 1), read before the gradient overwrites S, or None.

        They are arbitrary where another rank holds the label.
        """
        if self.out.logprobs is None or self.saved:
            return None
        raw = chunk.at(self.label_columns(at)[:, None].clamp(min=0))
        S, T = (raw.S, raw.T) if chunk.at_label is None else chunk.at_label
        return torch_rows.logits(S, T, self.problem.spec, raw.bias_s, raw.bias_t)

    def keep(
        self, at: Positions, stats: Tensor, loss: Tensor, A: Tensor, at_label: torch_rows.Logits | None
    ) -> None:
        """Store the results of a chunk."""
        out = self.out
        out.stats[at], out.loss[at], out.A[at] = (self.counted(x, at) for x in (stats, loss, A))
        if at_label is not None and out.logprobs is not None:
            logprobs = _label_logprobs(at_label, stats)
            if self.problem.shard is not None:
                logprobs = self.problem.shard.of_owner(logprobs, self.labels(at))
            out.logprobs[at] = self.counted(logprobs, at)

    def gradient(self, S: Tensor) -> Tensor:
        """Return the gradient's buffer: S itself, or the front of each row for GEMMs in a narrower dtype."""
        narrow = self.problem.student.hidden.dtype
        return S if S.dtype == narrow else narrowed(S, narrow)


def choose(walk: Walk) -> Sweep:
    """Return the sweep that all chunks of a call use."""
    if walk.problem.support is not None:
        return top_k
    if walk.saved:
        return replay
    # Factors from statistics still allow one read of the logits if they scale the results of the GEMMs.
    weigher = walk.weigher
    if walk.wants_gradient and (
        weigher is None or (on_host(walk.out.loss.device) and not weigher.has_policy)
    ):
        return fused
    return two_pass


def fused(walk: Walk, chunk: Rows, at: Positions) -> Tensor | None:
    """Read the logits once. Factors w from statistics scale the products: G.T @ (w * h), w * (G @ W)."""
    at_label = walk.label_logits(chunk, at)
    deferred = walk.weigher is not None
    factor, slope = (torch.ones_like(walk.out.loss[at]), None) if deferred else walk.factors(at)
    G = walk.gradient(chunk.S)
    labels = None if slope is None else walk.labels(at)
    biases = chunk.bias_s, chunk.bias_t
    stats, loss, A = walk.backend.row_fused_(
        chunk.S, chunk.T, factor, walk.problem.spec, *biases, walk.metrics, G, slope, labels
    )
    walk.keep(at, stats, loss, A, at_label)
    if not deferred:
        return None
    scale, _ = walk.factors(at)
    G[scale == 0] = 0  # a row of factor zero may hold inf
    return scale


def two_pass(walk: Walk, chunk: Rows, at: Positions) -> None:
    """Sweep for the statistics, then for the value, then for the gradient."""
    spec, biases = walk.problem.spec, (chunk.bias_s, chunk.bias_t)
    stats = walk.backend.row_stats(chunk.S, chunk.T, spec, *biases, walk.metrics)
    loss, A = walk.backend.row_dot(chunk.S, chunk.T, stats, spec, *biases)
    walk.keep(at, stats, loss, A, walk.label_logits(chunk, at))
    if walk.wants_gradient:
        _write_gradient(walk, chunk, at, stats, A)


def replay(walk: Walk, chunk: Rows, at: Positions) -> None:
    """Compute the gradient from saved statistics."""
    _write_gradient(walk, chunk, at, walk.out.stats[at], walk.out.A[at])


def _write_gradient(walk: Walk, chunk: Rows, at: Positions, stats: Tensor, A: Tensor) -> None:
    factor, slope = walk.factors(at)
    G, biases = walk.gradient(chunk.S), (chunk.bias_s, chunk.bias_t)
    labels = None if slope is None else walk.labels(at)
    walk.backend.row_grad_(chunk.S, chunk.T, stats, A, factor, walk.problem.spec, *biases, G, slope, labels)


def top_k(walk: Walk, chunk: Rows, at: Positions) -> None:
    """Restrict the divergence to a support. With saved statistics, compute the gradient alone."""
    problem, spec, support = walk.problem, walk.problem.spec, walk.problem.support
    assert support is not None
    at_label = walk.label_logits(chunk, at)
    if walk.saved:
        stats = walk.out.stats[at]
    else:
        stats = walk.backend.row_stats(chunk.S, chunk.T, spec, chunk.bias_s, chunk.bias_t, walk.metrics)
    ids, logprobs = (
        None if x is None else x[at] for x in (problem.rows.topk_ids, problem.rows.topk_logprobs)
    )
    if problem.shard is None:
        every = own = topk_support.entries(chunk, stats, spec, support, ids, logprobs)
    else:
        every, own = problem.shard.entries(chunk, stats, spec, support, ids, logprobs)
    result = topk_support.restricted(every, stats, spec, support.tail)
    if not walk.saved:
        walk.keep(at, stats, result.loss, result.A, at_label)
    if walk.wants_gradient:
        factor, slope = walk.factors(at)
        labels = None if slope is None else walk.label_columns(at)
        G = walk.gradient(chunk.S)
        topk_support.write_gradient_(walk.backend, chunk, stats, spec, own, result, factor, slope, labels, G)


def _label_logprobs(at: torch_rows.Logits, stats: Tensor) -> Tensor:
    """Return (n, 2): log q and log p of the label, in nats."""
    column = stats[:, :, None]
    references = column[:, Column.STUDENT_MAX], column[:, Column.TEACHER_MAX]
    student = at.s - references[0] - column[:, Column.STUDENT_LOGSUM]
    return torch.cat([student, at.teacher_above(*references) - column[:, Column.TEACHER_LOGSUM]], dim=1)
