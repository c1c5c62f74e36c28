"""`linear_divergence`: shapes, autocast, masks and reductions around the op. Below this file nobody knows what a reduction is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .autograd import PerRow, WeightedSum, weighted
from .kernels.contract import Column, stats_dtype
from .ops import Call, pack_transform
from .planner import DTYPES, parse_logits_dtype, workspace_budget
from .projection import same_storage
from .spec import BACKWARDS, REDUCTIONS, Divergence, LogitTransform, RowSpec, check_choice, check_number, expect


@dataclass(frozen=True)
class TokenStats:
    """Detached fp32 statistics of each token, of the leading shape of the hidden states; 0 where a token is not valid. In nats."""

    divergence: Tensor  # unweighted
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_max_prob: Tensor
    teacher_max_prob: Tensor
    top1_agreement: Tensor  # 1 where student and teacher have the same most likely token
    student_logprob: Tensor | None = None  # of the label, with labels
    teacher_logprob: Tensor | None = None


class _Head(NamedTuple):
    """One side of the call, flat: hidden (N, H), weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def linear_divergence(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor,  # (V_s, H_s)
    teacher_hidden: Tensor,  # (..., H_t)
    teacher_weight: Tensor,  # (V_t, H_t)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    teacher_mix: float = 0.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    topk: int | None = None,
    topk_support: str = "student",
    topk_tail: str = "bucket",
    backward: str = "auto",
    logits_dtype: str | torch.dtype = "auto",
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Divergence in nats between a teacher's and a student's next-token distributions, straight from hidden states and LM heads.

    Equals projecting both sides (`hidden @ weight.T`, `+ bias`, `* logit_scale`, softcap `c * tanh(z / c)`, `/ temperature`), two softmaxes and a comparison
    token by token, but never holds more than `workspace_bytes` of logits. Gradients flow to `student_hidden`, `student_weight` and `student_bias`, never to the
    teacher. No temperature**2 factor. Every option in full: docs/api.md. With teacher p, student q, m = beta * p + (1 - beta) * q:

    divergence: `forward_kl` KL(p || q), `reverse_kl` KL(q || p), `jsd` beta * KL(p || m) + (1 - beta) * KL(q || m) (arXiv:2306.13649, eq. 1),
        `skew_forward_kl` KL(p || m), `skew_reverse_kl` KL(q || m) (arXiv:2402.03898, eq. 2-3), `tvd` sum |p - q| / 2. SDPO is arXiv:2601.20802, eq. 1.
    vocab_size: columns from here on have probability zero on both sides; required where the heads differ in rows.
    labels, mask: a token with `labels == ignore_index` or `mask == 0` is not valid: it costs nothing, influences nothing, may hold inf or NaN.
    reduction: `none` weighted divergence per token; `sum`; `mean` = sum / `normalizer` (default: number of valid tokens); `sequence_mean` for (B, T, H).
    backward: `in_forward` (four GEMM passes, three with a frozen head), `recompute` (six; any upstream gradient per token), `auto`.
    logits_dtype: `auto` (the inputs' for a shared head, by the difference GEMM; else, and for tvd, fp32), `torch.float32`, `"input"`.

    Returns the loss, 0-dim or (...) for `none`, in fp32 (fp64 for fp64 inputs); with `return_stats` also TokenStats. Raises ValueError or TypeError naming
    argument, expected and got; NotImplementedError for entry_clip, token_clip, teacher_mix, topk*, group and callable token_weights: not in this version.
    """
    _refuse_absent(token_weights, teacher_mix, entry_clip, token_clip, topk, topk_support, topk_tail, group)
    t_temperature = ("temperature", temperature) if teacher_temperature is None else ("teacher_temperature", teacher_temperature)
    spec = RowSpec(
        Divergence.parse(divergence, beta),
        LogitTransform.parse("student", student_logit_scale, student_softcap, "temperature", temperature),
        LogitTransform.parse("teacher", teacher_logit_scale, teacher_softcap, *t_temperature),
    )
    sides = _sides(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    valid, flat_labels = _valid_tokens(student_hidden, labels, ignore_index, mask)
    call = _call(spec, *sides, valid, flat_labels, vocab_size, parse_logits_dtype(logits_dtype), workspace_bytes, backend)
    weights = _weights(token_weights, student_hidden, valid)
    scale = _row_scale(reduction, normalizer, student_hidden, valid)
    loss, rows, stats, logprobs = _evaluate(call, weights, scale, backward, return_stats)
    loss = loss.reshape(student_hidden.shape[:-1]) if reduction == "none" else loss
    return (loss, _token_stats(rows, stats, logprobs, call, student_hidden.shape[:-1])) if return_stats else loss


def _refuse_absent(token_weights, teacher_mix, entry_clip, token_clip, topk, topk_support, topk_tail, group) -> None:
    absent = {
        "token_weights": callable(token_weights),
        "teacher_mix": teacher_mix != 0.0,
        "entry_clip": entry_clip is not None,
        "token_clip": token_clip is not None,
        "topk": topk is not None,
        "topk_support": topk_support != "student",
        "topk_tail": topk_tail != "bucket",
        "group": group is not None,
    }
    for name, asked in absent.items():
        if asked:
            got = "a callable" if name == "token_weights" else "another value"
            raise NotImplementedError(f"{name}: expected its default{' or a tensor' * callable(token_weights)}, got {got}, which this version does not have")


def _sides(*tensors: Tensor | None) -> tuple[_Head, _Head, bool]:
    """(student, teacher, whether they share a head): checked, cast for autocast and flattened; the teacher detached."""
    names = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")
    named = dict(zip(names, tensors, strict=True))
    for name, tensor in named.items():
        optional = name.endswith("bias")
        expect(isinstance(tensor, Tensor) or (optional and tensor is None), name, "a tensor" + " or None" * optional, type(tensor).__name__, TypeError)
    named = _autocast(named)
    _check_shapes(named)
    _check_types(named)

    def head(side: str) -> _Head:
        hidden = named[f"{side}_hidden"]
        return _Head(hidden.reshape(-1, hidden.shape[-1]), named[f"{side}_weight"], named[f"{side}_bias"])

    shared = _shared(named["student_weight"], named["teacher_weight"])
    return head("student"), _Head(*(None if x is None else x.detach() for x in head("teacher"))), shared


def _autocast(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Hidden states and weights in the autocast dtype; one cast for a head that both sides share, so that it stays shared."""
    device = named["student_hidden"].device.type
    if not torch.is_autocast_enabled(device):
        return named
    dtype = torch.get_autocast_dtype(device)
    cast = {name: x if x is None or name.endswith("bias") or x.dtype == torch.float64 else x.to(dtype) for name, x in named.items()}
    return {**cast, "teacher_weight": cast["student_weight"]} if _shared(named["student_weight"], named["teacher_weight"]) else cast


def _shared(student: Tensor, teacher: Tensor) -> bool:
    """Whether both sides project with one head: the same storage, shape and strides. A traced graph sees no storage, only tensors."""
    return teacher is student or (not torch.compiler.is_compiling() and same_storage(student, teacher))


def _check_shapes(named: dict[str, Tensor | None]) -> None:
    hidden = named["student_hidden"]
    for side in ("student", "teacher"):
        states, weight, bias = (named[f"{side}_{part}"] for part in ("hidden", "weight", "bias"))
        expect(states.dim() >= 1, f"{side}_hidden", "shape (..., H)", tuple(states.shape))
        expect(weight.dim() == 2 and min(weight.shape) >= 1, f"{side}_weight", "shape (V, H) with V, H >= 1", tuple(weight.shape))
        expect(states.shape[-1] == weight.shape[1], f"{side}_hidden", f"(..., {weight.shape[1]}), the hidden size of {side}_weight", tuple(states.shape))
        if bias is not None:
            expect(bias.shape == weight.shape[:1], f"{side}_bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))
    leading, other = hidden.shape[:-1], named["teacher_hidden"].shape[:-1]
    expect(leading == other, "teacher_hidden", f"leading shape {tuple(leading)}, as student_hidden", tuple(other))


def _check_types(named: dict[str, Tensor | None]) -> None:
    hidden = named["student_hidden"]
    expect(hidden.dtype in DTYPES, "student_hidden", "float64, float32, bfloat16 or float16", hidden.dtype, TypeError)
    for name, tensor in named.items():
        if tensor is not None:
            expect(tensor.device == hidden.device, name, f"a tensor on {hidden.device}, as student_hidden", tensor.device)
            same = tensor.dtype == hidden.dtype or (name.endswith("bias") and tensor.is_floating_point())
            expect(same, name, f"dtype {hidden.dtype}, as student_hidden", tensor.dtype, TypeError)


def _check_tokens(name: str, value: object, hidden: Tensor) -> Tensor:
    """A tensor of one entry per token, flat."""
    expect(isinstance(value, Tensor), name, "a tensor or None", type(value).__name__, TypeError)
    expect(value.shape == hidden.shape[:-1], name, f"shape {tuple(hidden.shape[:-1])}, one entry per token", tuple(value.shape))
    expect(value.device == hidden.device, name, f"a tensor on {hidden.device}, as student_hidden", value.device)
    return value.detach().reshape(-1)


def _valid_tokens(hidden: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(valid (N,) bool or None for all, labels (N,) or None)."""
    expect(isinstance(ignore_index, int), "ignore_index", "an int", type(ignore_index).__name__, TypeError)
    valid = None
    if labels is not None:
        labels = _check_tokens("labels", labels, hidden)
        expect(labels.dtype == torch.int64, "labels", "dtype int64", labels.dtype, TypeError)
        valid = labels != ignore_index
    if mask is not None:
        mask = _check_tokens("mask", mask, hidden).bool()
        valid = mask if valid is None else valid & mask
    return valid, labels


def _call(spec, student, teacher, shared_head, valid, labels, vocab_size, logits_dtype, workspace_bytes, backend) -> Call:
    backends.check_name(backend)
    workspace_budget(workspace_bytes)
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in student]
    return Call(
        *student,
        *teacher,
        factor=None,
        valid=valid,
        labels=labels,
        kind=int(spec.divergence.kind),
        beta=spec.divergence.beta,
        student_transform=pack_transform(spec.student),
        teacher_transform=pack_transform(spec.teacher),
        shared_head=shared_head,
        vocab=_vocabulary(student.weight.shape[0], teacher.weight.shape[0], vocab_size),
        logits_dtype="float32" if logits_dtype == "auto" and spec.divergence.kinked else logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
        grad_hidden=wants[0],
        grad_weight=wants[1],
        grad_bias=wants[2],
    )


def _vocabulary(V_s: int, V_t: int, vocab_size: int | None) -> int:
    if vocab_size is None:
        expect(V_s == V_t, "vocab_size", f"a size <= {min(V_s, V_t)}, since student_weight has {V_s} rows and teacher_weight {V_t}", None)
        return V_s
    expect(isinstance(vocab_size, int) and not isinstance(vocab_size, bool), "vocab_size", "an int or None", type(vocab_size).__name__, TypeError)
    expect(1 <= vocab_size <= min(V_s, V_t), "vocab_size", f"a size in [1, {min(V_s, V_t)}], the rows of the smaller head", vocab_size)
    return vocab_size


def _weights(token_weights: Tensor | None, hidden: Tensor, valid: Tensor | None) -> Tensor:
    """(N,) weights in the dtype of the statistics, 0 where a token is not valid."""
    wide = stats_dtype(hidden.dtype)
    if token_weights is None:
        ones = torch.ones(hidden.shape[:-1].numel(), dtype=wide, device=hidden.device)
        return ones if valid is None else valid.to(wide)
    weights = _check_tokens("token_weights", token_weights, hidden)
    expect(weights.is_floating_point(), "token_weights", "a floating-point tensor", weights.dtype, TypeError)
    weights = weights.to(wide)
    return weights if valid is None else torch.where(valid, weights, 0.0)


def _row_scale(reduction: str, normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None) -> Tensor | float | None:
    """What a weighted row is multiplied by before the sum: a number, or (N,); None for `none`."""
    check_choice("reduction", reduction, REDUCTIONS)
    expect(normalizer is None or reduction == "mean", "normalizer", "None, unless reduction='mean'", f"{normalizer!r} with reduction={reduction!r}")
    if reduction == "mean":
        return 1.0 / _denominator(normalizer, hidden, valid)
    if reduction != "sequence_mean":
        return None if reduction == "none" else 1.0
    expect(hidden.dim() == 3, "student_hidden", "shape (B, T, H) for reduction='sequence_mean'", tuple(hidden.shape))
    B, T, _ = hidden.shape
    wide = stats_dtype(hidden.dtype)
    counts = torch.full((B,), T, dtype=wide, device=hidden.device) if valid is None else valid.reshape(B, T).sum(1).to(wide)
    per_token = 1.0 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))
    return per_token[:, None].expand(B, T).reshape(-1)


def _denominator(normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None) -> Tensor | float:
    if isinstance(normalizer, Tensor):
        expect(normalizer.dim() == 0, "normalizer", "a number or a 0-dim tensor", f"shape {tuple(normalizer.shape)}")
        return normalizer.detach().to(device=hidden.device, dtype=stats_dtype(hidden.dtype))
    if normalizer is not None:
        return check_number("normalizer", normalizer, positive=True)
    return max(hidden.shape[:-1].numel(), 1) if valid is None else valid.sum().clamp(min=1).to(stats_dtype(hidden.dtype))


def _evaluate(call: Call, weights: Tensor, scale: Tensor | float | None, backward: str, metrics: bool) -> tuple[Tensor, ...]:
    """(loss, D, stats, logprobs). `scale` None: the loss is per row."""
    check_choice("backward", backward, BACKWARDS)
    trainable = call.grad_weight or call.grad_bias
    refused = backward == "in_forward" and scale is None and trainable
    expect(not refused, "backward", "'recompute' or 'auto' for reduction='none' with a trainable head: the upstream gradient comes too late", repr(backward))
    factor = weights if scale is None else weights * scale
    if not (call.grad_hidden or trainable):
        D, _, stats, logprobs, *_ = torch.ops.opsd_kernels.linear_divergence(*call, metrics, False)
    elif scale is not None and backward != "recompute":
        return WeightedSum.apply(*call._replace(factor=factor), metrics)
    else:
        recompute = trainable or backward == "recompute"
        D, stats, logprobs = PerRow.apply(*call._replace(factor=(factor != 0).to(factor.dtype)), metrics, recompute)
    losses = weighted(factor, D)
    return (losses if scale is None else losses.sum()), D, stats, logprobs


def _token_stats(D: Tensor, stats: Tensor, logprobs: Tensor, call: Call, leading: torch.Size) -> TokenStats:
    def shaped(column: Tensor) -> Tensor:
        return column.detach().float().reshape(leading)

    agreement = stats[:, Column.STUDENT_ARGMAX] == stats[:, Column.TEACHER_ARGMAX]
    return TokenStats(
        divergence=shaped(D),
        student_entropy=shaped(stats[:, Column.STUDENT_ENTROPY]),
        teacher_entropy=shaped(stats[:, Column.TEACHER_ENTROPY]),
        student_max_prob=shaped(stats[:, Column.STUDENT_MAX_PROB]),
        teacher_max_prob=shaped(stats[:, Column.TEACHER_MAX_PROB]),
        top1_agreement=shaped(agreement if call.valid is None else agreement & call.valid),
        student_logprob=None if call.labels is None else shaped(logprobs[:, 0]),
        teacher_logprob=None if call.labels is None else shaped(logprobs[:, 1]),
    )
