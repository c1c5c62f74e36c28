"""TRL's (1.16) `DistillationTrainer`, `SDPOTrainer` and `IWOPDTrainer` with the fused loss, without logits.

Only the methods that compute a loss from logits are overridden. The constructor raises ValueError for
settings that the fused loss does not support. docs/integrations-trl.md shows how to use them, how they differ
from TRL's, and which defects are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn
from trl.experimental import iw_opd, sdpo
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx as whole_head

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.integrations.transformers import (
    Head,
    check_head,
    forward_to_head,
    on_heads,
    padded_inputs,
    routes_by_config,
    scoring,
)
from opsd_kernels.objectives import Mix, OnPolicyDistillation, PPOClip, linear_policy_divergence
from opsd_kernels.spec import expect, interpolation
from opsd_kernels.weights import Given, ImportanceRatio, PrefixDiscrepancy

TAILS = {True: "bucket", False: "renormalize"}
# Hidden states (B, T, H) of the rows that predict the completion, and the head that projects them.
Side = tuple[Tensor, Head]


class FusedLoss:
    """Base of the three trainers.

    `loss_options` are further arguments of linear_divergence, e.g. {"workspace_bytes": 2**28}; they override
    those of TRL's config.
    """

    loss_options: ClassVar[dict[str, Any]] = {}

    # attributes of TRL's trainers
    accelerator: Any
    model: Any
    teacher_model: Any
    temperature: float
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _metrics: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # checked first: TRL's constructor waits for the server
        server = any(getattr(value, "use_teacher_server", False) for value in (*args, *kwargs.values()))
        expect(not server, "use_teacher_server", "False: the loss reads the teacher's hidden states", server)
        super().__init__(*args, **kwargs)
        self._redirect = _ForwardRedirection()
        expect(
            self.teacher_model is not None,
            "teacher_model",
            "a local model: the loss reads its hidden states",
            None,
        )
        self._check_settings()
        # DeepSpeed and FSDP may have partitioned the weights already.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_head(self.model)
            check_head(self.accelerator.unwrap_model(self.teacher_model), "teacher_model")
        expect(
            not routes_by_config(self.model),
            "model",
            "output_router_logits=False in its config, as this loss leaves out the routers' auxiliary loss",
            True,
        )

    def _check_settings(self) -> None:
        """Raise ValueError for settings of the trainer that the fused loss does not support."""

    def _states(
        self, model: nn.Module, tokens: Tensor, attended: Tensor, length: int, **images: Any
    ) -> Tensor:
        """Return hidden states (B, length, H) of the rows that predict the last `length` tokens."""
        inputs: Mapping[str, Any] = {"input_ids": tokens, "attention_mask": attended, **images}
        # Sharded weights cannot be tried from inside the forward of their wrapper.
        if not (images or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            inputs = padded_inputs(model, inputs, "model")
        # Not model(...): the hooks of its wrapper run already.
        return forward_to_head(model, inputs, model.forward)[0][:, -length - 1 : -1]

    def _side(self, model: nn.Module, *rows: Any, **images: Any) -> Side:
        """Run inside the forward of `model`'s wrapper.

        The redirection replaced the forward in which accelerate enters autocast, hence autocast here.
        """
        head = Head.of(model)
        with self.accelerator.autocast():
            return self._states(model, *rows, **images).to(head.weight.device), head

    def _wrapped(self, model: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `method` as the forward of the model's wrapper, so that the hooks of DDP and FSDP fire."""
        inner = self.accelerator.unwrap_model(model)
        return self._redirect(model, inner, method, inner, *args, **kwargs)

    def _call(self, op: Any, sides: dict[str, Side], *tensors: Tensor, **options: Any) -> Any:
        options |= {
            name: value
            for name, value in self.loss_options.items()
            if "" not in sides or name in signature(op).parameters
        }
        with (
            whole_head(*(part for _, head in sides.values() for part in head.parameters())),
            self.accelerator.autocast(),
        ):
            return on_heads(op, sides, *tensors, temperature=self.temperature, **options)

    def _log(self, name: str, value: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics[name].append(value.detach().float().mean().item())


def _completion(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    tokens, attended = (
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")
    )
    return tokens, attended, inputs["completion_ids"].shape[1]


def _of_sequences(values: Tensor, mask: Tensor) -> Tensor:
    """Return TRL's mean of sequence means, in which a sequence without a valid token counts as 0."""
    return (torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


class DistillationTrainer(FusedLoss, trl.DistillationTrainer):
    """TRL's DistillationTrainer in four passes over the heads instead of six (KL) or eight (JSD)."""

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What TRL's own forward takes beside the tokens: images.
        known = signature(trl.DistillationTrainer._get_last_hidden_state).parameters
        images = {name: inputs[name] for name in known if inputs.get(name) is not None}
        student = self._side(unwrapped_student, *_completion(inputs), **images)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self._wrapped(self.teacher_model, self._side, *_completion(inputs), **images)
        labels, mask = (
            x.to(student[0].device)
            for x in (inputs["completion_ids"], inputs["completion_mask"] * inputs.get("tool_mask", 1))
        )
        options = {
            **interpolation(self.beta),
            "labels": labels,
            "mask": mask,
            "normalizer": num_items_in_batch,
        }
        sides = {"student": student, "teacher": teacher}
        loss, stats = self._call(linear_divergence, sides, **options, return_stats=True)
        return loss, stats.student_entropy.sum(), mask.sum()


class SDPOTrainer(FusedLoss, sdpo.SDPOTrainer):
    """TRL's SDPOTrainer, with all sequences in one call.

    Importance clip, top-k, sampled tokens and the mix with a policy loss need no further pass over the heads.
    """

    def _check_settings(self) -> None:
        expect(
            self.args.distillation_topk or self.args.distillation_mode != "topk_logits",
            "distillation_topk",
            "a number for 'topk_logits'",
            None,
        )
        expect(
            self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"),
            "loss_type",
            "'grpo', 'bnpo', 'dr_grpo' or 'dapo'",
            repr(self.loss_type),
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
        if self.args.distillation_weight > 0:
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
            sides = {"": self._wrapped(self.model, self._side, *_completion(inputs))}
            return self._call(
                linear_logprobs, sides, inputs["completion_ids"], mask=inputs["completion_mask"]
            )

    def _policy(self, inputs: dict[str, Any], mask: Tensor) -> Mix:
        """Return a policy term whose mean of sequence means is TRL's policy loss."""
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        divisor = {"grpo": lengths, "dr_grpo": self.max_completion_length}.get(
            self.loss_type, mask.sum().clamp(min=1) / len(mask)
        )
        clip = (self.epsilon_low, self.epsilon_high, self.importance_sampling_level == "sequence")
        advantages = inputs["advantages"].reshape(len(mask), -1)
        term = PPOClip(advantages, inputs.get("old_per_token_logps"), *clip)
        return Mix(((lengths / divisor, term),))

    def _loss(
        self, model: nn.Module, teacher: Side | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, labels = inputs["completion_mask"] != 0, inputs["completion_ids"]
        share = self.args.distillation_weight
        student = self._side(model, *_completion(inputs))
        policy = self._policy(inputs, mask) if share < 1 else None
        if teacher is None:
            assert policy is not None
            logprobs = self._call(linear_logprobs, {"": student}, labels, mask=mask)
            loss = _of_sequences(policy(logprobs, None, mask), mask)
            return loss, {"self_distillation/policy_loss": loss}
        taught, weights = self._taught(inputs, mask)
        valid = taught if share == 1 else mask
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

    def _taught(self, inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Any]:
        """Return the tokens to distil, (B, T) bool, and their weighting, with TRL's importance clip."""
        chosen, old = inputs.get("self_distillation_mask"), inputs.get("old_per_token_logps")
        taught = mask if chosen is None else mask & (chosen != 0)[:, None]
        weights, clip = Given(taught.float()), self.args.distillation_is_clip
        return taught, weights if clip is None or old is None else weights * ImportanceRatio(old, clip)

    def _terms(
        self, weights: Any, sampled: OnPolicyDistillation | None, policy: Mix | None
    ) -> dict[str, Any]:
        """Return the options of the divergence and of its policy term."""
        share = self.args.distillation_weight
        options = interpolation(self.args.distillation_alpha)
        if sampled is not None:
            term = sampled if policy is None else Mix(((share, sampled), (1 - share, policy)))
            return options | {"policy": term, "policy_weight": 1.0}
        topk = self.args.distillation_topk if self.args.distillation_mode == "topk_logits" else None
        tail = TAILS[self.args.distillation_add_tail]
        options |= {"token_weights": weights, "topk": topk, "topk_tail": tail}
        return options if policy is None else options | {"policy": policy, "policy_weight": 1 - share}


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
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self._wrapped(self.teacher_model, self._side, *rows)
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
