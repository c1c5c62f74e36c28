"""The op as one graph node: schemas, implementations, fakes. The autograd Function stands outside (autograd.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

from . import backends, chunked
from .chunked import Heads, Tokens, Wanted
from .kernels.contract import Column, stats_dtype
from .planner import ChunkPlan, align, held_dtype, plan, resolve_logits
from .projection import same_storage
from .spec import TAILS, Divergence, Kind, LogitTransform, RowSpec, Support, expect


class Call(NamedTuple):
    """The arguments that both ops begin with, in the order of their schema."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V_s, H_s)
    student_bias: Tensor | None  # (V_s,)
    teacher_hidden: Tensor | None  # (N, H_t); None: all teacher logits are 0
    teacher_weight: Tensor | None  # (V_t, H_t)
    teacher_bias: Tensor | None  # (V_t,)
    factor: Tensor | None  # (N,) row factors of the gradient
    policy: Tensor | None  # (N,) row factors of the gradient of -log q(label)
    valid: Tensor | None  # (N,) bool
    labels: Tensor | None  # (N,) int64
    topk_ids: Tensor | None  # (N, K) a listed support, with its log-probs
    topk_logprobs: Tensor | None  # (N, K)
    kind: int
    beta: float
    dialect: list[float]  # teacher_mix, entry_clip, token_clip
    support: list[int]  # see pack_support; empty: the whole vocabulary
    student_transform: list[float]  # see pack_transform
    teacher_transform: list[float]
    shared_head: bool  # teacher_weight is student_weight
    vocab: int  # columns from here on have probability zero
    logits_dtype: str
    workspace_bytes: int | None
    backend: str | None
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool

    @property
    def gradient(self) -> bool:
        return self.grad_hidden or self.grad_weight or self.grad_bias


_CALL_SCHEMA = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? factor, Tensor? policy, Tensor? valid, Tensor? labels, Tensor? topk_ids, Tensor? topk_logprobs, int kind, float beta, float[] dialect, "
    "int[] support, float[] student_transform, float[] teacher_transform, bool shared_head, int vocab, "
    "str logits_dtype, int? workspace_bytes, str? backend, bool grad_hidden, bool grad_weight, bool grad_bias"
)
_SCHEMAS = (
    f"linear_divergence({_CALL_SCHEMA}, bool metrics, bool recompute)"
    " -> (Tensor loss, Tensor A, Tensor stats, Tensor logprobs, Tensor dh, Tensor dW, Tensor dbias)",
    f"linear_divergence_backward({_CALL_SCHEMA}, Tensor stats, Tensor A) -> (Tensor dh, Tensor dW, Tensor dbias)",
)


def pack_transform(transform: LogitTransform) -> list[float]:
    return [transform.scale, transform.softcap or 0.0, transform.temperature]


def _unpack_transform(packed: list[float]) -> LogitTransform:
    scale, softcap, temperature = packed
    return LogitTransform(scale, softcap or None, temperature)


_SIDES = ("student", "teacher", None)


def pack_support(support: Support | None) -> list[int]:
    return [] if support is None else [support.k, _SIDES.index(support.side), TAILS.index(support.tail)]


def _unpack_support(packed: list[int]) -> Support | None:
    return Support(packed[0], _SIDES[packed[1]], TAILS[packed[2]]) if packed else None


def _heads(call: Call) -> Heads:
    """Weights cut to the vocabulary in use; biases in the dtype of the statistics, and one object where they are one tensor."""
    wide = stats_dtype(call.student_hidden.dtype)

    def rows(x: Tensor | None) -> Tensor | None:  # the GEMMs want contiguous rows
        return x if x is None or (x.stride(1) == 1 and x.stride(0) >= x.shape[1]) else x.contiguous()

    def cut(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[: call.vocab].to(wide).contiguous()

    weight_s = rows(call.student_weight)
    weight_t = weight_s if call.shared_head else rows(call.teacher_weight)
    bias_s = cut(call.student_bias)
    bias_t = bias_s if same_storage(call.student_bias, call.teacher_bias) else cut(call.teacher_bias)
    hidden_s, hidden_t = rows(call.student_hidden), rows(call.teacher_hidden)
    weight_t = None if weight_t is None else weight_t[: call.vocab]
    return Heads(hidden_s, weight_s[: call.vocab], bias_s, hidden_t, weight_t, bias_t, padded_vocab=weight_s.shape[0])


def _valid_rows(call: Call) -> Tensor | None:
    """int64 positions of the rows that count, or None if all do; checks labels and listed entries among them."""
    index = None if call.valid is None or bool(call.valid.all()) else call.valid.nonzero().squeeze(1)
    if call.labels is not None:
        counted = call.labels if index is None else call.labels[index]
        wrong = counted[(counted < 0) | (counted >= call.vocab)]
        expect(wrong.numel() == 0, "labels", f"entries in [0, {call.vocab}) or ignore_index", wrong[:1].tolist())
    if call.topk_ids is not None:  # what is not listed or not valid is 0
        wrong = call.topk_ids[(call.topk_ids < 0) | (call.topk_ids >= call.vocab)]
        expect(wrong.numel() == 0, "teacher_topk_ids", f"entries in [0, {call.vocab}) wherever teacher_topk_logprobs is above -inf", wrong[:1].tolist())
    return index


def _plan(call: Call, heads: Heads, tokens: int, scope: str = "index", longest: int | None = None, policy: bool = False) -> tuple[RowSpec, ChunkPlan]:
    """The plan of forward and backward alike: in recompute mode saved statistics must meet the same logits again."""
    chunks = plan(
        tokens,
        call.vocab,
        heads.student_hidden.shape[1],
        0 if heads.teacher_hidden is None else heads.teacher_hidden.shape[1],
        heads.student_hidden.dtype,
        shared_head=call.shared_head,
        trainable_head=call.grad_weight,
        grad=call.gradient,
        logits_dtype=call.logits_dtype,
        bias_grad=call.grad_bias,
        workspace_bytes=call.workspace_bytes,
        device_type=heads.student_hidden.device.type,
        weights_scope=scope,
        longest_sequence=longest,
        policy=policy,
        topk=call.support[0] if call.support else 0,
    )
    transforms = _unpack_transform(call.student_transform), _unpack_transform(call.teacher_transform)
    return RowSpec(Divergence(Kind(call.kind), call.beta), *transforms, chunks.difference, *call.dialect), chunks


def _run(call: Call, *, gradients: bool, metrics: bool = False, saved: tuple[Tensor, Tensor] | None = None) -> chunked.Outputs:
    heads, index = _heads(call), _valid_rows(call)
    spec, chunks = _plan(call, heads, _valid_count(heads, index))
    return _walk(call, heads, spec, chunks, index, gradients=gradients, metrics=metrics, saved=saved)


def _valid_count(heads: Heads, index: Tensor | None) -> int:
    return heads.student_hidden.shape[0] if index is None else index.shape[0]


def _walk(
    call: Call, heads: Heads, spec: RowSpec, chunks: ChunkPlan, index: Tensor | None, *, gradients: bool, metrics: bool, **how: object
) -> chunked.Outputs:
    wanted = Wanted(call.grad_hidden, call.grad_weight, call.grad_bias, metrics) if gradients else Wanted(metrics=metrics)
    tokens = Tokens(index, call.factor, call.policy, call.labels, call.topk_ids, call.topk_logprobs)
    with torch.autocast(call.student_hidden.device.type, enabled=False):
        rows = backends.select(call.backend, call.student_hidden.device)
        return chunked.run(heads, spec, chunks, rows, wanted, tokens, restriction=_unpack_support(call.support), **how)


def weighted_forward(call: Call, weigh: chunked.Weigh, scope: str, lengths: Callable[[], list[int]]) -> chunked.Outputs:
    """Losses, statistics and gradients where row factors depend on the statistics themselves. `lengths`: valid rows of each sequence, for that scope.

    Outside the operator's schema, which holds no callables: under torch.compile this part runs eagerly.
    """
    heads, index = _heads(call), _valid_rows(call)
    sequences = lengths() if scope == "sequence" else []
    spec, chunks = _plan(call, heads, _valid_count(heads, index), scope, max(sequences, default=0), weigh.has_policy)
    if chunks.weighting == "own pass":
        known = _walk(call, heads, spec, chunks, index, gradients=False, metrics=True)
        factor, policy = weigh(known, slice(None))
        return _walk(call._replace(factor=factor, policy=policy), heads, spec, chunks, index, gradients=True, metrics=True)
    bounds = align(sequences, chunks.rows) if chunks.weighting == "aligned" else None
    return _walk(call, heads, spec, chunks, index, gradients=True, metrics=True, weigh=weigh, bounds=bounds)


def _gradients(call: Call, out: chunked.Outputs) -> tuple[Tensor, ...]:
    """dh, dW, dbias; an empty tensor where a gradient was not asked for."""
    return tuple(call.student_hidden.new_empty(0) if grad is None else grad for grad in (out.dh, out.dW, out.dbias))


def _forward(*args) -> tuple[Tensor, ...]:
    *call, metrics, recompute = args
    call = Call(*call)
    out = _run(call, gradients=not recompute, metrics=metrics)
    logprobs = out.stats.new_empty(0, 2) if out.logprobs is None else out.logprobs
    return out.loss, out.A, out.stats, logprobs, *_gradients(call, out)


def _backward(*args) -> tuple[Tensor, ...]:
    *call, stats, A = args
    call = Call(*call)
    return _gradients(call, _run(call, gradients=True, saved=(stats, A)))


def _fake_gradients(call: Call) -> tuple[Tensor, ...]:
    hidden, weight, bias = call.student_hidden, call.student_weight, call.student_bias
    held = held_dtype(hidden.dtype, resolve_logits(hidden.dtype, call.logits_dtype, call.shared_head)[0])
    return (
        hidden.new_empty(hidden.shape, dtype=held) if call.grad_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=held) if call.grad_weight else hidden.new_empty(0),
        hidden.new_empty(bias.shape, dtype=stats_dtype(hidden.dtype)) if call.grad_bias else hidden.new_empty(0),
    )


def _forward_fake(*args) -> tuple[Tensor, ...]:
    *call, metrics, recompute = args
    call = Call(*call)
    N, wide = call.student_hidden.shape[0], stats_dtype(call.student_hidden.dtype)
    if recompute:
        call = call._replace(grad_hidden=False, grad_weight=False, grad_bias=False)

    def vector(*shape: int) -> Tensor:
        return call.student_hidden.new_empty(shape, dtype=wide)

    labelled = call.labels is not None
    return vector(N), vector(N), vector(N, len(Column)), vector(N if labelled else 0, 2), *_fake_gradients(call)


def _backward_fake(*args) -> tuple[Tensor, ...]:
    return _fake_gradients(Call(*args[:-2]))


library = Library("opsd_kernels", "FRAGMENT")
for _schema, _impl, _fake in zip(_SCHEMAS, (_forward, _backward), (_forward_fake, _backward_fake), strict=True):
    _name = library.define(_schema)
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    register_fake(f"opsd_kernels::{_name}", _fake, lib=library)
