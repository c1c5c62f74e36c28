"""TRL's trainers of a model that is its own teacher: SDPOTrainer and SDFTTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental import sdft, sdpo

from opsd_kernels.divergence import linear_divergence
from opsd_kernels.integrations.transformers import scoring
from opsd_kernels.logprobs import linear_logprobs
from opsd_kernels.objectives import Mix, OnPolicyDistillation, PPOClip, linear_policy_divergence
from opsd_kernels.spec import expect, interpolation
from opsd_kernels.weights import Given, ImportanceRatio

from .base import TAILS, FusedLoss, Side, completion


def _of_sequences(values: Tensor, mask: Tensor) -> Tensor:
    """Return TRL's mean of sequence means, in which a sequence without a valid token counts as 0."""
    return (torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


class _SelfDistillation(FusedLoss):
    """The loss of both trainers. `share` is the divergence's, the rest a policy term's."""

    _name: str
    num_iterations: int
    _get_teacher_context_for_self_distillation: Any

    @property
    def share(self) -> float:
        return 1.0

    def _check_settings(self) -> None:
        expect(
            self.args.distillation_topk or self.args.distillation_mode != "topk_logits",
            "distillation_topk",
            "a number for 'topk_logits'",
            None,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        expect(not return_outputs, "return_outputs", "False: there are no logits to return", return_outputs)
        teacher = None
        # Before the student's forward, not inside it: the two may be one module.
        if self.share > 0:
            tokens, attended = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            rows = (tokens, attended, inputs["completion_ids"].shape[1])
            # No dropout in a target, which may be the student itself.
            with (
                torch.no_grad(),
                self._get_teacher_context_for_self_distillation(),
                scoring(self.teacher_model),
            ):
                teacher = self._wrapped(self.teacher_model, self._side, *rows)
        loss, metrics = self._wrapped(model, self._loss, teacher, inputs)
        for name, value in metrics.items():
            self._log(name, self.accelerator.gather(value.detach()))
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _compute_rollout_logps(self, **inputs: Tensor) -> Tensor | None:
        period = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % period == 0:
            return None  # the sampling policy is the updated one: a ratio of 1
        with torch.no_grad():
            sides = {"": self._wrapped(self.model, self._side, *completion(inputs))}
            return self._call(
                linear_logprobs, sides, inputs["completion_ids"], mask=inputs["completion_mask"]
            )

    def _policy(self, inputs: dict[str, Any], mask: Tensor) -> Mix:
        """Return a policy term whose mean of sequence means is TRL's policy loss."""
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, teacher: Side | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, labels = inputs["completion_mask"] != 0, inputs["completion_ids"]
        student = self._side(model, *completion(inputs))
        policy = self._policy(inputs, mask) if self.share < 1 else None
        if teacher is None:
            assert policy is not None
            logprobs = self._call(linear_logprobs, {"": student}, labels, mask=mask)
            loss = _of_sequences(policy(logprobs, None, mask), mask)
            return loss, {"self_distillation/policy_loss": loss}
        taught, weights = self._taught(inputs, mask)
        valid = taught if self.share == 1 else mask
        sampled = None
        if self.args.distillation_mode == "sampled_token":
            sampled = OnPolicyDistillation(weights=weights)
        options = self._terms(weights, sampled, policy)
        op = linear_policy_divergence if "policy" in options else linear_divergence
        options |= {"labels": labels, "mask": valid, "reduction": "sequence_mean", "return_stats": True}
        loss, stats = self._call(op, {"student": student, "teacher": teacher}, **options)
        with torch.no_grad():
            if sampled is None:
                values = stats.divergence * weights(stats, valid)
            else:
                values = sampled(stats.student_logprob, stats, valid)
            mean = torch.where(taught, values, 0.0).sum() / taught.sum().clamp(min=1)
            names = ("self_distillation", self._name.lower())
            metrics = {f"{name}/distillation_loss": mean for name in names}
            if policy is not None:
                per_token = policy(stats.student_logprob, stats, mask)
                metrics["self_distillation/policy_loss"] = _of_sequences(per_token, mask)
        return loss * valid.any(-1).float().mean(), metrics

    def _chosen(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """Return the tokens to distil, (B, T) bool."""
        raise NotImplementedError

    def _taught(self, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Any]:
        """Return the tokens to distil, (B, T) bool, and their weighting, with TRL's importance clip."""
        taught, old = self._chosen(inputs, mask), inputs.get("old_per_token_logps")
        weights, clip = Given(taught.float()), self.args.distillation_is_clip
        return taught, weights if clip is None or old is None else weights * ImportanceRatio(old, clip)

    def _terms(
        self, weights: Any, sampled: OnPolicyDistillation | None, policy: Mix | None
    ) -> dict[str, Any]:
        """Return the options of the divergence and of its policy term."""
        options = interpolation(self.args.distillation_alpha)
        if sampled is not None:
            term = sampled if policy is None else Mix(((self.share, sampled), (1 - self.share, policy)))
            return options | {"policy": term, "policy_weight": 1.0}
        topk = self.args.distillation_topk if self.args.distillation_mode == "topk_logits" else None
        tail = TAILS[self.args.distillation_add_tail]
        options |= {"token_weights": weights, "topk": topk, "topk_tail": tail}
        return options if policy is None else options | {"policy": policy, "policy_weight": 1 - self.share}


class SDPOTrainer(_SelfDistillation, sdpo.SDPOTrainer):
    """TRL's SDPOTrainer, with all sequences in one call.

    Importance clip, top-k, sampled tokens and the mix with a policy loss need no further pass over the heads.
    """

    @property
    def share(self) -> float:
        return self.args.distillation_weight

    def _check_settings(self) -> None:
        super()._check_settings()
        expect(
            self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"),
            "loss_type",
            "'grpo', 'bnpo', 'dr_grpo' or 'dapo'",
            repr(self.loss_type),
        )

    def _policy(self, inputs: dict[str, Any], mask: Tensor) -> Mix:
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        divisor = {"grpo": lengths, "dr_grpo": self.max_completion_length}.get(
            self.loss_type, mask.sum().clamp(min=1) / len(mask)
        )
        clip = (self.epsilon_low, self.epsilon_high, self.importance_sampling_level == "sequence")
        advantages = inputs["advantages"].reshape(len(mask), -1)
        term = PPOClip(advantages, inputs.get("old_per_token_logps"), *clip)
        return Mix(((lengths / divisor, term),))

    def _chosen(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        chosen = inputs.get("self_distillation_mask")
        return mask if chosen is None else mask & (chosen != 0)[:, None]


class SDFTTrainer(_SelfDistillation, sdft.SDFTTrainer):
    """TRL's SDFTTrainer. As in SDPOTrainer the teacher does not drop out, where TRL's may."""

    def _chosen(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        return mask & (torch.arange(mask.shape[1], device=mask.device) >= self.num_loss_tokens_to_skip)
