"""Where trunk and LM head of a transformers model are, and what its config does to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, RecurrentGemma
AGREE = 0.05  # of the largest logit: two roundings of bf16 logits are 0.8 % apart, a forgotten scale or softcap is not near


@dataclass(frozen=True)
class Head:
    """An LM head as the op takes it, read from the model: weight, bias, and the scale and softcap that its config names."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Module) -> Head:
        """Raises ValueError for a model whose output head is not a plain linear map."""
        model = without_adapter(model)
        module = model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if (
            weight is None
            or hasattr(module, "base_layer")
            or len(getattr(weight, "ds_shape", weight.shape)) != 2
        ):  # ds_shape: ZeRO-3's, of the whole
            raise ValueError(
                f"model: expected a causal language model with a linear head that has no adapter of its own, got {type(model).__name__}"
            )
        config = model.config.get_text_config()
        softcap = next(
            (value for name in SOFTCAPS if (value := getattr(config, name, None)) is not None), None
        )
        return cls(_whole(weight), _whole(getattr(module, "bias", None)), _logit_scale(config), softcap)

    def options(self, side: str = "") -> dict[str, Any]:
        """Arguments of linear_divergence for one side, "student" or "teacher"; without a side those of linear_logprobs."""
        prefix = side and f"{side}_"
        return {
            f"{prefix}bias": self.bias,
            f"{prefix}logit_scale": self.logit_scale,
            f"{prefix}softcap": self.softcap,
        }


def on_heads(
    op: Callable[..., Any],
    sides: dict[
        str, tuple[Tensor, Head]
    ],  # "student" and "teacher", or "" alone: hidden states and the head above them
    *tensors: Tensor,
    **options: Any,
) -> Any:
    """`op`, linear_divergence or a sibling, with hidden states, weights and logit transforms of `sides`, then `tensors`; `options` win."""
    settings = {
        name: value for side, (_, head) in sides.items() for name, value in head.options(side).items()
    }
    operands = [operand for hidden, head in sides.values() for operand in (hidden, head.weight)]
    return op(*operands, *tensors, **{**settings, **options})


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor is gathered once


def _logit_scale(config: Any) -> float:
    for name in SCALES:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    factor = getattr(config, "logits_scaling", None)
    if factor is None:
        return 1.0
    return (
        float(factor) if config.model_type == "hyperclovax" else 1.0 / factor
    )  # Granite and MiniCPM3 divide by it


def without_adapter(model: Module) -> Module:
    """The transformers model inside a peft one; its layers still hold the adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Module) -> Module:
    """The model without its head: calling it makes no logits."""
    return without_adapter(model).base_model


@torch.no_grad()
def check_head(name: str, model: Module) -> None:
    """Four tokens through the model: raises ValueError where trunk and head, as read here, do not give its logits."""
    training = model.training
    model.eval()
    try:
        head = Head.of(model)
        tokens = torch.arange(min(4, head.weight.shape[0]), device=model.device)[
            None
        ]  # one alone may be padding, whose embedding is 0
        expected = (
            model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :].float()
        )  # of the whole model: prompt tuning shows
        logits = (
            F.linear(
                trunk(model)(input_ids=tokens, use_cache=False).last_hidden_state, head.weight, head.bias
            ).float()
            * head.logit_scale
        )
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    finally:
        model.train(training)
    finite = expected.isfinite()
    error, largest = (logits - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
    if not error <= AGREE * largest:
        raise ValueError(f"{name}: expected logits that are a linear head over the trunk, scaled and softcapped as the config says, got "
                         f"{type(without_adapter(model)).__name__}, whose logits are off by {error:.2g} of {largest:.2g}")  # fmt: skip
