"""`linear_divergence` as modules: options held once, and a head that owns its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ._core.reductions import TokenStats, row_scale
from .divergence import DEFAULTS, DivergenceOptions, linear_divergence, row_spec
from .spec import expect


def _checked(options: DivergenceOptions) -> DivergenceOptions:
    """Check what can be checked before the tensors are known."""
    unknown = sorted(set(options) - set(DEFAULTS))
    expect(not unknown, "options", "arguments of linear_divergence", ", ".join(map(repr, unknown)), TypeError)
    given: dict[str, Any] = {**DEFAULTS, **options}
    row_spec(given)
    row_scale(given["reduction"], given["normalizer"], torch.empty(1, 1, 1), None)
    return options


def _text(options: DivergenceOptions) -> str:
    return ", ".join(
        f"{name}={'...' if isinstance(value, Tensor) else repr(value)}" for name, value in options.items()
    )


class LinearDivergenceLoss(nn.Module):
    """`linear_divergence` with options given once; holds no parameter and no state.

        loss = LinearDivergenceLoss(divergence="jsd", beta=0.5, temperature=2.0)
        loss(student_hidden, lm_head.weight, teacher_hidden, teacher_head.weight, labels=tokens)

    Raises TypeError for an unknown option and ValueError for a bad value when made, not when called.
    """

    def __init__(self, **options: Unpack[DivergenceOptions]) -> None:
        super().__init__()
        self.options = _checked(options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **tensors: Unpack[DivergenceOptions],
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """`tensors` are what changes from call to call (labels, mask, token_weights, normalizer, biases); they win over the options."""
        options: dict[str, Any] = {**self.options, **tensors}
        return linear_divergence(student_hidden, student_weight, teacher_hidden, teacher_weight, **options)

    def extra_repr(self) -> str:
        return _text(self.options)


class DistillationHead(nn.Module):
    """An LM head and its distillation loss in one module, so that what a parallel wrapper does around a module's forward is done around the fused call.

        head = DistillationHead(model.lm_head, divergence="reverse_kl")
        loss = head(student_hidden, teacher_hidden)                          # the teacher uses the same head: self-distillation
        loss = head(student_hidden, teacher_hidden, teacher.lm_head)         # a head of its own

    `lm_head` is a linear layer (`weight` (V, H), `bias` (V,) or None). Its weight gets the gradient; the teacher's never does.
    """

    def __init__(self, lm_head: nn.Module, **options: Unpack[DivergenceOptions]) -> None:
        super().__init__()
        weight = getattr(lm_head, "weight", None)
        linear = isinstance(weight, Tensor) and weight.dim() == 2
        expect(
            linear,
            "lm_head",
            "a linear layer with a weight (V, H)",
            type(lm_head).__name__ if weight is None else f"a weight of shape {tuple(weight.shape)}",
            TypeError,
        )
        self.lm_head = lm_head
        self.options = _checked(options)

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        teacher_head: nn.Module | None = None,
        **tensors: Unpack[DivergenceOptions],
    ) -> Tensor | tuple[Tensor, TokenStats]:
        teacher = self.lm_head if teacher_head is None else teacher_head
        student, other = (self._whole(head.weight, head.bias) for head in (self.lm_head, teacher))
        options: dict[str, Any] = {
            "student_bias": student[1],
            "teacher_bias": other[1],
            **self.options,
            **tensors,
        }
        return linear_divergence(student_hidden, student[0], teacher_hidden, other[0], **options)

    def _whole(self, *parameters: Any) -> tuple[Any, ...]:
        """What DeepSpeed ZeRO-3 has spread over ranks, gathered. Its hooks know a child's parameters in the forward pass of its engine alone; registered here,
        they are this module's own: released after it, and gathered before its next call and in backward.
        """
        for parameter in parameters:
            if getattr(parameter, "ds_numel", None) and not parameter.numel():
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)
                parameter.all_gather()
        return parameters

    def extra_repr(self) -> str:
        return _text(self.options)
