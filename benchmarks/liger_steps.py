"""Liger's chunked JSD loss and ours under its name: time and peak memory by steps.py.

    python benchmarks/liger_steps.py [--rounds 3] [--tokens 64] [--dtype float32 --dtype bfloat16]
        [--json FILE]

A step is the loss of one batch and the gradients of hidden states and head. Liger's loss runs with its
defaults: compiled, chunks of 1024 tokens. Its Triton loss, `LigerFusedLinearJSD`, needs a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from steps import HIDDEN, SEQUENCES, Integration, V, lengths, main
from torch import Tensor

SETTINGS = {
    "JSD with cross-entropy": {},
    "the same at temperature 2": {"temperature": 2.0},
    "JSD alone": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
}
ROWS = {
    "JSD with cross-entropy": "a half of each, beta 0.5",
    "the same at temperature 2": "which divides the logits of the JSD alone",
    "JSD alone": "beta 0.5",
}


def build(
    name: str, side: str, dtype: str, folder: str, fp32: bool
) -> tuple[list[Tensor], Callable[[int], Callable[[], Tensor]]]:
    """Return the leaves and the loss of one side (steps.Build)."""
    warnings.simplefilter("ignore")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from opsd_kernels.integrations import liger

    gen = torch.Generator().manual_seed(0)
    kept = torch.float32 if fp32 else getattr(torch, dtype)

    def drawn(rows: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, HIDDEN, generator=gen)).to(getattr(torch, dtype)).to(kept)

    student, teacher = drawn(V, 0.1).requires_grad_(), drawn(V, 0.1)
    loss_of = (LigerFusedLinearJSDLoss if side == "liger" else liger.LigerFusedLinearJSDLoss)(
        **SETTINGS[name]
    )
    leaves = [student]

    def losses(tokens: int) -> Callable[[], Tensor]:
        gen.manual_seed(1)
        states, others = drawn(SEQUENCES * tokens, 1.0).requires_grad_(), drawn(SEQUENCES * tokens, 1.0)
        labels = torch.where(
            torch.arange(tokens) < lengths(tokens)[:, None],
            torch.randint(V, (SEQUENCES, tokens), generator=gen),
            -100,
        ).flatten()
        leaves[1:] = [states]
        return lambda: loss_of(states, student, others, teacher, labels)

    return leaves, losses


# torch.compile specialises on sizes: after a warm-up step of another size the measured step would compile
# again.
INTEGRATION = Integration("liger", "Liger", ROWS, build, warm_tokens=None)

if __name__ == "__main__":
    main(INTEGRATION)
