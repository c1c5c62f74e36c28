"""References of heads that are more than one matrix, by definition: the dense head is formed."""

from __future__ import annotations

from collections.abc import Callable
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


def quantise(
    weight: Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] | None = None,
    bits: int = 8,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return values, scales and block size of a QuantizedHead, by the largest magnitude of each block.

    `dtype` is int8, with values of `bits` bits, or one of float8. Without `block` each row has a scale.
    """
    (V, H), (b, c) = weight.shape, block or (1, weight.shape[1])
    largest = 2.0 ** (bits - 1) - 1 if dtype == torch.int8 else torch.finfo(dtype).max
    rows, columns = -(-V // b), -(-H // c)
    padded = weight.new_zeros(rows * b, columns * c, dtype=torch.float32)
    padded[:V, :H] = weight.abs()
    scales = padded.view(rows, b, columns, c).amax((1, 3)).clamp(min=1e-12).div(largest).to(scale_dtype)
    del padded
    values = weight / scales.float().repeat_interleave(b, 0)[:V].repeat_interleave(c, 1)[:, :H]
    values = values.round() if dtype == torch.int8 else values
    return values.clamp(-largest, largest).to(dtype), scales, (b, c)


def with_dense_heads(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reference of an op so that it takes `student_lora`, `teacher_lora` and `lora`."""

    def run(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
        own = options.pop("student_lora", None) or options.pop("lora", None)
        teacher = options.pop("teacher_lora", None)
        if teacher is not None and isinstance(rest[1], (tuple, list)):
            heads = [dense_head(head, lora) for head, lora in zip(rest[1], teacher, strict=True)]
            rest = (rest[0], heads, *rest[2:])
        elif teacher is not None:
            rest = (rest[0], dense_head(rest[1], teacher), *rest[2:])
        return reference(hidden, dense_head(weight, own), *rest, **options)

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
