"""List the largest log-probs of one head, and take log-probs at given ids: sweeps of the one loop.

Both are operators of their own, on the flat form of a problem (library.py) without a teacher. Ids and
log-probs of a list go straight into the outputs: small tensors made in each chunk would be left in the heap.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._rows import torch_math, torch_rows
from .._rows.contract import Column
from ..spec import LogitTransform
from . import library, loop
from .loop import Positions, Walk
from .problem import Problem
from .topk_support import Rows, write_entries_

SCHEMAS = (
    f"linear_topk({library.PROBLEM}, int k) -> (Tensor ids, Tensor logprobs, Tensor tail)",
    f"linear_logprobs_at({library.PROBLEM}, Tensor ids) -> (Tensor logprobs, Tensor stats)",
    f"linear_logprobs_at_backward({library.PROBLEM}, Tensor ids, Tensor upstream, Tensor stats)"
    " -> (Tensor dh, Tensor dW, Tensor dbias, Tensor dA, Tensor dB)",
)


# ---------------------------------------------------------------- the k largest


def _topk(*args: Any) -> tuple[Tensor, ...]:
    *flat, k = args
    problem = library.unpack(flat)
    chunks, backend, rows, _ = library.arrange(problem, listed=k)
    (N, _), wide = problem.student.hidden.shape, problem.stats_dtype
    new_ids = torch.full((N, k), -1, device=problem.student.hidden.device)
    new = problem.student.hidden.new_zeros
    lists = new_ids, new((N, k), dtype=wide), new(N, dtype=wide)
    # Rows that are packed or masked do not lie side by side in the outputs.
    aside = rows.index is not None or rows.valid is not None
    spare = [x.new_empty((chunks.rows, *x.shape[1:])) for x in lists] if aside else lists

    def sweep(walk: Walk, chunk: Rows, at: Positions) -> None:
        ids, logprobs, tail = (x[: chunk.S.shape[0]] if aside else x[at] for x in spare)
        walk.backend.row_topk_(chunk.S, walk.problem.spec.at(at).student, chunk.bias_s, ids, logprobs, tail)
        _normalise_(logprobs, tail)
        if aside:
            if walk.valid is not None:
                ids[~walk.valid[at]] = -1
                logprobs, tail = (walk.zero_invalid(x, at) for x in (logprobs, tail))
            for x, part in zip(lists, (ids, logprobs, tail), strict=True):
                x[at] = part

    loop.run(problem, chunks, backend, rows, metrics=False, sweep=sweep)
    return lists


def _normalise_(logits: Tensor, tail: Tensor) -> None:
    """Turn logits (n, k), in falling order, and the tail relative to the first of them into log-probs."""
    logits.sub_(logits[:, :1].clone())
    total = torch.logaddexp(logits.logsumexp(1), tail)
    logits.sub_(total[:, None])
    tail.sub_(total)


def topk(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids and log-probs, (N, k) each, and the log of the rest, (N,), without a gradient."""
    problem = replace(problem, student=problem.student.detach(), wants=library.NO_GRADIENTS)
    return op_topk(*library.pack(problem), k)


# ---------------------------------------------------------------- log-probs at ids


def _log_q(raw: Rows, stats: Tensor, transform: LogitTransform) -> Tensor:
    """Return log-probs of entries (n, K) from the statistics of their rows."""
    logits = torch_math.transform(raw.S.to(stats.dtype), transform, raw.bias_s)
    return torch_rows.student_logprobs(logits, stats)


def _at(*args: Any) -> tuple[Tensor, ...]:
    *flat, ids = args
    problem = library.unpack(flat)
    chunks, backend, rows, _ = library.arrange(problem, listed=ids.shape[1])
    valid = problem.rows.valid
    valid = None if valid is None else valid[:, None]
    library.check_entries("ids", ", or -1 for none", ids, valid, problem.vocab, least=-1)
    logprobs = problem.student.hidden.new_zeros(ids.shape, dtype=problem.stats_dtype)

    def sweep(walk: Walk, chunk: Rows, at: Positions) -> None:
        spec, columns = walk.problem.spec.at(at), walk.columns(ids[at])
        stats = walk.backend.row_stats(chunk.S, chunk.T, spec, chunk.bias_s, chunk.bias_t, False)
        log_q = _log_q(chunk.at(columns.clamp(min=0)), stats, spec.student)
        log_q = torch.where(columns < 0, 0.0, log_q)
        if walk.problem.shard is not None:
            dist.all_reduce(log_q, group=walk.problem.shard.group)
        walk.out.stats[at], logprobs[at] = (walk.zero_invalid(x, at) for x in (stats, log_q))

    out = loop.run(
        replace(problem, wants=library.NO_GRADIENTS), chunks, backend, rows, metrics=False, sweep=sweep
    )
    return logprobs, out.stats


def _at_backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, ids, upstream, stats = args
    problem = library.unpack(flat)
    chunks, backend, rows, _ = library.arrange(problem, listed=ids.shape[1])

    def sweep(walk: Walk, chunk: Rows, at: Positions) -> None:
        spec, of_rows, given = walk.problem.spec.at(at), walk.out.stats[at], ids[at]
        pull = walk.zero_invalid(torch.where(given < 0, 0.0, upstream[at]), at)
        total, columns = pull.sum(1), walk.columns(given)
        pull = torch.where(columns < 0, 0.0, pull)
        columns = columns.clamp(min=0)
        # A column that occurs twice gets the same value at both places.
        raw = chunk.at(columns)
        q = _log_q(raw, of_rows, spec.student).exp()
        values = sums_of_equal(columns, pull)
        values -= torch.where(total[:, None] == 0, 0.0, total[:, None] * q)
        slope = torch_math.transform_slope(raw.S.to(values.dtype), spec.student, raw.bias_s)
        values = torch.where(values == 0, 0.0, values * slope)
        G, nothing = walk.gradient(chunk.S), torch.zeros_like(total)
        nowhere = torch.full_like(columns[:, 0], -1)
        biases = chunk.bias_s, chunk.bias_t
        walk.backend.row_grad_(chunk.S, chunk.T, of_rows, nothing, nothing, spec, *biases, G, -total, nowhere)
        write_entries_(G, columns, values)

    saved = stats, stats[:, 0]
    out = loop.run(problem, chunks, backend, rows, metrics=False, saved=saved, sweep=sweep)
    new = problem.student.hidden.new_empty
    gradients = (out.dh, out.dW, out.dbias, out.dA, out.dB)
    return tuple(new(0) if grad is None else grad for grad in gradients)


def sums_of_equal(columns: Tensor, values: Tensor) -> Tensor:
    """Return for each entry of (n, K) the sum of the values of all entries of its row with its column."""
    in_order, order = columns.sort(dim=1)
    place = torch.zeros_like(columns)
    place[:, 1:] = (in_order[:, 1:] != in_order[:, :-1]).cumsum(1)
    # In float64 the order of the additions, which a GPU leaves open, does not reach the rounded sum.
    sums = torch.zeros_like(values, dtype=torch.float64)
    sums.scatter_add_(1, place, values.gather(1, order).double())
    return torch.empty_like(values).scatter_(1, order, sums.gather(1, place).to(values.dtype))


# ---------------------------------------------------------------- registration


def _topk_fake(*args: Any) -> tuple[Tensor, ...]:
    (hidden, *_, k) = args
    N, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    new = hidden.new_empty
    return new((N, k), dtype=torch.int64), new((N, k), dtype=wide), new(N, dtype=wide)


def _at_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, ids = args[0], args[-1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shapes = ids.shape, (hidden.shape[0], len(Column))
    logprobs, stats = (hidden.new_empty(shape, dtype=wide) for shape in shapes)
    return logprobs, stats


def _at_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    flat = args[:-3]
    return library.fake_gradients(flat, flat[library.WANTS])


library.register(SCHEMAS, (_topk, _at, _at_backward), (_topk_fake, _at_fake, _at_backward_fake))

op_topk = torch.ops.opsd_kernels.linear_topk
# (*pack(problem), ids) -> logprobs, stats.
op_at = torch.ops.opsd_kernels.linear_logprobs_at
# (*pack(problem), ids, upstream, stats) -> gradients.
op_at_backward = torch.ops.opsd_kernels.linear_logprobs_at_backward
