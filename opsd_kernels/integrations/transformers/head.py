"""The LM head of a model: where it is, and what it does to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from opsd_kernels.peft_head import Adapter, base_and_adapter
from opsd_kernels.quantized import LAYER_SCALES, QuantizedHead, head_of_layer, stored_head

# Config entries that multiply the logits: Cohere, Muse Glimmer, Falcon-H1.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Granite divides by this one, HyperCLOVAX multiplies.
DIVISOR = "logits_scaling"
# Config entries of a softcap: Gemma, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Entries that do not act behind the head: Mpt reads it nowhere, MiniCPM3 divides the head's input.
ELSEWHERE = {"mpt": ("logit_scale",), "minicpm3": ("logits_scaling",)}


@dataclass(frozen=True)
class Head:
    """The LM head of a model: weight and bias, with the scale and softcap of its config."""

    weight: Tensor | QuantizedHead  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    lora: Adapter | None = None  # (A (r, H), B (V, r), scaling) of peft's active adapter on the head

    @classmethod
    def of(cls, model: Module) -> Head:
        """Read the head of a causal language model, inside a peft model too, with its active LoRA adapter.

        A sharded (DTensor) weight is gathered, one that accelerate offloaded is loaded as in the model's own
        forward. A frozen weight of torchao's, or in float8 with its scales, is a QuantizedHead. Inside
        `model.disable_adapter()` it is the head without the adapter. Raises ValueError if the output head is
        not a plain linear map (another parameter beside weight, bias and LoRA, a head that is quantised in
        another way, several heads, an adapter with dropout in training mode), and for a scale or softcap in
        the config that is no number.
        """
        inner = without_adapter(model)
        module, lora = base_and_adapter(output_embedding(inner), "model")
        kind = type(inner).__name__
        scale, softcap = _logit_scale(inner), _number(inner, *SOFTCAPS)
        with _loaded(module):
            held = _quantised(module)
            bias = _plain(kind, "bias", getattr(module, "bias", None))
            weight = _plain(kind, "weight", getattr(module, "weight", None)) if held is None else held
        # ds_shape is the whole shape of a parameter that ZeRO-3 partitions.
        linear = weight is not None and len(getattr(weight, "ds_shape", weight.shape)) == 2
        if weight is None or not linear:
            raise ValueError(
                "model: expected a causal language model with a linear head, "
                f"got {kind} with {type(module).__name__}"
            )
        # Dory's scale of each token starts at one: the first loss is right, and the scale gets no gradient.
        known = ("weight", "bias") if held is None else ("weight", "bias", *LAYER_SCALES)
        further = [name for name, _ in module.named_parameters() if name not in known]
        if further:
            raise ValueError(
                "model: expected a causal language model whose head has a weight and a bias alone, "
                f"got {kind} with {type(module).__name__}, which has {', '.join(further)} too"
            )
        return cls(weight, bias, scale, softcap, lora)

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return weight, bias, and A and B of an adapter."""
        return (self.weight, self.bias, *(self.lora or ())[:2])

    def options(self, side: str = "") -> dict[str, Any]:
        """Return the keyword arguments of linear_divergence for `side`, "student" or "teacher".

        Without a side they are those of linear_logprobs.
        """
        prefix = side and f"{side}_"
        adapter = {} if self.lora is None else {f"{prefix}lora": self.lora}
        return adapter | {
            f"{prefix}bias": self.bias,
            f"{prefix}logit_scale": self.logit_scale,
            f"{prefix}softcap": self.softcap,
        }

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, a quantised one as a whole in `dtype`, for checks on a few tokens."""
        return self.weight.dequantize(dtype) if isinstance(self.weight, QuantizedHead) else self.weight

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Shape (..., V): log-probs of hidden states (..., H), for checks on a few tokens."""
        weight = self.dense(hidden.dtype)
        hidden = hidden.to(weight.device, weight.dtype)
        logits = F.linear(hidden, weight, self.bias)
        if self.lora is not None:
            A, B, scaling = self.lora
            logits = logits + scaling * F.linear(F.linear(hidden.to(A.dtype), A), B)
        logits = at_least_float(logits) * self.logit_scale
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(-1)


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


def without_adapter(model: Module) -> Any:
    """Return the transformers model inside a peft model; its layers still hold the adapter."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model


def output_embedding(model: Module) -> Any:
    """Return the module that projects hidden states to logits. Raises ValueError if there is not one."""
    inner = without_adapter(model)
    found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(found, Module):
        raise ValueError(
            "model: expected a causal language model with one output embedding (get_output_embeddings), "
            f"got {type(inner).__name__} with {type(found).__name__}"
        )
    return found


def _loaded(module: Module) -> AbstractContextManager[Any]:
    """Load the weights of a module that accelerate offloaded, as the module's own forward does."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _quantised(module: Any) -> QuantizedHead | None:
    """Return the head of a frozen layer that is quantised in a form that the ops read; None for others."""
    weight = getattr(module, "weight", None)
    if weight is None or hasattr(weight, "full_tensor"):
        return None
    try:
        held = stored_head("weight", head_of_layer(module))
    except (TypeError, ValueError):
        return None  # refused as a tensor of its type
    return held if isinstance(held, QuantizedHead) else None


def _plain(kind: str, name: str, tensor: Any) -> Tensor | None:
    """Gather a DTensor; return any other plain tensor as it is. Raises ValueError for a quantised one."""
    if tensor is None:
        return None
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    plain = type(tensor) in (Tensor, torch.nn.Parameter) or hasattr(tensor, "ds_shape")
    if not plain or not tensor.is_floating_point() or tensor.element_size() < 2:
        what = str(tensor.dtype) if plain else type(tensor).__name__
        raise ValueError(
            f"model: expected a head that is not quantised (leave it out of the quantisation), "
            f"got {kind} with a {name} of {what}"
        )
    if tensor.is_meta:
        raise ValueError(f"model: expected a head with values, got {kind} with a {name} on the meta device")
    return tensor


def _number(inner: Any, *names: str) -> float | None:
    """Return the first of these entries that the model's config sets. Raises ValueError for a non-number."""
    config = inner.config.get_text_config()
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(
                f"model: expected a number or None as {name} in the config of {type(inner).__name__}, "
                f"got {value!r}"
            )
        if name not in ELSEWHERE.get(config.model_type, ()):
            return float(value)
    return None


def _logit_scale(inner: Any) -> float:
    scale, factor = _number(inner, *SCALES), _number(inner, DIVISOR)
    if scale is not None:
        return scale
    if factor is None:
        return 1.0
    return factor if inner.config.get_text_config().model_type == "hyperclovax" else 1.0 / factor


def at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
