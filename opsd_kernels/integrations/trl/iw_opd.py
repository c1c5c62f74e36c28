"""TRL's IWOPDTrainer: importance-weighted on-policy distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental import iw_opd

from opsd_kernels.divergence import linear_divergence
from opsd_kernels.logprobs import linear_logprobs
from opsd_kernels.objectives import OnPolicyDistillation, linear_policy_divergence
from opsd_kernels.spec import expect, interpolation
from opsd_kernels.topk import linear_topk_divergence
from opsd_kernels.weights import PrefixDiscrepancy

from .base import TAILS, FusedLoss, Side


class IWOPDTrainer(FusedLoss, iw_opd.IWOPDTrainer):
    """TRL's IWOPDTrainer, with both of its objectives.

    The loss is divided by the completion tokens of the optimisation step, which TRL's is not.
    """

    def _check_settings(self) -> None:
        union = self.distillation_objective == "jsd" and 0 < self.beta < 1 and self.loss_top_k > 0
        expect(
            not union,
            "loss_top_k",
            "0 where 0 < beta < 1: the fused loss does not support the union of two top-k lists",
            self.loss_top_k,
        )
        expect(
            self.compute_metrics is None,
            "compute_metrics",
            "None: there are no logits to compute metrics of",
            self.compute_metrics,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        self._raise_if_local_teacher_tokenizer_mismatch()
        # transformers counted the tokens of the data set's completions, before sampling.
        if self.model.training and self._buffered_inputs is not None:
            count = sum((part["labels"] != -100).sum() for part in self._buffered_inputs)
            total = self.accelerator.gather(count).sum().clamp(min=1)
            num_items_in_batch = total / self.accelerator.num_processes
        start = self._compute_prompt_length(inputs)
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"].shape[1] - start)
        teacher = self._teacher_side(*rows)
        names = ("input_ids", "labels", "rollout_logprobs")
        tokens = {name: inputs[name][:, start:] for name in names if name in inputs}
        loss = self._wrapped(model, self._loss, rows, teacher, tokens, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _loss(
        self,
        model: nn.Module,
        rows: tuple[Any, ...],
        teacher: Side,
        tokens: dict[str, Any],
        count: Tensor | int | None,
    ) -> Tensor:
        student, labels, k = self._side(model, *rows), tokens["labels"], self.loss_top_k
        sides, mask = {"student": student, "teacher": teacher}, labels != -100
        tail = TAILS[self.loss_add_tail]
        options: dict[str, Any] = {"labels": labels, "normalizer": count}
        if self.distillation_objective == "iw_opd":
            policy = OnPolicyDistillation(
                weights=PrefixDiscrepancy(self.iw_opd_gamma), old_logprobs=tokens.get("rollout_logprobs")
            )
            options |= {"policy": policy, "policy_weight": 1.0, "return_stats": True}
            loss, stats = self._call(linear_policy_divergence, sides, **options)
            rewards: Any = policy.weighted_rewards(stats.student_logprob, stats, mask)
            self._log_rewards(*(x[mask] for x in rewards))
            return loss
        options |= interpolation(self.beta)
        if self.beta == 1 and k == 1 and self.reverse_kl_top_1_mode == "sampled":
            # The sampled token and the rest, as in a teacher's list of one entry.
            with torch.no_grad():
                listed = self._call(linear_logprobs, {"": teacher}, tokens["input_ids"], mask=mask)
            entry = tokens["input_ids"][..., None], listed[..., None]
            return self._call(linear_topk_divergence, {"student": student}, *entry, tail=tail, **options)
        if 0 < k < student[1].weight.shape[0]:
            side = "student" if self.beta == 1 else "teacher"
            options |= {"topk": k, "topk_support": side, "topk_tail": tail}
        return self._call(linear_divergence, sides, **options)

    def _log_rewards(self, rewards: Tensor, weights: Tensor) -> None:
        expect(
            bool(rewards.isfinite().all()),
            "teacher_model",
            "a finite log-prob of every sampled token",
            rewards[~rewards.isfinite()].tolist(),
        )
        if not len(rewards):
            return
        logged = {"mean_advantage": rewards * weights, "mean_abs_advantage": rewards.abs()}
        logged |= {"mean_weight": weights, "min_weight": weights.min(), "max_weight": weights.max()}
        for name, value in logged.items():
            self._log(f"iw_opd/{name}", value)
