"""Wrap `linear_divergence` in modules: one that holds options, and one that owns the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from .divergence import DivergenceOptions, TokenStats, check_options, linear_divergence
from .peft_head import base_and_adapter
from .quantized import QuantizedHead, head_of_layer
from .spec import expect


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape. ZeRO-3 leaves an empty tensor of one that it has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _linear(head: nn.Module, name: str) -> tuple[Any, Any]:
    """Return the linear layer of a head, and its adapter or None. Raises TypeError for another module."""
    layer, adapter = base_and_adapter(head, name)
    weight, bias, came = getattr(layer, "weight", None), getattr(layer, "bias", False), "without them"
    if isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
        shape, other = _shape(weight), None if bias is None else _shape(bias)
        if len(shape) == 2 and other in (None, shape[:1]):
            return layer, adapter
        came = f"of weight {shape} and bias {other}"
    expected = "a linear layer with weight (V, H) and bias (V,) or None"
    raise TypeError(f"{name}: expected {expected}, got {type(layer).__name__} {came}")


def _text(options: DivergenceOptions) -> str:
    return ", ".join(
        f"{name}={'...' if isinstance(value, Tensor) else repr(value)}" for name, value in options.items()
    )


class LinearDivergenceLoss(nn.Module):
    """Apply `linear_divergence` with options given once. The module has no parameters and no state.

        loss = LinearDivergenceLoss(divergence="jsd", beta=0.5, temperature=2.0)
        loss(student_hidden, lm_head.weight, teacher_hidden, teacher_head.weight, labels=tokens)

    The constructor raises TypeError for an unknown option and ValueError for a bad value.
    """

    def __init__(self, **options: Unpack[DivergenceOptions]) -> None:
        super().__init__()
        check_options(options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor | QuantizedHead,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | QuantizedHead,
        **tensors: Unpack[DivergenceOptions],
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """Return the loss, as `linear_divergence` does.

        `tensors` are the arguments of one call (labels, mask, token_weights, normalizer, biases). They take
        precedence over the options of the module.
        """
        options: dict[str, Any] = {**self.options, **tensors}
        return linear_divergence(student_hidden, student_weight, teacher_hidden, teacher_weight, **options)

    def extra_repr(self) -> str:
        return _text(self.options)


class DistillationHead(nn.Module):
    """Hold an LM head and its distillation loss, so that a parallel wrapper's hooks cover the fused call.

        head = DistillationHead(model.lm_head, divergence="reverse_kl")
        loss = head(student_hidden, teacher_hidden)                   # self-distillation: one head for both
        loss = head(student_hidden, teacher_hidden, teacher.lm_head)  # the teacher has its own head

    `lm_head` is a linear layer (`weight` (V, H), `bias` (V,) or None), alone or under peft's LoRA, whose
    active adapter is read at each call. Its parameters receive gradients; those of the teacher's head never
    do. A frozen layer may be quantised: by torchao, or to float8 with `weight_scale_inv` or `weight_scale`
    beside the weight. For a teacher without the adapter give its layer, `lm_head.base_layer`, as the
    teacher's head. Constructor and call raise TypeError for a head that is another module, and ValueError for
    an adapter that is no plain LoRA (peft_head.py); the constructor raises TypeError for an unknown option.
    """

    def __init__(self, lm_head: nn.Module, **options: Unpack[DivergenceOptions]) -> None:
        super().__init__()
        _linear(lm_head, "lm_head")
        self.lm_head = lm_head
        check_options(options)
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        teacher_head: nn.Module | None = None,
        **tensors: Unpack[DivergenceOptions],
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """Return the loss under this head; `teacher_head` is the teacher's, by default the same."""
        teacher = self.lm_head if teacher_head is None else teacher_head
        expected = "a module (for heads of several teachers call linear_divergence)"
        expect(isinstance(teacher, nn.Module), "teacher_head", expected, type(teacher).__name__, TypeError)
        heads = (self.lm_head, "lm_head"), (teacher, "lm_head" if teacher_head is None else "teacher_head")
        layers, adapters = zip(*(_linear(*head) for head in heads), strict=True)
        student = self._whole(head_of_layer(layers[0]), layers[0].bias)
        # One object for one layer: so a shared head is known as such under torch.compile too.
        one = layers[0] is layers[1]
        other = student if one else self._whole(head_of_layer(layers[1]), layers[1].bias)
        options: dict[str, Any] = {
            "student_bias": student[1],
            "teacher_bias": other[1],
            "student_lora": adapters[0],
            "teacher_lora": adapters[1],
            **self.options,
            **tensors,
        }
        return linear_divergence(student_hidden, student[0], teacher_hidden, other[0], **options)

    def _whole(self, *parameters: Any) -> tuple[Any, ...]:
        """Return the parameters, gathered where DeepSpeed ZeRO-3 partitions them over ranks.

        The hooks of ZeRO-3 gather a child's parameters in the child's own forward alone. Registered here,
        they belong to this module: released after its call, and gathered before its next call and in
        backward.
        """
        for parameter in parameters:
            if getattr(parameter, "ds_numel", None) and not parameter.numel():
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)
                parameter.all_gather()
        return parameters

    def extra_repr(self) -> str:
        return _text(self.options)
