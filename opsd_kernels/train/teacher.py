"""The teacher: a copy of the student that is frozen or follows it slowly, the student itself, the student without its adapter, or another model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed.ranks import ALONE, Ranks
from opsd_kernels.train.distributed.sharding import cut_as, place


class Teacher:
    """`using()` lends the model that scores. `update` is called after each step; `state` is what a checkpoint needs.

    `mix` a: logits become (1 - a) * teacher + a * student, the student's being those of its own view at the same token (SDPO's trust region).
    """

    mix = 0.0
    model: PreTrainedModel

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def update(self, student: PreTrainedModel) -> None:
        """Nothing, unless the teacher follows."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing, where there is no state."""


class Copy(Teacher):
    """`rate` 0 is the frozen teacher; else `teacher <- (1 - rate) * teacher + rate * student` after each step (EMA).

    The average is kept in fp32: at bf16 a step of .01 times an update falls below half an ulp and is lost. Only what trains is averaged and saved.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        rate: float,
        mix: float = 0.0,
        placed: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
    ):
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.model, self.rate, self.mix = (
            placed(copy.deepcopy(student).requires_grad_(False).eval()),
            rate,
            mix,
        )
        # fp32 parameters are shared, not copied
        self.average = {
            name: parameter.float() for name, parameter in self.model.named_parameters() if name in trained
        }

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        if self.rate == 0:
            return
        for name, parameter in student.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.float(), self.rate)
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
    """The student as it is now. Known to diverge (arXiv:2601.20802), kept for the ablation."""

    def __init__(self, student: PreTrainedModel):
        self.model = student

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        training = self.model.training
        self.model.eval()  # no dropout in a target
        try:
            yield self.model
        finally:
            self.model.train(training)


class AdapterOff(Live):
    """The student without its LoRA adapter, which is the base model: a frozen teacher that costs no memory."""

    @contextmanager
    def using(self) -> Iterator[PreTrainedModel]:
        with super().using() as model, model.disable_adapter():
            yield model


class External(Teacher):
    """Another model, frozen."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.requires_grad_(False).eval()


def make_teacher(
    student: PreTrainedModel, config: TrainConfig, other: PreTrainedModel | None = None, ranks: Ranks = ALONE
) -> Teacher:
    """The teacher that the settings name; `other` is the external one. The student is not sharded yet."""
    if config.teacher == "external":
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
    """The model as it was before the run, which rehearsal keeps to; None without rehearsal. The teacher itself where it is that model."""
    if config.rehearsal_prompts == 0:
        return None
    if config.teacher in ("frozen", "trust_region", "adapter_off"):
        return teacher
    return (
        AdapterOff(student)
        if config.lora_rank
        else Copy(student, 0.0, placed=lambda model: place(model, config, ranks))
    )
