"""Read what peft puts on a head: a low-rank adapter (LoRA, arXiv:2106.09685), or a trained copy of the layer.

peft itself is not imported: its layers are known by their attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .spec import Adapter, expect


def base_and_adapter(head: nn.Module, name: str) -> tuple[Any, Adapter | None]:
    """Return the linear layer of a head, and its adapter (A, B, scaling) in use, or None.

    Of several active adapters A and B are stacked. A disabled or merged one is None: the layer's weight is
    then the whole head. Gradients of A and B flow to peft's parameters. Raises ValueError, with `name` as the
    argument's name, for an adapter that is no plain LoRA: with dropout in training mode, with a bias, or a
    variant of it such as DoRA, or AdaLoRA, whose third factor is no number.
    """
    layer: Any = head
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        active = [key for key in layer.active_adapters if key in layer.modules_to_save]
        in_use = bool(active) and not layer.disable_adapters
        layer = layer.modules_to_save[active[0]] if in_use else layer.original_module
    if not hasattr(layer, "base_layer"):
        return layer, None
    expected = "a linear layer, alone or under peft's LoRA"
    kind = f"{type(layer).__module__}.{type(layer).__name__}"  # peft has many a `Linear`
    expect(hasattr(layer, "lora_A") and not hasattr(layer, "lora_E"), name, expected, kind)
    if layer.disable_adapters:
        expect(not layer.merged, name, "a disabled adapter that is not merged", "a merged one")
        return layer.base_layer, None
    used = [] if layer.merged else [key for key in layer.active_adapters if key in layer.lora_A]
    parts = [_plain_lora(layer, key, name) for key in used]
    if len(parts) <= 1:
        return layer.base_layer, parts[0] if parts else None
    A = torch.cat([A for A, _, _ in parts])
    return layer.base_layer, (A, torch.cat([scaling * B for _, B, scaling in parts], 1), 1.0)


def _plain_lora(layer: Any, key: str, name: str) -> Adapter:
    """Return (A, B, scaling) of the adapter `key`. Raises ValueError if it is more than that."""
    variant = getattr(layer, "lora_variant", {}).get(key)
    came = f"the adapter {key!r} of {type(layer).__name__} with "
    expect(variant is None, name, "a plain LoRA on the head", came + type(variant).__name__)
    dropout = getattr(layer.lora_dropout[key], "p", 0.0)
    active = dropout > 0 and layer.lora_dropout[key].training
    expect(not active, name, "an adapter without dropout (lora_dropout=0)", f"{came}dropout {dropout}")
    A, B = layer.lora_A[key], layer.lora_B[key]
    expect(A.bias is None and B.bias is None, name, "an adapter without a bias", came + "lora_bias")
    return A.weight, B.weight, float(layer.scaling[key])
