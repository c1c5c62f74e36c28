"""TRL's (1.16) `DistillationTrainer`, `SDPOTrainer` and `IWOPDTrainer` with the fused loss: logits of tokens x vocabulary are never made.

Only what makes a loss from logits is overridden. Settings that the fused loss does not serve raise ValueError when the trainer is made. How to use them, what
differs, and defects that are not copied: docs/integrations-trl.md.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn
from trl.experimental import iw_opd, sdpo
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx as whole_head

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.integrations.transformers import Head, check_head, on_heads, trunk
from opsd_kernels.objectives import Mix, OnPolicyDistillation, PPOClip, linear_policy_divergence
from opsd_kernels.spec import expect, interpolation
from opsd_kernels.weights import Given, ImportanceRatio, PrefixDiscrepancy

TAILS = {True: "bucket", False: "renormalize"}
Side = tuple[
    Tensor, Head
]  # hidden states (B, T, H) of the rows that predict the completion, and the head above them


class FusedLoss:
    """What the three share. `loss_options`: arguments of linear_divergence beyond what TRL's config says, e.g. {"workspace_bytes": 2**28}; they win."""

    loss_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        server = any(
            getattr(value, "use_teacher_server", False) for value in (*args, *kwargs.values())
        )  # before TRL waits for one
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
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # these may have cut the weights already
            check_head("model", self.model)
            check_head("teacher_model", self.accelerator.unwrap_model(self.teacher_model))

    def _check_settings(self) -> None:
        """Raises ValueError for what the trainer has and the fused loss has not."""

    def _states(self, model: nn.Module, tokens: Tensor, attended: Tensor, length: int) -> Tensor:
        return trunk(model)(input_ids=tokens, attention_mask=attended, use_cache=False).last_hidden_state[
            :, -length - 1 : -1
        ]

    def _side(self, model: nn.Module, *rows: Any, **images: Tensor) -> Side:
        """Inside the forward of `model`'s wrapper. Redirection replaced the forward that accelerate put autocast into, hence the one here."""
        head = Head.of(model)
        with self.accelerator.autocast():
            return self._states(model, *rows, **images).to(head.weight.device), head

    def _wrapped(self, model: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
        """`method` of the unwrapped model as the forward of its wrapper, so that the hooks of DDP, FSDP and DeepSpeed fire."""
        inner = self.accelerator.unwrap_model(model)
        return self._redirect(model, inner, method, inner, *args, **kwargs)

    def _call(self, op: Any, sides: dict[str, Side], *tensors: Tensor, **options: Any) -> Any:
        options |= {
            name: value
            for name, value in self.loss_options.items()
            if "" not in sides or name in signature(op).parameters
        }
        with (
            whole_head(*(part for _, head in sides.values() for part in (head.weight, head.bias))),
            self.accelerator.autocast(),
        ):
            return on_heads(op, sides, *tensors, temperature=self.temperature, **options)

    def _log(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(
            value.detach().float().mean().item()
        )


def _completion(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    tokens, attended = (
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")
    )
    return tokens, attended, inputs["completion_ids"].shape[1]


def _of_sequences(
    values: Tensor, mask: Tensor
) -> Tensor:  # TRL's mean of means: a sequence without a valid token counts, as 0
    return (torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


class DistillationTrainer(FusedLoss, trl.DistillationTrainer):
    """TRL's, in four passes over the heads instead of six (KL) or eight (JSD)."""

    _states = trl.DistillationTrainer._get_last_hidden_state  # it knows images

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = {name: inputs[name] for name in signature(self._states).parameters if name in inputs}
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
            "return_stats": True,
        }
        loss, stats = self._call(linear_divergence, {"student": student, "teacher": teacher}, **options)
        return loss, stats.student_entropy.sum(), mask.sum()


class SDPOTrainer(FusedLoss, sdpo.SDPOTrainer):
    """TRL's, with importance clip, top-k, sampled tokens and the mix with a policy loss each in one pass over the heads, all sequences together."""

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
        if (
            self.args.distillation_weight > 0
        ):  # before the student's forward, not inside: the two may be one module
            rows = (
                inputs["teacher_input_ids"],
                inputs["teacher_attention_mask"],
                inputs["completion_ids"].shape[1],
            )
            with torch.no_grad(), self._get_teacher_context_for_self_distillation():
                teacher = self._wrapped(self.teacher_model, self._side, *rows)
        loss, metrics = self._wrapped(model, self._loss, teacher, inputs)
        for name, value in metrics.items():
            self._log(name, self.accelerator.gather(value.detach()))
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _compute_rollout_logps(self, **inputs: Tensor) -> Tensor | None:
        if (
            self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations)
            == 0
        ):
            return None  # the policy that samples is the one that is updated: a ratio of 1
        with torch.no_grad():
            sides = {"": self._wrapped(self.model, self._side, *_completion(inputs))}
            return self._call(
                linear_logprobs, sides, inputs["completion_ids"], mask=inputs["completion_mask"]
            )

    def _policy(self, inputs: dict[str, Any], mask: Tensor) -> Mix:
        """TRL's policy loss, as a term whose mean of sequence means it is."""
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        divisor = {"grpo": lengths, "dr_grpo": self.max_completion_length}.get(
            self.loss_type, mask.sum().clamp(min=1) / len(mask)
        )
        clip = (self.epsilon_low, self.epsilon_high, self.importance_sampling_level == "sequence")
        return Mix(
            (
                (
                    lengths / divisor,
                    PPOClip(
                        inputs["advantages"].reshape(len(mask), -1), inputs.get("old_per_token_logps"), *clip
                    ),
                ),
            )
        )

    def _loss(
        self, model: nn.Module, teacher: Side | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, labels, share, old = (
            inputs["completion_mask"] != 0,
            inputs["completion_ids"],
            self.args.distillation_weight,
            inputs.get("old_per_token_logps"),
        )
        student, policy = (
            self._side(model, *_completion(inputs)),
            self._policy(inputs, mask) if share < 1 else None,
        )
        if share == 0:
            loss = _of_sequences(
                policy(self._call(linear_logprobs, {"": student}, labels, mask=mask), None, mask), mask
            )
            return loss, {"self_distillation/policy_loss": loss}
        taught = (
            mask
            if inputs.get("self_distillation_mask") is None
            else mask & (inputs["self_distillation_mask"] != 0)[:, None]
        )
        valid, clip, weights = (
            taught if share == 1 else mask,
            self.args.distillation_is_clip,
            Given(taught.float()),
        )
        weights = weights if clip is None or old is None else weights * ImportanceRatio(old, clip)
        options = {
            **interpolation(self.args.distillation_alpha),
            "labels": labels,
            "mask": valid,
            "reduction": "sequence_mean",
            "return_stats": True,
        }
        sampled = (
            OnPolicyDistillation(weights=weights) if self.args.distillation_mode == "sampled_token" else None
        )
        if sampled is not None:
            options |= {
                "policy": Mix(((share, sampled), (1 - share, policy))) if share < 1 else sampled,
                "policy_weight": 1.0,
            }
        else:
            topk = self.args.distillation_topk if self.args.distillation_mode == "topk_logits" else None
            options |= {
                "token_weights": weights,
                "topk": topk,
                "topk_tail": TAILS[self.args.distillation_add_tail],
            }
            options |= {"policy": policy, "policy_weight": 1 - share} if share < 1 else {}
        loss, stats = self._call(
            linear_policy_divergence if "policy" in options else linear_divergence,
            {"student": student, "teacher": teacher},
            **options,
        )
        with torch.no_grad():
            values = (
                stats.divergence * weights(stats, valid)
                if sampled is None
                else sampled(stats.student_logprob, stats, valid)
            )
            mean = torch.where(taught, values, 0.0).sum() / taught.sum().clamp(min=1)
            metrics = {
                f"{prefix}/distillation_loss": mean for prefix in ("self_distillation", self._name.lower())
            }
            metrics |= (
                {
                    "self_distillation/policy_loss": _of_sequences(
                        policy(stats.student_logprob, stats, mask), mask
                    )
                }
                if share < 1
                else {}
            )
        return loss * valid.any(-1).float().mean(), metrics


class IWOPDTrainer(FusedLoss, iw_opd.IWOPDTrainer):
    """TRL's, both objectives. Divides by the completion tokens of the optimisation step, which TRL does not."""

    def _check_settings(self) -> None:
        union = self.distillation_objective == "jsd" and 0 < self.beta < 1 and self.loss_top_k > 0
        expect(
            not union,
            "loss_top_k",
            "0 where 0 < beta < 1: the union of two top-k lists is no support of the fused loss",
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
        if (
            self.model.training and self._buffered_inputs is not None
        ):  # transformers counted the data set's completions, before sampling
            count = sum((part["labels"] != -100).sum() for part in self._buffered_inputs)
            num_items_in_batch = (
                self.accelerator.gather(count).sum().clamp(min=1) / self.accelerator.num_processes
            )
        start = self._compute_prompt_length(inputs)
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs["labels"].shape[1] - start)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self._wrapped(self.teacher_model, self._side, *rows)
        tokens = {
            name: inputs[name][:, start:]
            for name in ("input_ids", "labels", "rollout_logprobs")
            if name in inputs
        }
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
        sides, mask, tail = (
            {"student": student, "teacher": teacher},
            labels != -100,
            TAILS[self.loss_add_tail],
        )
        options = {"labels": labels, "normalizer": count}
        if self.distillation_objective == "iw_opd":
            policy = OnPolicyDistillation(
                weights=PrefixDiscrepancy(self.iw_opd_gamma), old_logprobs=tokens.get("rollout_logprobs")
            )
            loss, stats = self._call(
                linear_policy_divergence,
                sides,
                policy=policy,
                policy_weight=1.0,
                return_stats=True,
                **options,
            )
            self._log_rewards(*(x[mask] for x in policy.weighted_rewards(stats.student_logprob, stats, mask)))
            return loss
        options |= interpolation(self.beta)
        if (
            self.beta == 1 and k == 1 and self.reverse_kl_top_1_mode == "sampled"
        ):  # the sampled token and the rest, as if the teacher had listed it
            with torch.no_grad():
                listed = self._call(linear_logprobs, {"": teacher}, tokens["input_ids"], mask=mask)
            return self._call(
                linear_topk_divergence,
                {"student": student},
                tokens["input_ids"][..., None],
                listed[..., None],
                tail=tail,
                **options,
            )
        support = (
            {"topk": k, "topk_support": "student" if self.beta == 1 else "teacher", "topk_tail": tail}
            if 0 < k < student[1].weight.shape[0]
            else {}
        )
        return self._call(linear_divergence, sides, **support, **options)

    def _log_rewards(self, rewards: Tensor, weights: Tensor) -> None:
        expect(
            bool(rewards.isfinite().all()),
            "teacher_model",
            "a finite log-prob of every sampled token",
            rewards[~rewards.isfinite()].tolist(),
        )
        means = {
            "mean_advantage": rewards * weights,
            "mean_abs_advantage": rewards.abs(),
            "mean_weight": weights,
        }
        for name, value in (
            {**means, "min_weight": weights.min(), "max_weight": weights.max()}.items()
            if len(rewards)
            else ()
        ):
            self._log(f"iw_opd/{name}", value)
