"""Sweeps of a loop.Walk that write the gradient once a row's statistics are known.

`walk` is the loop.Walk, `chunk` its topk_support.Rows. A z-loss takes this way too: its gradient needs the
row's log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._rows.contract import Column
from ..spec import RowSpec


def two_pass(walk: Any, chunk: Any, at: slice | Tensor) -> None:
    """Sweep for the statistics, then for the value, then for the gradient."""
    spec, biases = walk.problem.spec.at(at), (chunk.bias_s, chunk.bias_t)
    stats = walk.backend.row_stats(chunk.S, chunk.T, spec, *biases, walk.metrics)
    loss, A = walk.backend.row_dot(chunk.S, chunk.T, stats, spec, *biases)
    walk.keep(at, stats, loss, A, walk.exact(chunk, at))
    if walk.wants_gradient:
        _write_gradient(walk, chunk, at, stats, A)


def replay(walk: Any, chunk: Any, at: slice | Tensor) -> None:
    """Compute the gradient from saved statistics."""
    _write_gradient(walk, chunk, at, walk.out.stats[at], walk.out.A[at])


def _write_gradient(walk: Any, chunk: Any, at: slice | Tensor, stats: Tensor, A: Tensor) -> None:
    factor, slope, labels = pull(walk, chunk, at, stats)
    G, biases = walk.gradient(chunk.S), (chunk.bias_s, chunk.bias_t)
    spec = walk.problem.spec.at(at)
    walk.backend.row_grad_(chunk.S, chunk.T, stats, A, factor, spec, *biases, G, slope, labels)


def pull(
    walk: Any, chunk: Any, at: slice | Tensor, stats: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return row factors, slopes and labels of the gradient where a chunk's statistics are known.

    A z-loss c * L**2 of the log-sum-exp L has the gradient 2 * c * L * q, a slope without a label.
    """
    factor, slope = walk.factors(at)
    spec = walk.problem.spec
    if slope is not None:
        return factor, slope, walk.labels(at)
    if not spec.z_loss:
        return factor, None, None
    L = logsumexps(stats, spec.at(at), chunk.constants)[:, 0]
    slope = torch.where(factor == 0, 0.0, 2 * spec.z_loss * L * factor)
    return factor, slope, torch.full_like(slope, -1, dtype=torch.int64)


def logsumexps(stats: Tensor, spec: RowSpec, constants: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Return log sum exp of the transformed logits of student and teacher, (n, 2) in nats.

    `stats` (n, len(Column)) and `spec` are those of rows that are held relative to `constants`
    (s and t of centre.Centre).
    """
    of_rows = stats[:, : Column.GAP].unflatten(1, (2, 2)).sum(2)
    c, d = constants
    if c is None:
        return of_rows
    raw_t = c if d is None else c + d if spec.difference else d
    shifts = [
        raw * (side.scale / (side.temperature if side.of_rows is None else side.of_rows))
        for raw, side in ((c, spec.student), (raw_t, spec.teacher))
    ]
    shifts[1] = torch.lerp(shifts[1], shifts[0], spec.teacher_mix)
    return of_rows + torch.stack(shifts, 1)
