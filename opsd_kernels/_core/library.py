"""Register the op as one graph node: schemas, implementations, fakes, and the flat form of a Problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .._rows.contract import Column, stats_dtype
from ..spec import TAILS, RowSpec, Support
from . import execute
from .planner import held_dtype
from .problem import Problem, RowSelection, Side
from .shard import VocabShard

_PROBLEM = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? factor, Tensor? policy_slope, Tensor? valid, Tensor? labels, "
    "Tensor? topk_ids, Tensor? topk_logprobs, float[] spec, int[] support, "
    "bool shared_head, int vocab, ScalarType logits_dtype, int? workspace_bytes, str? backend, "
    "int[] shard, str? group, bool grad_hidden, bool grad_weight, bool grad_bias"
)
_FACTOR = 6  # position of the row factors in the flat form
_SCHEMAS = (
    f"linear_divergence({_PROBLEM}, bool metrics, bool recompute)"
    " -> (Tensor loss, Tensor A, Tensor stats, Tensor logprobs, Tensor dh, Tensor dW, Tensor dbias)",
    f"linear_divergence_backward({_PROBLEM}, Tensor stats, Tensor A) -> (Tensor dh, Tensor dW, Tensor dbias)",
)
_SIDES = ("student", "teacher", None)


def pack(problem: Problem) -> tuple[Any, ...]:
    """Flatten a problem into the leading arguments of both ops."""
    rows, support = problem.rows, problem.support
    teacher: tuple[Tensor | None, ...] = (None, None, None)
    if problem.teacher is not None:
        teacher = (problem.teacher.hidden, problem.teacher.weight, problem.teacher.bias)
    shard, group = ([], None) if problem.shard is None else problem.shard.pack()
    return (
        problem.student.hidden,
        problem.student.weight,
        problem.student.bias,
        *teacher,
        rows.factor,
        rows.policy_slope,
        rows.valid,
        rows.labels,
        rows.topk_ids,
        rows.topk_logprobs,
        [float(value) for value in problem.spec.scalars(linear=False)],
        [] if support is None else [support.k, _SIDES.index(support.side), TAILS.index(support.tail)],
        problem.shared_head,
        problem.vocab,
        problem.logits_dtype,
        problem.workspace_bytes,
        problem.backend,
        shard,
        group,
        *problem.wants,
    )


def unpack(flat: Sequence[Any]) -> Problem:
    """Rebuild a problem from the flat form of `pack`."""
    (h_s, W_s, b_s, h_t, W_t, b_t, factor, slope, valid, labels, ids, logprobs, *rest) = flat
    (spec, support, shared_head, vocab, logits_dtype, workspace_bytes, backend, shard, group, *wants) = rest
    return Problem(
        student=Side(h_s, W_s, b_s),
        teacher=None if h_t is None else Side(h_t, W_t, b_t),
        rows=RowSelection(valid, labels, ids, logprobs, factor, slope),
        spec=RowSpec.from_scalars(spec),
        support=Support(support[0], _SIDES[support[1]], TAILS[support[2]]) if support else None,
        shared_head=shared_head,
        vocab=vocab,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
        shard=VocabShard.unpack(shard, group),
        wants=(wants[0], wants[1], wants[2]),
    )


def with_factors(flat: Sequence[Any], factor: Tensor, policy_slope: Tensor | None) -> tuple[Any, ...]:
    """Replace the row factors of a packed problem."""
    return (*flat[:_FACTOR], factor, policy_slope, *flat[_FACTOR + 2 :])


# ---------------------------------------------------------------- implementations


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *flat, metrics, recompute = args
    problem = unpack(flat)
    out = execute.run(problem, gradients=not recompute, metrics=metrics)
    logprobs = out.stats.new_empty(0, 2) if out.logprobs is None else out.logprobs
    return out.loss, out.A, out.stats, logprobs, *_gradients(problem, out.dh, out.dW, out.dbias)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, stats, A = args
    problem = unpack(flat)
    out = execute.run(problem, gradients=True, saved=(stats, A))
    return _gradients(problem, out.dh, out.dW, out.dbias)


def _gradients(problem: Problem, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Return the gradients, with an empty tensor for each one that is None."""
    return tuple(problem.student.hidden.new_empty(0) if grad is None else grad for grad in gradients)


# ---------------------------------------------------------------- fakes


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *flat, _, recompute = args
    hidden, labels = flat[0], flat[9]
    N, wide = hidden.shape[0], stats_dtype(hidden.dtype)

    def vector(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=wide)

    wants = (False, False, False) if recompute else flat[-3:]
    rows = 0 if labels is None else N
    return vector(N), vector(N), vector(N, len(Column)), vector(rows, 2), *_fake_gradients(flat, wants)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    flat = args[:-2]
    return _fake_gradients(flat, flat[-3:])


def _fake_gradients(flat: Sequence[Any], wants: Sequence[bool]) -> tuple[Tensor, ...]:
    hidden, weight, bias = flat[:3]
    held = held_dtype(hidden.dtype, flat[16])
    return (
        hidden.new_empty(hidden.shape, dtype=held) if wants[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=held) if wants[1] else hidden.new_empty(0),
        hidden.new_empty(bias.shape, dtype=stats_dtype(hidden.dtype)) if wants[2] else hidden.new_empty(0),
    )


library = Library("opsd_kernels", "FRAGMENT")
for _schema, _impl, _fake in zip(
    _SCHEMAS, (_forward, _backward), (_forward_fake, _backward_fake), strict=True
):
    _name = library.define(_schema)
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    register_fake(f"opsd_kernels::{_name}", _fake, lib=library)

# (*pack(problem), metrics, recompute) -> loss, A, stats, logprobs, dh, dW, dbias; empty gradients with
# `recompute`.
op = torch.ops.opsd_kernels.linear_divergence
# (*pack(problem), stats, A) -> dh, dW, dbias.
op_backward = torch.ops.opsd_kernels.linear_divergence_backward
