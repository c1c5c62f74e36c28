"""TRL's AsyncDistillationTrainer: rollouts and teachers behind vLLM servers."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.async_distillation import async_distillation_trainer as async_distillation

from opsd_kernels.integrations.transformers import Head
from opsd_kernels.spec import interpolation
from opsd_kernels.topk import linear_topk_divergence

from .base import TAILS, FusedLoss


class AsyncDistillationTrainer(FusedLoss, async_distillation.AsyncDistillationTrainer):
    """TRL's AsyncDistillationTrainer, which casts the whole head to fp32 in each chunk of 256 tokens.

    Only the loss of hidden states is replaced; targets, divisor and metrics are TRL's own code. The scale and
    softcap of the logits are those of the model's head, of which TRL reads some names in the config.
    """

    local_teacher = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        head = Head.of(self.accelerator.unwrap_model(self.model))
        self._transform = {"student_logit_scale": head.logit_scale, "student_softcap": head.softcap}

    def _compute_loss(self, unwrapped_model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        # TRL's function with one global exchanged; its module stays as it is.
        theirs = async_distillation.AsyncDistillationTrainer._compute_loss
        assert "_chunked_jsd_loss" in theirs.__code__.co_names
        space = {**theirs.__globals__, "_chunked_jsd_loss": self._of_valid}
        mine = FunctionType(theirs.__code__, space, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        return mine(self, unwrapped_model, inputs)

    def _of_valid(
        self,
        hidden: Tensor,  # (N, H), of the valid tokens
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        ids: Tensor,  # (N, K)
        logprobs: Tensor,  # (N, K)
        known: Tensor,  # (N, K) bool
        beta: float,
        temperature: float,
        tail: bool,
        teacher_index: Tensor | None,  # (N,)
        teachers: int,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return TRL's sums over tokens: loss, divergence, entropies of both sides, and these by teacher."""
        listed = ids.clamp(min=0), torch.where(known, logprobs, -math.inf)
        options = {**interpolation(beta), "tail": TAILS[tail], "temperature": temperature}
        options |= {"student_bias": bias, **self._transform, "reduction": "sum", **self.loss_options}
        with self.accelerator.autocast():
            loss, stats = linear_topk_divergence(hidden, weight, *listed, **options, return_stats=True)
        entropies = _entropies(listed[1], tail)
        divergence, entropy, of_teacher = (
            x.sum() for x in (stats.divergence, stats.student_entropy, entropies)
        )
        parts = torch.zeros(teachers, 3, device=hidden.device)
        if teacher_index is not None:
            each = torch.stack([torch.ones_like(entropies), stats.divergence, entropies], -1)
            parts.index_add_(0, teacher_index, each.to(parts.dtype))
        return loss, divergence, entropy, of_teacher, parts.flatten()


def _entropies(logprobs: Tensor, tail: bool) -> Tensor:
    """Return the entropy (N,) of lists (N, K) with their tail as one more entry, or renormalised."""
    logprobs = logprobs.float()
    total = logprobs.logsumexp(-1, keepdim=True)
    if tail:
        rest = torch.log(-torch.expm1(total.clamp(max=-1e-7)))
        logprobs = torch.cat([logprobs, rest], -1)
    else:
        logprobs = logprobs - total
    return torch.special.entr(logprobs.exp()).sum(-1)
