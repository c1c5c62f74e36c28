"""The teacher: a copy of the student that is frozen, or follows it slowly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Teacher:
    """`rate` 0 is the frozen teacher; else `teacher <- (1 - rate) * teacher + rate * student` after each step (EMA).

    The average is kept in fp32: at bf16 a step of .01 times an update falls below half an ulp and is lost.
    """

    def __init__(self, student: PreTrainedModel, rate: float):
        self.model, self.rate = copy.deepcopy(student).requires_grad_(False).eval(), rate
        self.average = {name: parameter.float() for name, parameter in self.model.named_parameters()}  # fp32 parameters are shared, not copied

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        if self.rate == 0:
            return
        for name, parameter in student.named_parameters():
            self.average[name].lerp_(parameter.float(), self.rate)
        self._write()

    def state(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
        self._write()

    def _write(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.average[name])
