"""References of heads that are more than one matrix, by definition: the dense head is formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dense_head(weight: Tensor, lora: tuple[Tensor, Tensor, float] | None) -> Tensor:
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
