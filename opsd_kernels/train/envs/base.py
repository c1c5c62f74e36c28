"""What an environment is: a Task owns the instances and their split, an Env is one attempt at one instance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.types import Context, Prompt, Verdict


class Env(ABC):
    """One attempt at one problem: `prompt()` as often as wanted, `verify()` once."""

    def __init__(self) -> None:
        self._used = False

    @abstractmethod
    def prompt(self) -> Prompt: ...

    @abstractmethod
    def _judge(self, completion: str) -> Verdict: ...

    def verify(self, completion: str) -> Verdict:
        """Judges the answer. Raises RuntimeError at the second call: an Env is one attempt."""
        if self._used:
            raise RuntimeError("verify: expected one call per Env, got a second one; make a new Env for a new attempt")
        self._used = True
        return self._judge(completion)


@dataclass(frozen=True)
class WarmExample:
    """One supervised example of the base model's training."""

    prompt: Prompt
    context: Context | None
    answer: str


class Task(ABC):
    """A family of problems. The three lists are disjoint; nothing ever trains on `held_out`, nor the run on `untrained`."""

    template: ContextTemplate
    vocabulary: tuple[str, ...]  # words of the tiny tokenizer
    train: Sequence[int]
    held_out: Sequence[int]
    untrained: Sequence[int]  # a skill the base model has and the run does not practise

    @abstractmethod
    def env(self, problem: int, key: int) -> Env:
        """A fresh attempt. `key` decides whatever is random about the feedback."""

    @abstractmethod
    def warm_examples(self, rng: np.random.Generator, count: int, operator_share: float) -> tuple[list[WarmExample], list[WarmExample]]:
        """`count` supervised examples, without and with a context."""

    @abstractmethod
    def solution(self, problem: int) -> str:
        """The right answer, for the warm start and its stop criterion."""
