"""TRL's trainers of a teacher's whole distribution: DistillationTrainer, GKDTrainer, GOLDTrainer."""

from __future__ import annotations

from inspect import signature
from typing import Any

import trl
from torch import Tensor, nn
from trl.experimental import gkd, gold

from opsd_kernels.divergence import linear_divergence
from opsd_kernels.spec import expect, interpolation

from .base import FusedLoss, completion


class DistillationTrainer(FusedLoss, trl.DistillationTrainer):
    """TRL's DistillationTrainer in four passes over the heads instead of six (KL) or eight (JSD)."""

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # What TRL's own forward takes beside the tokens: images.
        known = signature(trl.DistillationTrainer._get_last_hidden_state).parameters
        images = {name: inputs[name] for name in known if inputs.get(name) is not None}
        student = self._side(unwrapped_student, *completion(inputs), **images)
        teacher = self._teacher_side(*completion(inputs), **images)
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


class _LabelledTokens(FusedLoss):
    """A loss at the labels of whole sequences, prompts included, as GKD and GOLD compute it."""

    beta: float
    loss_temperature: float | None = None

    def _images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows = (inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1] - 1)
        images = self._images(inputs)
        teacher = self._teacher_side(*rows, **images)
        labels = inputs["labels"][:, 1:]
        loss = self._wrapped(model, self._loss, rows, images, teacher, labels, num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def _loss(
        self, model: nn.Module, rows: Any, images: Any, teacher: Any, labels: Tensor, count: Any
    ) -> Tensor:
        student = self._side(model, *rows, **images)
        options = {**interpolation(self.beta), "labels": labels.to(student[0].device), "normalizer": count}
        if self.loss_temperature is not None:
            options["temperature"] = self.loss_temperature
        return self._call(linear_divergence, {"student": student, "teacher": teacher}, **options)


class GKDTrainer(_LabelledTokens, gkd.GKDTrainer):
    """TRL's GKDTrainer, which holds the logits of prompts and completions of both models.

    As in TRL `temperature` is that of sampling alone, and the loss is divided by the number of the data set's
    completion tokens, also where completions were sampled.
    """

    loss_temperature = 1.0


class GOLDTrainer(_LabelledTokens, gold.GOLDTrainer):
    """TRL's GOLDTrainer for student and teacher of one vocabulary; `use_uld_loss` is refused.

    A teacher whose head has more rows than the student's is cut to them, as by TRL. One with fewer is
    refused: TRL appends rows for tokens that the teacher does not know, which then take probability.
    """

    def __init__(
        self, model: Any = None, teacher_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        uld = getattr(args, "use_uld_loss", False)
        expect(not uld, "use_uld_loss", "False: the fused loss compares tokens of one vocabulary", uld)
        sizes = [_vocabulary(each, args) for each in (model, teacher_model)]
        expected = f"a teacher with the student's vocabulary, of {sizes[0]} entries or more"
        expect(sizes[1] >= sizes[0], "teacher_model", expected, sizes[1])
        super().__init__(model, teacher_model, args, *rest, **kwargs)

    def _images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self._get_model_forward_kwargs(inputs)


def _vocabulary(model: Any, args: Any) -> int:
    """Return the vocabulary size of a model, or of the name of one."""
    if isinstance(model, str):
        from transformers import AutoConfig

        trusted = getattr(args, "trust_remote_code", False)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trusted)
    else:
        config = model.config
    return config.get_text_config().vocab_size
