"""TRL's trainers of a teacher behind a vLLM server: ServerDistillationTrainer, AsyncDistillationTrainer."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental import server_distillation
from trl.experimental.async_distillation import async_distillation_trainer as async_distillation

from opsd_kernels.integrations.transformers import Head
from opsd_kernels.spec import expect, interpolation
from opsd_kernels.topk import linear_topk_divergence

from .base import TAILS, FusedLoss, completion


class ServerDistillationTrainer(FusedLoss, server_distillation.ServerDistillationTrainer):
    """TRL's ServerDistillationTrainer, which holds the student's logits of prompts and completions.

    Tool outputs are left out, which TRL learns from (`tool_mask`). As in TRL a micro-batch is divided by its
    own number of tokens.
    """

    local_teacher = False
    beta: float
    loss_add_tail: bool

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens, attended, width = completion(inputs)
        labels = tokens.masked_fill(attended == 0, -100)
        start = tokens.shape[1] - width
        labels[:, :start] = -100
        asked = {"input_ids": tokens, "attention_mask": attended, "labels": labels}
        asked["prompt_attention_mask"] = inputs["prompt_mask"]
        teacher = self._get_teacher_token_logprobs_from_server(asked, start)
        labels = labels[:, start:]
        if inputs.get("tool_mask") is not None:
            labels = labels.masked_fill(inputs["tool_mask"] == 0, -100)
        loss = self._wrapped(model, self._loss, (tokens, attended, width), teacher, labels)
        loss = loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)
        return (loss, {}) if return_outputs else loss

    def _loss(self, model: nn.Module, rows: Any, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        hidden, head = self._side(model, *rows)
        scored = teacher["actual_logprobs"].shape[1]
        hidden, labels = hidden[:, :scored], labels[:, :scored].to(hidden.device)
        ids, logprobs = (x.to(hidden.device) for x in self._list(teacher, labels))
        options = {**interpolation(self.beta), "tail": TAILS[self.loss_add_tail], "labels": labels}
        return self._call(linear_topk_divergence, {"student": (hidden, head)}, ids, logprobs, **options)

    def _list(self, teacher: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the list: the server's top k for a forward KL, else its likeliest and the sampled token."""
        tops, top_ids = teacher["topk_logprobs"], teacher["topk_token_ids"]
        if self.beta == 0:
            return top_ids, tops
        own, own_ids = teacher["actual_logprobs"][..., None], labels.clamp(min=0)[..., None].to(tops.device)
        valid = labels[..., None].to(tops.device) != -100
        needed = [("actual-token", own)] + [("top-1", tops)] * (self.beta < 1)
        for name, values in needed:
            missing = int((valid & ~values.isfinite()).sum())
            expected = f"the {name} log-prob of every completion token"
            expect(missing == 0, "teacher server", expected, f"{missing} without")
        if self.beta == 1:
            return own_ids, own
        again = own_ids == top_ids
        return torch.cat([top_ids, own_ids], -1), torch.cat([tops, own.masked_fill(again, -math.inf)], -1)


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
        sums = [x.sum() for x in (stats.divergence, stats.student_entropy, entropies)]
        parts = torch.zeros(teachers, 3, device=hidden.device)
        if teacher_index is not None:
            each = torch.stack([torch.ones_like(entropies), stats.divergence, entropies], -1)
            parts.index_add_(0, teacher_index, each.to(parts.dtype))
        return loss, *sums, parts.flatten()


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
