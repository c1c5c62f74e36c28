"""The LM head of a transformers model as arguments of the op: weight, bias, logit scale and softcap.

    student = Head.of(model)
    hidden = trunk(model)(input_ids=tokens).last_hidden_state
    sides = {"student": (hidden, student), "teacher": (teacher_hidden, Head.of(teacher))}
    loss = on_heads(linear_divergence, sides, divergence="jsd", labels=labels)

`trunk` runs the model without its head, so that no logits are made. `check_head` compares trunk and head with
the model's own logits and raises ValueError for a model that this module does not read right; call it once,
before training. transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

# Config entries that scale the logits: Cohere, Muse Glimmer, Falcon-H1.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Config entries of a softcap: Gemma, RecurrentGemma.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# Share of the largest logit: two roundings of bf16 logits differ by 0.8 %, a forgotten scale or softcap by
# far more.
AGREE = 0.05


@dataclass(frozen=True)
class Head:
    """The LM head of a model: weight and bias, with the scale and softcap of its config."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Module) -> Head:
        """Read the head of a causal language model, inside a peft model too.

        A sharded (DTensor) weight is gathered. Raises ValueError if the output head is not a plain linear
        map.
        """
        inner = without_adapter(model)
        module = inner.get_output_embeddings()
        weight = getattr(module, "weight", None)
        # ds_shape is the whole shape of a parameter that ZeRO-3 partitions.
        linear = weight is not None and len(getattr(weight, "ds_shape", weight.shape)) == 2
        if weight is None or not linear or hasattr(module, "base_layer"):
            raise ValueError(
                "model: expected a causal language model with a linear head that has no adapter of its own, "
                f"got {type(inner).__name__}"
            )
        config = inner.config.get_text_config()
        caps = [getattr(config, name, None) for name in SOFTCAPS]
        bias = getattr(module, "bias", None)
        softcap = next((cap for cap in caps if cap is not None), None)
        return cls(_whole(weight), None if bias is None else _whole(bias), _logit_scale(config), softcap)

    def options(self, side: str = "") -> dict[str, Any]:
        """Return the keyword arguments of linear_divergence for `side`, "student" or "teacher".

        Without a side they are those of linear_logprobs.
        """
        prefix = side and f"{side}_"
        return {
            f"{prefix}bias": self.bias,
            f"{prefix}logit_scale": self.logit_scale,
            f"{prefix}softcap": self.softcap,
        }


def on_heads(
    op: Callable[..., Any],
    sides: dict[str, tuple[Tensor, Head]],
    *tensors: Tensor,
    **options: Any,
) -> Any:
    """Call `op`, linear_divergence or a sibling, on hidden states and their heads.

    `sides` maps "student" and "teacher", or "" alone, to hidden states (..., H) and the head that projects
    them. `tensors` are further positional arguments of `op`. `options` override the heads' own.
    """
    settings = {
        name: value for side, (_, head) in sides.items() for name, value in head.options(side).items()
    }
    operands = [operand for hidden, head in sides.values() for operand in (hidden, head.weight)]
    return op(*operands, *tensors, **{**settings, **options})


def _whole(tensor: Any) -> Tensor:
    """Gather a DTensor; return any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _logit_scale(config: Any) -> float:
    for name in SCALES:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    factor = getattr(config, "logits_scaling", None)
    if factor is None:
        return 1.0
    # Granite and MiniCPM3 divide by it.
    return float(factor) if config.model_type == "hyperclovax" else 1.0 / factor


def without_adapter(model: Module) -> Any:
    """Return the transformers model inside a peft model; its layers still hold the adapter."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Module) -> Any:
    """Return the model without its head: calling it makes no logits."""
    return without_adapter(model).base_model


@torch.no_grad()
def check_head(name: str, model: Module) -> None:
    """Compare trunk and head with the model's own logits on four tokens.

    Raises ValueError, with `name` as the argument's name, if they disagree: for a model that scales or bends
    its logits in a way its config does not say. The model's training mode is restored.
    """
    training = model.training
    model.eval()
    try:
        head, inner = Head.of(model), without_adapter(model)
        # One token alone may be padding, whose embedding is 0.
        tokens = torch.arange(min(4, head.weight.shape[0]), device=inner.device)[None]
        # The whole model's logits, in which prompt tuning shows.
        expected = model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :].float()
        hidden = trunk(model)(input_ids=tokens, use_cache=False).last_hidden_state
        logits = F.linear(hidden, head.weight, head.bias).float() * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    finally:
        model.train(training)
    finite = expected.isfinite()
    error, largest = (logits - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
    if not error <= AGREE * largest:
        raise ValueError(
            f"{name}: expected logits that are a linear head over the trunk, scaled and softcapped as the "
            f"config says, got {type(without_adapter(model)).__name__}, "
            f"whose logits are off by {error:.2g} of {largest:.2g}"
        )
