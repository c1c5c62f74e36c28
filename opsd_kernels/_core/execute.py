"""Run a problem: choose the rows to compute, the plan and the backend, then call the loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import env
from .._rows import backends
from .._rows.contract import RowBackend
from ..spec import expect
from . import loop
from .memory import on_host
from .merged_rows import ShardedRows
from .planner import SM_COUNT, ChunkPlan, align, plan
from .problem import ComputedRows, Outputs, Problem
from .reductions import RowWeigher

NO_GRADIENTS = (False, False, False)


def run(
    problem: Problem, *, gradients: bool, metrics: bool = False, saved: tuple[Tensor, Tensor] | None = None
) -> Outputs:
    """Return losses and statistics and, with `gradients`, those that the problem wants.

    `saved` holds stats and A of an earlier run; then only the gradients are computed.
    """
    rows = _computed_rows(problem)
    chunks = make_plan(problem, rows.count)
    if not gradients:
        problem = replace(problem, wants=NO_GRADIENTS)
    with torch.autocast(problem.student.hidden.device.type, enabled=False):
        return loop.run(problem, chunks, _backend(problem, chunks), rows, metrics, saved=saved)


def run_weighted(problem: Problem, weigher: RowWeigher) -> Outputs:
    """Return losses, statistics and gradients where row factors depend on the statistics themselves.

    An operator's schema holds no weigher, so under torch.compile this function runs eagerly.
    """
    by_sequence = weigher.scope == "sequence"
    sequences = weigher.lengths(packs(problem)) if by_sequence else []
    rows = _computed_rows(problem, sum(sequences) if by_sequence else None)
    chunks = make_plan(problem, rows.count, weigher.scope, max(sequences, default=0), weigher.has_policy)
    backend = _backend(problem, chunks)
    bounds = align(sequences, chunks.rows) if chunks.weighting == "aligned" else None
    with torch.autocast(problem.student.hidden.device.type, enabled=False):
        if chunks.weighting == "own pass" or weigher.has_collectives:
            known = loop.run(replace(problem, wants=NO_GRADIENTS), chunks, backend, rows, metrics=True)
            problem = problem.with_factors(*weigher(known, slice(None)))
            return loop.run(problem, chunks, backend, rows, metrics=True)
        return loop.run(problem, chunks, backend, rows, metrics=True, weigher=weigher, bounds=bounds)


def make_plan(
    problem: Problem, tokens: int, scope: str = "index", longest: int | None = None, policy: bool = False
) -> ChunkPlan:
    """Plan a call. Forward and backward get the same plan: saved statistics need the same logits again."""
    hidden, teacher = problem.student.hidden, problem.teacher
    device = hidden.device
    return plan(
        tokens,
        # The widest shard on every rank: all ranks use the same chunk boundaries.
        problem.vocab if problem.shard is None else problem.shard.widest,
        hidden.shape[1],
        0 if teacher is None else teacher.hidden.shape[1],
        hidden.dtype,
        shared_head=problem.shared_head,
        trainable_head=problem.wants[1],
        grad=any(problem.wants),
        logits_dtype="input" if problem.logits_dtype == hidden.dtype else "float32",
        bias_grad=problem.wants[2],
        workspace_bytes=problem.workspace_bytes,
        device_type=device.type,
        weights_scope=scope,
        longest_sequence=longest,
        policy=policy,
        topk=0 if problem.support is None else problem.support.k,
        one_sweep=problem.spec.one_sweep,
        sm_count=torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else SM_COUNT,
    )


def packs(problem: Problem) -> bool:
    """Return True if invalid rows are left out of the GEMMs.

    Packing needs the number of valid rows on the host, which is not possible while a CUDA graph is captured.
    """
    valid = problem.rows.valid
    if valid is None or not env.pack():
        return False
    return valid.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _computed_rows(problem: Problem, count: int | None = None) -> ComputedRows:
    """Choose the rows to compute, and check labels and listed ids.

    Packing syncs with a GPU once, unless the `count` of valid rows is given.
    """
    rows, N = problem.rows, problem.tokens
    _check_entries("labels", "or ignore_index", rows.labels, rows.valid, problem.vocab)
    listed = "wherever teacher_topk_logprobs is above -inf"  # elsewhere ids are 0
    _check_entries("teacher_topk_ids", listed, rows.topk_ids, None, problem.vocab)
    if rows.valid is None or not packs(problem):
        return ComputedRows(N, valid=rows.valid)
    index = (rows.valid.nonzero() if count is None else rows.valid.nonzero_static(size=count)).squeeze(1)
    return ComputedRows(N) if index.shape[0] == N else ComputedRows(index.shape[0], index)


def _check_entries(
    name: str, otherwise: str, entries: Tensor | None, valid: Tensor | None, vocab: int
) -> None:
    """Raise ValueError if a valid entry lies outside the vocabulary.

    On CUDA this is an asynchronous device-side assert: no host sync.
    """
    if entries is None:
        return
    inside = (entries >= 0) & (entries < vocab)
    inside = inside if valid is None else inside | ~valid
    expected = f"entries in [0, {vocab}) {otherwise}"
    if on_host(entries.device):
        expect(bool(inside.all()), name, expected, entries[~inside][:1].tolist())
    else:
        torch._assert_async(inside.all(), f"{name}: expected {expected}")


def _backend(problem: Problem, chunks: ChunkPlan) -> RowBackend:
    """Select the row backend, wrapped to merge statistics across ranks for sharded heads."""
    backend = backends.select(problem.backend, problem.student.hidden.device, chunks.logits_dtype)
    return backend if problem.shard is None else ShardedRows(backend, problem.shard)
