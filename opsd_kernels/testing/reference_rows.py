"""Reference implementation for teachers that are rows over the vocabulary, by definition (reference.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..spec import LogitTransform, check_choice
from .reference import _wide, linear_divergence_reference, reference_logits


def linear_divergence_to_reference(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    target: Tensor,  # (..., V or more)
    *,
    target_is: str = "logits",
    teacher_temperature: Any = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute `linear_divergence_to` by its definition, from the dense rows of both sides."""
    check_choice("target_is", target_is, ("logits", "logprobs", "probs"))
    if teacher_temperature is None and target_is != "logits":
        teacher_temperature = 1.0
    V = student_weight.shape[0] if vocab_size is None else vocab_size
    rows = target.detach()[..., :V].to(_wide(student_hidden))
    told = {"teacher_temperature": teacher_temperature, "vocab_size": vocab_size, **options}
    rows = rows.log() if target_is == "probs" else rows
    return linear_divergence_reference(student_hidden, student_weight, rows, None, **told)


def linear_divergence_by_index_reference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Sequence[Tensor],  # K of (..., H_k), or packed (n_k, H_k)
    teacher_weight: Sequence[Tensor],  # K of (V, H_k)
    *,
    teacher_index: Tensor,  # (...)
    teacher_bias: Sequence[Tensor | None] | Tensor | None = None,
    teacher_logit_scale: Sequence[float] | float = 1.0,
    teacher_softcap: Sequence[float | None] | float | None = None,
    **options: Any,
) -> Any:
    """Compute `linear_divergence` of several teachers: each token's logits from its own, as dense rows."""
    count, flat, wide = len(teacher_hidden), teacher_index.reshape(-1), _wide(hidden)

    def each(given: Any) -> Sequence[Any]:
        return given if isinstance(given, (tuple, list)) else [given] * count

    V = options.get("vocab_size") or weight.shape[0]
    rows = hidden.new_zeros(flat.numel(), V, dtype=wide)
    told = zip(each(teacher_bias), each(teacher_logit_scale), each(teacher_softcap), strict=True)
    for k, (bias, scale, softcap) in enumerate(told):
        own, states, head = flat == k, teacher_hidden[k], teacher_weight[k][:V].to(wide)
        packed = states.dim() == 2 and states.shape[:-1] != teacher_index.shape
        mine = states if packed else states.reshape(-1, states.shape[-1])[own]
        transform = LogitTransform(scale, softcap)
        rows[own] = reference_logits(
            mine.to(wide) @ head.T, transform, None if bias is None else bias[:V].to(wide)
        )
    target = rows.reshape(*teacher_index.shape, V)
    return linear_divergence_to_reference(hidden, weight, target, **options)
