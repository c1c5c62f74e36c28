"""AdamW with fp32 masters of 16-bit weights.

A bf16 weight of .02 moves in steps of 1e-4, so that an update of 1e-6 is lost when it is added to it. Updates
are added to an fp32 master, of which the weight is the nearest bf16 number. Own code: torch's AdamW has no
masters, and those of apex and Transformer Engine need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose parameters are the masters: fp32 copies of 16-bit weights, and any other weight itself.

    `masters` maps each weight of the model to its master. `collect` after each backward keeps the sum of
    several in fp32, and brings the gradients to where they are clipped. `step` rounds the masters into the
    weights.
    """

    def __init__(self, weights: Iterable[Parameter], **options: Any):
        masters: dict[Tensor, Tensor] = {weight: _master(weight) for weight in weights}
        super().__init__(masters.values(), **options)
        self.masters = masters

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of 16-bit weights to those of their masters, in fp32, and drop them."""
        for weight, master in self._rounded():
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.to(master.dtype)
            else:
                master.grad += weight.grad
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Collect what backward left, update the masters, and round them into the weights."""
        self.collect()
        loss = super().step(closure)
        for weight, master in self._rounded():
            weight.copy_(master)
        return loss

    def _rounded(self) -> list[tuple[Tensor, Tensor]]:
        return [(weight, master) for weight, master in self.masters.items() if weight is not master]


def _master(weight: Parameter) -> Tensor:
    if weight.element_size() > 2:
        return weight
    return weight.detach().float().requires_grad_()
