"""What a caller hands in, checked and brought into the flat form of ops.Call: shapes, dtypes, autocast, masks, padded vocabularies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._rows import backends
from .._rows.contract import stats_dtype
from ..spec import REDUCTIONS, RowSpec, Support, check_choice, check_number, expect
from .library import Call, pack_support, pack_transform
from .memory import same_storage
from .planner import DTYPES, parse_logits_dtype, workspace_budget
from .shard import VocabShard, local_head, shard_of


class Head(NamedTuple):
    """One side of a call: hidden (..., H), weight (V, H), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def flat(self) -> Head:
        return Head(self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias)


NO_TEACHER = (None, None, None)


def of_rank(group: object, **sides: Head) -> tuple[VocabShard | None, dict[str, Head]]:
    """What `group` says of the heads, the student's first, and the sides with plain tensors for DTensors. None, without a group."""
    shard = None if group is None else shard_of(group, next(iter(sides.values())).weight)
    return shard, {
        name: Head(side.hidden, *local_head(name, side.weight, side.bias, shard))
        for name, side in sides.items()
    }


def heads(**sides: Head) -> tuple[Head, Head | tuple[None, ...], bool]:
    """(student, teacher, whether they share a head): checked, cast for autocast and flattened; the teacher detached.

    The names of the sides are the prefixes of their arguments, the student's first; one side alone is a student without a teacher.
    """
    named = {
        f"{side}_{part}".lstrip("_"): value
        for side, head in sides.items()
        for part, value in head._asdict().items()
    }
    for name, tensor in named.items():
        optional = name.endswith("bias")
        expect(
            isinstance(tensor, Tensor) or (optional and tensor is None),
            name,
            "a tensor" + " or None" * optional,
            type(tensor).__name__,
            TypeError,
        )
    student, *others = sides.values()
    shared = len(others) > 0 and _shared(student.weight, others[0].weight)
    student, *others = _autocast([student, *others], shared)
    for side, head in zip(sides, (student, *others), strict=True):
        _check_head(f"{side}_".lstrip("_"), head, student, f"{next(iter(sides))}_hidden".lstrip("_"))
    if not others:
        return student.flat(), NO_TEACHER, False
    leading, other = student.hidden.shape[:-1], others[0].hidden.shape[:-1]
    expect(
        leading == other, "teacher_hidden", f"leading shape {tuple(leading)}, as student_hidden", tuple(other)
    )
    return student.flat(), Head(*(None if x is None else x.detach() for x in others[0].flat())), shared


def _autocast(sides: list[Head], shared: bool) -> list[Head]:
    """Hidden states and weights in the autocast dtype; one cast for a head that both sides share, so that it stays shared."""
    device = sides[0].hidden.device.type
    if not torch.is_autocast_enabled(device):
        return sides
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    done = [Head(cast(side.hidden), cast(side.weight), side.bias) for side in sides]
    return [done[0], done[1]._replace(weight=done[0].weight)] if shared else done


def _shared(student: Tensor, teacher: Tensor) -> bool:
    """Whether both sides project with one head: the same storage, shape and strides. A traced graph sees no storage, only tensors."""
    return teacher is student or (not torch.compiler.is_compiling() and same_storage(student, teacher))


def _check_head(prefix: str, head: Head, student: Head, first: str) -> None:
    states, weight, bias = head
    expect(states.dim() >= 1, f"{prefix}hidden", "shape (..., H)", tuple(states.shape))
    expect(
        weight.dim() == 2 and min(weight.shape) >= 1,
        f"{prefix}weight",
        "shape (V, H) with V, H >= 1",
        tuple(weight.shape),
    )
    expect(
        states.shape[-1] == weight.shape[1],
        f"{prefix}hidden",
        f"(..., {weight.shape[1]}), the hidden size of {prefix}weight",
        tuple(states.shape),
    )
    if bias is not None:
        expect(
            bias.shape == weight.shape[:1], f"{prefix}bias", f"shape ({weight.shape[0]},)", tuple(bias.shape)
        )
    hidden = student.hidden
    expect(hidden.dtype in DTYPES, first, "float64, float32, bfloat16 or float16", hidden.dtype, TypeError)
    for part, tensor in head._asdict().items():
        if tensor is not None:
            expect(
                tensor.device == hidden.device,
                f"{prefix}{part}",
                f"a tensor on {hidden.device}, as {first}",
                tensor.device,
            )
            same = tensor.dtype == hidden.dtype or (part == "bias" and tensor.is_floating_point())
            expect(same, f"{prefix}{part}", f"dtype {hidden.dtype}, as {first}", tensor.dtype, TypeError)


def per_token(name: str, value: object, leading: torch.Size, device: torch.device) -> Tensor:
    """A tensor of one entry per token, flat and detached."""
    expect(isinstance(value, Tensor), name, "a tensor or None", type(value).__name__, TypeError)
    expect(value.shape == leading, name, f"shape {tuple(leading)}, one entry per token", tuple(value.shape))
    expect(value.device == device, name, f"a tensor on {device}, as the hidden states", value.device)
    return value.detach().reshape(-1)


def valid_tokens(
    hidden: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(valid (N,) bool or None for all, labels (N,) or None), for hidden states (..., H)."""
    expect(isinstance(ignore_index, int), "ignore_index", "an int", type(ignore_index).__name__, TypeError)
    valid = None
    if labels is not None:
        labels = per_token("labels", labels, hidden.shape[:-1], hidden.device)
        expect(labels.dtype == torch.int64, "labels", "dtype int64", labels.dtype, TypeError)
        valid = labels != ignore_index
    if mask is not None:
        mask = per_token("mask", mask, hidden.shape[:-1], hidden.device).bool()
        valid = mask if valid is None else valid & mask
    return valid, labels


def listed_support(
    ids: object, logprobs: object, leading: torch.Size, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A teacher's top-k entries, (N, K) each. Entries with log-prob -inf are padding, and what is listed of a token that is not valid does not count."""
    for name, value in (("teacher_topk_ids", ids), ("teacher_topk_logprobs", logprobs)):
        expect(isinstance(value, Tensor), name, "a tensor", type(value).__name__, TypeError)
        shaped = value.dim() == len(leading) + 1 and value.shape[:-1] == leading and value.shape[-1] >= 1
        expect(shaped, name, f"shape ({', '.join(map(str, leading))}, K) with K >= 1", tuple(value.shape))
    expect(ids.dtype == torch.int64, "teacher_topk_ids", "dtype int64", ids.dtype, TypeError)
    expect(
        logprobs.is_floating_point(),
        "teacher_topk_logprobs",
        "a floating-point tensor",
        logprobs.dtype,
        TypeError,
    )
    expect(
        ids.shape == logprobs.shape,
        "teacher_topk_logprobs",
        f"shape {tuple(ids.shape)}, as teacher_topk_ids",
        tuple(logprobs.shape),
    )
    ids, logprobs = ids.detach().reshape(-1, ids.shape[-1]), logprobs.detach().reshape(-1, ids.shape[-1])
    counted = (logprobs > -torch.inf) if valid is None else (logprobs > -torch.inf) & valid[:, None]
    return torch.where(counted, ids, 0), torch.where(counted, logprobs, -torch.inf)


def make_call(
    spec: RowSpec,
    student: Head,
    teacher: Head | tuple[None, ...],
    shared_head: bool,
    valid: Tensor | None,
    labels: Tensor | None,
    vocab: int,
    logits_dtype: str | torch.dtype,
    workspace_bytes: int | None,
    backend: str | None,
    support: Support | None = None,
    listed: tuple[Tensor | None, Tensor | None] = (None, None),
    shard: VocabShard | None = None,
) -> Call:
    backends.check_name(backend)
    workspace_budget(workspace_bytes)
    logits_dtype = parse_logits_dtype(logits_dtype)
    bounds, group = ([], None) if shard is None else shard.cut(vocab).pack()
    grad = torch.is_grad_enabled()
    wants = [grad and x is not None and x.requires_grad for x in student]
    return Call(
        *student,
        *teacher,
        factor=None,
        policy=None,
        valid=valid,
        labels=labels,
        topk_ids=listed[0],
        topk_logprobs=listed[1],
        kind=int(spec.divergence.kind),
        beta=spec.divergence.beta,
        dialect=[spec.teacher_mix, spec.entry_clip, spec.token_clip],
        support=pack_support(support),
        student_transform=pack_transform(spec.student),
        teacher_transform=pack_transform(spec.teacher),
        shared_head=shared_head,
        vocab=vocab,
        logits_dtype="float32" if logits_dtype == "auto" and spec.kinked else logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
        shard=bounds,
        group=group,
        grad_hidden=wants[0],
        grad_weight=wants[1],
        grad_bias=wants[2],
    )


def vocabulary(V_s: int, V_t: int | None, vocab_size: int | None) -> int:
    """Columns in use; V_t None: one head alone."""
    if vocab_size is None:
        expect(
            V_t in (V_s, None),
            "vocab_size",
            f"a size <= {min(V_s, V_t or V_s)}, since student_weight has {V_s} rows and teacher_weight {V_t}",
            None,
        )
        return V_s
    least = min(V_s, V_t or V_s)
    expect(
        isinstance(vocab_size, int) and not isinstance(vocab_size, bool),
        "vocab_size",
        "an int or None",
        type(vocab_size).__name__,
        TypeError,
    )
    expect(
        1 <= vocab_size <= least,
        "vocab_size",
        f"a size in [1, {least}], the rows of the smaller head",
        vocab_size,
    )
    return vocab_size


def known_weights(
    token_weights: Tensor | None,
    leading: torch.Size,
    device: torch.device,
    wide: torch.dtype,
    valid: Tensor | None,
) -> Tensor:
    """(N,) weights in the dtype of the statistics, 0 where a token is not valid."""
    if token_weights is None:
        ones = torch.ones(leading.numel(), dtype=wide, device=device)
        return ones if valid is None else valid.to(wide)
    weights = per_token("token_weights", token_weights, leading, device)
    expect(weights.is_floating_point(), "token_weights", "a floating-point tensor", weights.dtype, TypeError)
    weights = weights.to(wide)
    return weights if valid is None else torch.where(valid, weights, 0.0)


def row_scale(
    reduction: str, normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None
) -> Tensor | float | None:
    """What a weighted row is multiplied by before the sum: a number, or (N,); None for `none`."""
    check_choice("reduction", reduction, REDUCTIONS)
    expect(
        normalizer is None or reduction == "mean",
        "normalizer",
        "None, unless reduction='mean'",
        f"{normalizer!r} with reduction={reduction!r}",
    )
    if reduction == "mean":
        return 1.0 / _denominator(normalizer, hidden, valid)
    if reduction != "sequence_mean":
        return None if reduction == "none" else 1.0
    expect(
        hidden.dim() == 3,
        "student_hidden",
        "shape (B, T, H) for reduction='sequence_mean'",
        tuple(hidden.shape),
    )
    B, T, _ = hidden.shape
    wide = stats_dtype(hidden.dtype)
    counts = (
        torch.full((B,), T, dtype=wide, device=hidden.device)
        if valid is None
        else valid.reshape(B, T).sum(1).to(wide)
    )
    per_row = 1.0 / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))
    return per_row[:, None].expand(B, T).reshape(-1)


def _denominator(normalizer: float | Tensor | None, hidden: Tensor, valid: Tensor | None) -> Tensor | float:
    if isinstance(normalizer, Tensor):
        expect(
            normalizer.dim() == 0,
            "normalizer",
            "a number or a 0-dim tensor",
            f"shape {tuple(normalizer.shape)}",
        )
        from_host = normalizer.device.type == "cpu"  # that copy need not be waited for, unlike one from a GPU
        return normalizer.detach().to(
            device=hidden.device, dtype=stats_dtype(hidden.dtype), non_blocking=from_host
        )
    if normalizer is not None:
        return check_number("normalizer", normalizer, positive=True)
    return (
        max(hidden.shape[:-1].numel(), 1)
        if valid is None
        else valid.sum().clamp(min=1).to(stats_dtype(hidden.dtype))
    )
