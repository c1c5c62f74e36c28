"""Define a frozen head that is held as small values and scales, and read the forms that others give it.

The row v of the head is (values[v] - zero_points) * scales, with the scale and the zero point of the block
that an entry lies in. The ops form a slice of it at a time (_core/sliced_head.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import PLAIN, check_tensor, expect

VALUES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_NAMES = "float8_e4m3fn, float8_e5m2 or int8"


@dataclass(frozen=True, eq=False)
class QuantizedHead:
    """Hold a frozen LM head (V, H) as values of eight bits or fewer, and scales in any floating-point dtype.

    * `values`: (V, H) float8_e4m3fn, float8_e5m2 or int8. Values of fewer bits lie in an int8 each.
    * `scales`: one per row, (V,) or (V, 1), or one per block of (b, c) entries, (ceil(V / b), ceil(H / c)),
      which a value is multiplied by: the `weight_scale_inv` of DeepSeek-V3's checkpoints and transformers.
    * `zero_points`: subtracted from int8 values before, in the shape of `scales`; None for 0.
    * `block_size`: (b, c). None takes it from the shapes, which must then divide without a remainder.

    It stands for a weight where the ops take a teacher's or a frozen student's head. The same object on both
    sides, or two of the same tensors, make a shared head. No gradient flows to it. Raises ValueError or
    TypeError for tensors that do not fit each other.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        values, scales, zeros = self.values, self.scales, self.zero_points
        check_tensor("values", values)
        check_tensor("scales", scales)
        expect(values.dtype in VALUES, "values", f"dtype {_NAMES}", values.dtype, TypeError)
        good = values.dim() == 2 and min(values.shape) >= 1
        expect(good, "values", "shape (V, H) with V, H >= 1", tuple(values.shape))
        floating = scales.is_floating_point() and scales.element_size() > 1
        expect(floating, "scales", "a floating-point tensor of 16 bits or more", scales.dtype, TypeError)
        V, H = values.shape
        shape = tuple(scales.shape) if scales.dim() != 1 else (scales.shape[0], 1)
        if self.block_size is None:
            divides = len(shape) == 2 and min(shape) >= 1 and V % shape[0] == 0 and H % shape[1] == 0
            expected = f"shape ({V},), ({V}, 1), or that of a grid that divides {(V, H)}, or a block_size"
            expect(divides, "scales", expected, tuple(scales.shape))
            object.__setattr__(self, "block_size", (V // shape[0], H // shape[1]))
        rows, columns = self.block
        grid = (-(-V // rows), -(-H // columns))
        expected = f"shape {grid}, blocks of {(rows, columns)} in {(V, H)}"
        expect(shape == grid, "scales", expected, tuple(scales.shape))
        none = zeros is None or values.dtype == torch.int8
        expect(none, "zero_points", "None beside float8 values", f"those of {values.dtype}")
        for name, tensor in (("scales", scales), ("zero_points", zeros)):
            if tensor is not None:
                same = tensor.shape == scales.shape
                expect(same, name, f"shape {tuple(scales.shape)}, as scales", tuple(tensor.shape))
                expect(tensor.device == values.device, name, f"a tensor on {values.device}", tensor.device)
            object.__setattr__(self, name, None if tensor is None else tensor.detach().reshape(grid))
        expect(not values.requires_grad, "values", "a frozen head", "one that requires a gradient")

    @property
    def block(self) -> tuple[int, int]:
        """Return rows and columns of a block."""
        size = self.block_size
        good = isinstance(size, (tuple, list)) and len(size) == 2 and min(size) >= 1
        expect(good, "block_size", "(rows, columns) of a block", size)
        assert size is not None
        return int(size[0]), int(size[1])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the entries at (rows, columns), (n,) each, in fp32."""
        height, width = self.block
        at = rows.div(height, rounding_mode="floor"), columns.div(width, rounding_mode="floor")
        values = self.values[rows, columns].float()
        values = values if self.zero_points is None else values - self.zero_points[at].float()
        return values * self.scales[at].float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole head (V, H), rounded once to `dtype`. The ops never form it."""
        (V, H), (rows, columns) = self.shape, self.block
        wide = torch.promote_types(dtype, torch.float32)

        def per_entry(grid: Tensor) -> Tensor:
            return grid.to(wide).repeat_interleave(rows, 0)[:V].repeat_interleave(columns, 1)[:, :H]

        values = self.values.to(wide)
        values = values if self.zero_points is None else values - per_entry(self.zero_points)
        return (values * per_entry(self.scales)).to(dtype)


def stored_head(name: str, weight: Any) -> Any:
    """Return a weight as a QuantizedHead if it is one of torchao's tensors, else as it is.

    torchao itself is not imported: its tensors are known by their parts. Raises TypeError, with `name` as the
    argument's name, for one whose parts are packed for the kernels of a device.
    """
    kind = type(weight)
    if kind in PLAIN or not kind.__module__.startswith("torchao."):
        return weight
    expected = "a tensor, a QuantizedHead or a torchao tensor of int8 or float8 values and scales"
    parts: Any = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    block: Any = getattr(weight, "block_size", None)
    held = all(isinstance(part, Tensor) for part in parts) and block is not None
    plain = held and parts[0].dtype in VALUES and parts[0].shape == weight.shape
    expect(plain, name, expected, kind.__name__, TypeError)
    expect(not weight.requires_grad, name, "a frozen head if it is quantised", "one that requires a gradient")
    zeros = getattr(weight, "zero_point", None)
    grid = tuple(-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    zeros = None if zeros is None else zeros.reshape(grid)
    return QuantizedHead(parts[0], parts[1].reshape(grid), zeros, tuple(block))


# Of a float8 linear layer: what its weight is multiplied by, for blocks in the first, else for rows or all.
LAYER_SCALES = ("weight_scale_inv", "weight_scale")


def head_of_layer(layer: Any) -> Any:
    """Return the weight of a linear layer, as a QuantizedHead if the layer holds scales beside float8 values.

    So do the FP8 layers of transformers, whose blocks are of `layer.block_size`. Their own forward quantises
    its inputs too, which the ops do not.
    """
    weight = layer.weight
    scales = next((x for name in LAYER_SCALES if (x := getattr(layer, name, None)) is not None), None)
    if scales is None or weight.dtype not in VALUES:
        return weight
    by_rows = scales.dim() < 2 or scales.shape[1] == 1
    block = None if by_rows else getattr(layer, "block_size", None)
    return QuantizedHead(weight, scales.reshape(1, 1) if scales.dim() == 0 else scales, None, block)
