"""TRL's ServerDistillationTrainer: a teacher behind a vLLM server."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental import server_distillation

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
        # An id that comes again counts once.
        return torch.cat([top_ids, own_ids], -1), torch.cat([tops, own], -1)
