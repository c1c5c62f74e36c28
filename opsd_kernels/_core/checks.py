"""Check arguments: types, shapes, dtypes, devices, masks, padded vocabularies.

Every error names the argument, the expected value and the actual one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import expect
from .planner import DTYPES


def check_types(prefix: str, hidden: object, weight: object, bias: object) -> None:
    """Raise TypeError for an argument that is not a tensor. `prefix` ("student_") starts its name."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        expect(isinstance(value, Tensor), prefix + name, "a tensor", type(value).__name__, TypeError)
    good = bias is None or isinstance(bias, Tensor)
    expect(good, f"{prefix}bias", "a tensor or None", type(bias).__name__, TypeError)


def check_side(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, name: str
) -> None:
    """Check shapes, and dtype and device against the hidden states `first`, the argument `name`."""
    expect(hidden.dim() >= 1, f"{prefix}hidden", "shape (..., H)", tuple(hidden.shape))
    good = weight.dim() == 2 and min(weight.shape) >= 1
    expect(good, f"{prefix}weight", "shape (V, H) with V, H >= 1", tuple(weight.shape))
    expected = f"(..., {weight.shape[1]}), the hidden size of {prefix}weight"
    expect(hidden.shape[-1] == weight.shape[1], f"{prefix}hidden", expected, tuple(hidden.shape))
    if bias is not None:
        expect(
            bias.shape == weight.shape[:1], f"{prefix}bias", f"shape ({weight.shape[0]},)", tuple(bias.shape)
        )
    expect(first.dtype in DTYPES, name, "float64, float32, bfloat16 or float16", first.dtype, TypeError)
    for part, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            argument = prefix + part
            expect(
                tensor.device == first.device,
                argument,
                f"a tensor on {first.device}, as {name}",
                tensor.device,
            )
            same = tensor.dtype == first.dtype or (part == "bias" and tensor.is_floating_point())
            expect(same, argument, f"dtype {first.dtype}, as {name}", tensor.dtype, TypeError)


def per_token(name: str, value: Any, leading: torch.Size, device: torch.device) -> Tensor:
    """Return a tensor of one entry per token, flat and detached."""
    expect(isinstance(value, Tensor), name, "a tensor or None", type(value).__name__, TypeError)
    expect(value.shape == leading, name, f"shape {tuple(leading)}, one entry per token", tuple(value.shape))
    expect(value.device == device, name, f"a tensor on {device}, as the hidden states", value.device)
    return value.detach().reshape(-1)


def valid_tokens(
    hidden: Tensor, labels: Tensor | None, ignore_index: int, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return valid, (N,) bool or None for all, and labels, (N,) or None, for hidden states (..., H)."""
    expect(isinstance(ignore_index, int), "ignore_index", "an int", type(ignore_index).__name__, TypeError)
    valid = None
    if labels is not None:
        labels = per_token("labels", labels, hidden.shape[:-1], hidden.device)
        expect(labels.dtype == torch.int64, "labels", "dtype int64", labels.dtype, TypeError)
        valid = labels != ignore_index
    if mask is not None:
        mask = per_token("mask", mask, hidden.shape[:-1], hidden.device).bool()
        valid = mask if valid is None else valid & mask
    return valid, labels


def listed_support(
    ids: Any, logprobs: Any, leading: torch.Size, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ids and log-probs of a teacher's top-k entries, (N, K) each.

    Padding, which has log-prob -inf, and all entries of invalid tokens get id 0 and log-prob -inf.
    """
    for name, value in (("teacher_topk_ids", ids), ("teacher_topk_logprobs", logprobs)):
        expect(isinstance(value, Tensor), name, "a tensor", type(value).__name__, TypeError)
        shaped = value.dim() == len(leading) + 1 and value.shape[:-1] == leading and value.shape[-1] >= 1
        expect(shaped, name, f"shape ({', '.join(map(str, leading))}, K) with K >= 1", tuple(value.shape))
    expect(ids.dtype == torch.int64, "teacher_topk_ids", "dtype int64", ids.dtype, TypeError)
    expect(
        logprobs.is_floating_point(),
        "teacher_topk_logprobs",
        "a floating-point tensor",
        logprobs.dtype,
        TypeError,
    )
    expect(
        ids.shape == logprobs.shape,
        "teacher_topk_logprobs",
        f"shape {tuple(ids.shape)}, as teacher_topk_ids",
        tuple(logprobs.shape),
    )
    ids, logprobs = ids.detach().reshape(-1, ids.shape[-1]), logprobs.detach().reshape(-1, ids.shape[-1])
    counted = (logprobs > -torch.inf) if valid is None else (logprobs > -torch.inf) & valid[:, None]
    return torch.where(counted, ids, 0), torch.where(counted, logprobs, -torch.inf)


def vocabulary(V_s: int, V_t: int | None, vocab_size: int | None) -> int:
    """Return the number of columns in use. `V_t` is None for a single head."""
    if vocab_size is None:
        expect(
            V_t in (V_s, None),
            "vocab_size",
            f"a size <= {min(V_s, V_t or V_s)}, since student_weight has {V_s} rows and teacher_weight {V_t}",
            None,
        )
        return V_s
    least = min(V_s, V_t or V_s)
    expect(
        isinstance(vocab_size, int) and not isinstance(vocab_size, bool),
        "vocab_size",
        "an int or None",
        type(vocab_size).__name__,
        TypeError,
    )
    expect(
        1 <= vocab_size <= least,
        "vocab_size",
        f"a size in [1, {least}], the rows of the smaller head",
        vocab_size,
    )
    return vocab_size
