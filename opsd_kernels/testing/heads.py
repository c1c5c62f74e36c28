"""References of heads that are more than one matrix, by definition: the dense head is formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Adapter


def dense_head(weight: Tensor, lora: Adapter | None) -> Tensor:
    """Return W + scaling * B @ A, (V, H), in fp32 or fp64. Differentiable."""
    if lora is None:
        return weight
    A, B, scaling = lora
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide) + scaling * (B.to(wide) @ A.to(wide))


def with_dense_heads(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reference of an op so that it takes `student_lora`, `teacher_lora` and `lora`."""

    def run(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        own = options.pop("student_lora", None) or options.pop("lora", None)
        teacher = options.pop("teacher_lora", None)
        if teacher is not None:
            rest = (rest[0], dense_head(rest[1], teacher), *rest[2:])
        return reference(hidden, dense_head(weight, own), *rest, **options)

    return run


def by_index(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the reference of `linear_divergence` so that each token has the teacher of `teacher_index`.

    All teachers become one head over their hidden states side by side, in which a token has zeros but for its
    own teacher's, and one more unit that holds the bias. Hidden states are (..., H_k) or packed. A softcap is
    that of all teachers.
    """

    def run(
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Sequence[Tensor],
        teacher_weight: Sequence[Tensor],
        *,
        teacher_index: Tensor,
        teacher_bias: Sequence[Tensor | None] | None = None,
        teacher_logit_scale: Sequence[float] | float = 1.0,
        student_lora: Adapter | None = None,
        teacher_lora: Sequence[Adapter | None] | None = None,
        **options: Any,
    ) -> Any:
        count, flat = len(teacher_hidden), teacher_index.reshape(-1)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scales = (
            teacher_logit_scale
            if isinstance(teacher_logit_scale, Sequence)
            else [teacher_logit_scale] * count
        )
        columns: list[Tensor] = []
        rows: list[Tensor] = []
        for k, (states, head) in enumerate(zip(teacher_hidden, teacher_weight, strict=True)):
            own = flat == k
            head = dense_head(head, None if teacher_lora is None else teacher_lora[k])
            packed = states.dim() == 2 and states.shape[:-1] != teacher_index.shape
            mine = states if packed else states.reshape(-1, states.shape[-1])[own]
            block = hidden.new_zeros(flat.numel(), head.shape[1] + 1, dtype=wide)
            block[own] = scales[k] * torch.cat([mine.to(wide), mine.new_ones(len(mine), 1, dtype=wide)], 1)
            bias = None if teacher_bias is None else teacher_bias[k]
            unit = head.new_zeros(head.shape[0], 1) if bias is None else bias[:, None]
            rows.append(block)
            columns.append(torch.cat([head.to(wide), unit.to(wide)], 1))
        merged = torch.cat(rows, 1).reshape(*teacher_index.shape, -1)
        return reference(hidden, dense_head(weight, student_lora), merged, torch.cat(columns, 1), **options)

    return run


def with_student_vocab(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reference of an op so that it takes `student_vocab_ids`.

    The teacher is a pair of hidden states and head, a list of ids and log-probs, or a target alone. Its
    columns, and those of the labels, are found by comparing each token with all ids.
    """

    def run(
        hidden: Tensor,
        weight: Tensor,
        *teacher: Tensor,
        student_vocab_ids: Tensor,
        teacher_bias: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> Any:
        ids = student_vocab_ids
        if len(teacher) == 1:
            teacher = (teacher[0][..., ids],)
        elif teacher[0].is_floating_point():
            teacher = (teacher[0], teacher[1][ids])
        else:
            same = teacher[0][..., None] == ids
            column, known = same.to(torch.int8).argmax(-1), same.any(-1)
            teacher = (column, torch.where(known, teacher[1], -torch.inf))
        if teacher_bias is not None:
            options["teacher_bias"] = teacher_bias[ids]
        if labels is not None:
            same = labels[..., None] == ids
            known = same.any(-1) & (labels != ignore_index)
            labels = torch.where(known, same.to(torch.int8).argmax(-1), -100)
        return reference(hidden, weight, *teacher, labels=labels, mask=mask, **options)

    return run
