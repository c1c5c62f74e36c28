"""Teachers: a frozen or averaged copy of the student, the student itself or its base model, another model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels.integrations.transformers import scoring
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed.ranks import ALONE, Ranks
from opsd_kernels.train.distributed.sharding import cut_as, place

NO_MASTERS: Mapping[Tensor, Tensor] = {}


class Teacher:
    """Interface: `using()` yields the scoring model, `update` runs after each step, `state` is checkpointed.

    With `mix` a, logits are (1 - a) * teacher + a * student at the same token, each under its own prompt
    (SDPO's trust region).
    """

    mix = 0.0
    # True if it scores alike before and after an update of the student.
    fixed = False
    model: PreTrainedModel

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def update(self, student: PreTrainedModel, masters: Mapping[Tensor, Tensor] = NO_MASTERS) -> None:
        """Follow the student after a step; a no-op for a fixed teacher.

        `masters` maps weights of the student to the fp32 weights that they are rounded from.
        """

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore `state()`; a no-op for a teacher without state."""


class Copy(Teacher):
    """A copy with the update `teacher <- (1 - rate) * teacher + rate * student` (EMA); frozen at rate 0.

    The average is fp32: in bf16 a step of .01 times an update falls below half an ulp and is lost. Only
    trainable parameters are averaged and saved.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        rate: float,
        mix: float = 0.0,
        placed: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
    ):
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.model = placed(copy.deepcopy(student).requires_grad_(False).eval())
        self.rate, self.mix, self.fixed = rate, mix, rate == 0
        # `float()` returns fp32 parameters themselves, without a copy. A frozen copy has nothing to average.
        self.average = {
            name: parameter.float() if rate else parameter
            for name, parameter in self.model.named_parameters()
            if name in trained
        }

    @torch.no_grad()
    def update(self, student: PreTrainedModel, masters: Mapping[Tensor, Tensor] = NO_MASTERS) -> None:
        if self.rate == 0:
            return
        for name, parameter in student.named_parameters():
            if name in self.average:
                self.average[name].lerp_(masters.get(parameter, parameter).float(), self.rate)
        self._write()

    def state(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(cut_as(average, state[name]))
        self._write()

    def _write(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                parameter.copy_(self.average[name])


class Live(Teacher):
    """The current student. Known to diverge (arXiv:2601.20802), kept for the ablation."""

    def __init__(self, student: PreTrainedModel):
        self.model = student

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        # No dropout in a target.
        with scoring(self.model):
            yield self.model


class AdapterOff(Live):
    """The student without its LoRA adapter: the base model as a frozen teacher that takes no memory."""

    fixed = True

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        with super().using() as model, cast(Any, model).disable_adapter():
            yield model


class External(Teacher):
    """Another model, frozen."""

    fixed = True

    def __init__(self, model: PreTrainedModel):
        self.model = model.requires_grad_(False).eval()


def make_teacher(
    student: PreTrainedModel, config: TrainConfig, other: PreTrainedModel | None = None, ranks: Ranks = ALONE
) -> Teacher:
    """Make the configured teacher; `other` is the external model. Call it before the student is sharded."""
    if config.teacher == "external":
        assert other is not None
        return External(place(other, config, ranks))
    if config.teacher in ("live", "adapter_off"):
        return (Live if config.teacher == "live" else AdapterOff)(student)
    mix = config.trust_region if config.teacher == "trust_region" else 0.0
    return Copy(
        student,
        config.teacher_rate if config.teacher == "ema" else 0.0,
        mix,
        lambda model: place(model, config, ranks),
    )


def make_reference(
    student: PreTrainedModel, config: TrainConfig, teacher: Teacher, ranks: Ranks = ALONE
) -> Teacher | None:
    """Return the model as it was before the run, the target of rehearsal; None without rehearsal.

    A teacher that never changes is that model and is returned itself.
    """
    if config.rehearsal_prompts == 0:
        return None
    if config.teacher in ("frozen", "trust_region", "adapter_off"):
        return teacher
    if config.lora_rank:
        return AdapterOff(student)
    return Copy(student, 0.0, placed=lambda model: place(model, config, ranks))
