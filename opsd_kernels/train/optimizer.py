"""AdamW with fp32 masters of 16-bit weights.

A bf16 weight of .02 moves in steps of 1e-4, so that an update of 1e-6 is lost when it is added to it. Updates
are added to an fp32 master, of which the weight is the nearest bf16 number. Own code: torch's AdamW has no
masters, and those of apex and Transformer Engine need CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer


class MasterAdamW(AdamW):
    """AdamW over fp32 masters of 16-bit weights and over the other weights themselves.

    `masters` maps each 16-bit weight of the model to its master, a parameter of the optimiser. `step` rounds
    the masters into the weights.
    """

    def __init__(self, weights: Iterable[Parameter], **options: Any):
        weights = list(weights)
        masters: dict[Tensor, Tensor] = {
            weight: weight.detach().float().requires_grad_()
            for weight in weights
            if weight.element_size() == 2
        }
        super().__init__([masters.get(weight, weight) for weight in weights], **options)
        self.masters = masters

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Collect what backward left, update the masters, and round them into the weights."""
        collect_gradients(self)
        loss = super().step(closure)
        for weight, master in self.masters.items():
            weight.copy_(master)
        return loss


def masters_of(optimizer: Optimizer) -> Mapping[Tensor, Tensor]:
    """Return the masters by weight; none for an optimiser of another kind."""
    return optimizer.masters if isinstance(optimizer, MasterAdamW) else {}


@torch.no_grad()
def collect_gradients(optimizer: Optimizer) -> None:
    """Move the gradients of 16-bit weights to their masters, where those of several backward passes add up.

    Afterwards the optimiser's parameters have all gradients, to be summed over ranks and clipped.
    """
    for weight, master in masters_of(optimizer).items():
        if weight.grad is None:
            continue
        if master.grad is None:
            master.grad = weight.grad.to(master.dtype)
        else:
            master.grad += weight.grad
        weight.grad = None
