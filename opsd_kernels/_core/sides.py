"""Compare the heads of the sides of a call, and give the sides their dtypes. A side is a problem.Side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def autocast(sides: list[Any], shared: bool) -> list[Any]:
    """Cast hidden states and weights to the autocast dtype. A shared head is cast once and stays shared."""
    dtype = torch.get_autocast_dtype(sides[0].hidden.device.type)

    def cast(x: Tensor, quantised: bool = False) -> Tensor:
        return x if quantised or x.dtype == torch.float64 else x.to(dtype)

    done = [
        replace(side, hidden=cast(side.hidden), weight=cast(side.weight, side.quantised is not None))
        for side in sides
    ]
    return [done[0], replace(done[1], weight=done[0].weight)] if shared else done


def mixed(sides: list[Any], shared: bool) -> tuple[list[Any], torch.dtype]:
    """Return the sides with the student's rows in the dtype of its GEMMs, and the dtype of the logits.

    Each side is projected in its own dtype into buffers of the widest one. With one head, of which the
    difference GEMM takes both sides' rows, and in float64, to which no product of fp32 factors goes, both
    sides take the widest.
    """
    widest = sides[0].dtype if len(sides) == 1 else torch.promote_types(sides[0].dtype, sides[1].dtype)
    own = widest if shared or widest == torch.float64 else sides[0].dtype
    return [replace(sides[0], hidden=sides[0].hidden.to(own)), *sides[1:]], widest


def same_head(one: Any, other: Any) -> bool:
    """Return True if the heads of two sides are the same memory."""
    if not same_storage(one.weight, other.weight):
        return False
    held = one.quantised, other.quantised
    if held[0] is None or held[1] is None or held[0] is held[1]:
        return held[0] is held[1]
    zeros = [head.zero_points for head in held if head is not None and head.zero_points is not None]
    return (
        held[0].block == held[1].block
        and same_storage(held[0].scales, held[1].scales)
        and (not zeros or (len(zeros) == 2 and same_storage(*zeros)))
    )


def same_storage(a: Tensor, b: Tensor | None) -> bool:
    """Return True if two tensors are the same view of the same memory."""
    if b is None or a is b:
        return a is b
    layout = a.data_ptr(), a.shape, a.stride(), a.dtype, a.device
    return layout == (b.data_ptr(), b.shape, b.stride(), b.dtype, b.device)
