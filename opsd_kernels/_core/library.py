"""The op as one graph node: schemas, implementations, fakes. The autograd Function stands outside (autograd.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .. import env
from .._rows import backends
from .._rows.contract import Column, stats_dtype
from ..spec import TAILS, Divergence, Kind, LogitTransform, RowSpec, Support, expect
from . import loop
from .loop import Heads, Tokens, Wanted
from .memory import same_storage
from .planner import SM_COUNT, ChunkPlan, align, held_dtype, plan, resolve_logits
from .shard import ShardedRows, VocabShard


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
    shard: list[int]  # of heads spread over ranks, and their group: see VocabShard.pack; empty: whole heads
    group: str | None
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool

    def gradient(self) -> bool:  # no property: torch.compile of 2.10 cannot trace one of a named tuple
        return self.grad_hidden or self.grad_weight or self.grad_bias

    @property
    def slice(self) -> VocabShard | None:
        return VocabShard.unpack(self.shard, self.group)

    @property
    def columns(self) -> int:
        """Of the vocabulary in use, those that this rank's heads have."""
        return self.vocab if not self.shard else self.slice.stop - self.slice.start


_CALL_SCHEMA = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? factor, Tensor? policy, Tensor? valid, Tensor? labels, Tensor? topk_ids, Tensor? topk_logprobs, int kind, float beta, float[] dialect, "
    "int[] support, float[] student_transform, float[] teacher_transform, bool shared_head, int vocab, "
    "str logits_dtype, int? workspace_bytes, str? backend, int[] shard, str? group, bool grad_hidden, bool grad_weight, bool grad_bias"
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
        return None if bias is None else bias[: call.columns].to(wide).contiguous()

    weight_s = rows(call.student_weight)
    weight_t = weight_s if call.shared_head else rows(call.teacher_weight)
    bias_s = cut(call.student_bias)
    bias_t = bias_s if same_storage(call.student_bias, call.teacher_bias) else cut(call.teacher_bias)
    hidden_s, hidden_t = rows(call.student_hidden), rows(call.teacher_hidden)
    weight_t = None if weight_t is None else weight_t[: call.columns]
    return Heads(
        hidden_s, weight_s[: call.columns], bias_s, hidden_t, weight_t, bias_t, padded_vocab=weight_s.shape[0]
    )


class Computed(NamedTuple):
    """The rows that the GEMMs see."""

    count: int
    index: Tensor | None = None  # (count,) int64 their positions; None: all rows
    valid: Tensor | None = None  # (N,) bool where rows are computed that do not count


def packs(call: Call) -> bool:
    """Whether rows that do not count are left out of the GEMMs. Their number must then reach the host, which a CUDA graph under capture does not allow."""
    if call.valid is None or not env.pack():
        return False
    return call.valid.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _computed(call: Call, count: int | None = None) -> Computed:
    """The rows to compute, labels and listed entries checked. Where rows are packed this waits for a GPU, once; not if it is told how many `count`."""
    N = call.student_hidden.shape[0]
    _check_entries("labels", "or ignore_index", call.labels, call.valid, call.vocab)
    _check_entries(
        "teacher_topk_ids", "wherever teacher_topk_logprobs is above -inf", call.topk_ids, None, call.vocab
    )  # the others are 0
    if not packs(call):
        return Computed(N, valid=call.valid)
    index = (call.valid.nonzero() if count is None else call.valid.nonzero_static(size=count)).squeeze(1)
    return Computed(N) if index.shape[0] == N else Computed(index.shape[0], index)


def _check_entries(
    name: str, otherwise: str, entries: Tensor | None, valid: Tensor | None, vocab: int
) -> None:
    """ValueError where an entry that counts lies outside the vocabulary. On a GPU a device-side assertion, which nobody waits for."""
    if entries is None:
        return
    inside = (entries >= 0) & (entries < vocab)
    inside = inside if valid is None else inside | ~valid
    expected = f"entries in [0, {vocab}) {otherwise}"
    if loop.on_host(entries.device):
        expect(bool(inside.all()), name, expected, entries[~inside][:1].tolist())
    else:
        torch._assert_async(inside.all(), f"{name}: expected {expected}")


def _plan(
    call: Call,
    heads: Heads,
    tokens: int,
    scope: str = "index",
    longest: int | None = None,
    policy: bool = False,
) -> tuple[RowSpec, ChunkPlan]:
    """The plan of forward and backward alike: in recompute mode saved statistics must meet the same logits again."""
    divergence, device = Divergence(Kind(call.kind), call.beta), heads.student_hidden.device
    chunks = plan(
        tokens,
        call.slice.widest if call.shard else call.vocab,  # ranks walk the same chunks
        heads.student_hidden.shape[1],
        0 if heads.teacher_hidden is None else heads.teacher_hidden.shape[1],
        heads.student_hidden.dtype,
        shared_head=call.shared_head,
        trainable_head=call.grad_weight,
        grad=call.gradient(),
        logits_dtype=call.logits_dtype,
        bias_grad=call.grad_bias,
        workspace_bytes=call.workspace_bytes,
        device_type=device.type,
        weights_scope=scope,
        longest_sequence=longest,
        policy=policy,
        topk=call.support[0] if call.support else 0,
        one_sweep=RowSpec(divergence, entry_clip=call.dialect[1]).one_sweep,
        sm_count=torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else SM_COUNT,
    )
    transforms = _unpack_transform(call.student_transform), _unpack_transform(call.teacher_transform)
    return RowSpec(divergence, *transforms, chunks.difference, *call.dialect), chunks


def _run(
    call: Call, *, gradients: bool, metrics: bool = False, saved: tuple[Tensor, Tensor] | None = None
) -> loop.Outputs:
    heads, rows = _heads(call), _computed(call)
    spec, chunks = _plan(call, heads, rows.count)
    return _walk(call, heads, spec, chunks, rows, gradients=gradients, metrics=metrics, saved=saved)


def _walk(
    call: Call,
    heads: Heads,
    spec: RowSpec,
    chunks: ChunkPlan,
    computed: Computed,
    *,
    gradients: bool,
    metrics: bool,
    **how: object,
) -> loop.Outputs:
    wanted = (
        Wanted(call.grad_hidden, call.grad_weight, call.grad_bias, metrics)
        if gradients
        else Wanted(metrics=metrics)
    )
    tokens = Tokens(
        computed.index,
        computed.valid,
        call.factor,
        call.policy,
        call.labels,
        call.topk_ids,
        call.topk_logprobs,
    )
    with torch.autocast(call.student_hidden.device.type, enabled=False):
        backend, shard = (
            backends.select(call.backend, call.student_hidden.device, chunks.logits_dtype),
            call.slice,
        )
        backend = backend if shard is None else ShardedRows(backend, shard)
        return loop.run(
            heads,
            spec,
            chunks,
            backend,
            wanted,
            tokens,
            restriction=_unpack_support(call.support),
            shard=shard,
            **how,
        )


def weighted_forward(
    call: Call, weigh: loop.Weigh, scope: str, lengths: Callable[[bool], list[int]]
) -> loop.Outputs:
    """Losses, statistics and gradients where row factors depend on the statistics themselves. `lengths`: rows of each sequence, for that scope; the valid
    ones if told so, which waits for a GPU.

    Outside the operator's schema, which holds no callables: under torch.compile this part runs eagerly.
    """
    sequences = lengths(packs(call)) if scope == "sequence" else []
    heads, rows = _heads(call), _computed(call, sum(sequences) if scope == "sequence" else None)
    spec, chunks = _plan(call, heads, rows.count, scope, max(sequences, default=0), weigh.has_policy)
    if chunks.weighting == "own pass" or weigh.exchanges:
        known = _walk(call, heads, spec, chunks, rows, gradients=False, metrics=True)
        factor, policy = weigh(known, slice(None))
        return _walk(
            call._replace(factor=factor, policy=policy),
            heads,
            spec,
            chunks,
            rows,
            gradients=True,
            metrics=True,
        )
    bounds = align(sequences, chunks.rows) if chunks.weighting == "aligned" else None
    return _walk(call, heads, spec, chunks, rows, gradients=True, metrics=True, weigh=weigh, bounds=bounds)


def _gradients(call: Call, out: loop.Outputs) -> tuple[Tensor, ...]:
    """dh, dW, dbias; an empty tensor where a gradient was not asked for."""
    return tuple(
        call.student_hidden.new_empty(0) if grad is None else grad for grad in (out.dh, out.dW, out.dbias)
    )


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
        hidden.new_empty(bias.shape, dtype=stats_dtype(hidden.dtype))
        if call.grad_bias
        else hidden.new_empty(0),
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
    return (
        vector(N),
        vector(N),
        vector(N, len(Column)),
        vector(N if labelled else 0, 2),
        *_fake_gradients(call),
    )


def _backward_fake(*args) -> tuple[Tensor, ...]:
    return _fake_gradients(Call(*args[:-2]))


library = Library("opsd_kernels", "FRAGMENT")
for _schema, _impl, _fake in zip(
    _SCHEMAS, (_forward, _backward), (_forward_fake, _backward_fake), strict=True
):
    _name = library.define(_schema)
    library.impl(_name, _impl, "CompositeExplicitAutograd")
    register_fake(f"opsd_kernels::{_name}", _fake, lib=library)
