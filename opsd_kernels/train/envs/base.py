"""Interfaces of an environment: a Task owns the instances and their split, an Env is one attempt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.types import Context, Prompt, Verdict

# Share of the warm start's examples that have no context.
BARE_SHARE = 0.6


class Env(ABC):
    """One attempt at one problem: call `prompt()` any number of times, `verify()` once."""

    def __init__(self) -> None:
        self._used = False

    @abstractmethod
    def prompt(self) -> Prompt: ...

    @abstractmethod
    def _judge(self, completion: str) -> Verdict: ...

    def verify(self, completion: str) -> Verdict:
        """Verify the answer. Raises RuntimeError at the second call: an Env is one attempt."""
        if self._used:
            raise RuntimeError(
                "verify: expected one call per Env, got a second one; make a new Env for a new attempt"
            )
        self._used = True
        return self._judge(completion)


@dataclass(frozen=True)
class WarmExample:
    """One supervised example of the base model's training."""

    prompt: Prompt
    context: Context | None
    answer: str


class Task(ABC):
    """A family of problems. The four lists are disjoint; `held_out` and `untrained` are never trained on."""

    template: ContextTemplate
    train: Sequence[int]
    held_out: Sequence[int]
    # Both may be empty: a skill that the base model has and the run does not train, and other instances of
    # it, to be rehearsed.
    untrained: Sequence[int]
    rehearsal: Sequence[int]

    @abstractmethod
    def env(self, problem: int, key: int) -> Env:
        """Make a new attempt. `key` decides the random parts of its feedback."""

    def fingerprint(self) -> str | None:
        """Return a hash of the data that the task was made from; None if the settings alone decide it."""
        return None


class DemoTask(Task):
    """A task of synthetic problems, with the vocabulary and supervised examples for the tiny base model."""

    vocabulary: tuple[str, ...]

    def __init__(self, feedback: str, peers: bool = False):
        """Set the kind of `feedback` on a failure.

        With `peers` the base model learns to read several siblings, and failures (MOPD, arXiv:2605.12652).
        """
        self.feedback, self.peers = feedback, peers
        self.template = ContextTemplate.words("solve", failures=peers)

    def siblings(self, answer: str, wrong: str, rng: np.random.Generator) -> Context:
        """Return a context with one correct sibling; with `peers` one or two, half the time a wrong one."""
        if not self.peers:
            return Context((answer,))
        return Context((answer,) * int(rng.integers(1, 3)), None, (wrong,) if rng.random() < 0.5 else ())

    @abstractmethod
    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        """Draw an example without a context, of the trained skill with probability `skill_share`."""

    @abstractmethod
    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """Draw an example whose context helps to answer it, which makes the model a teacher."""

    @abstractmethod
    def solution(self, problem: int) -> str:
        """Return a correct answer, for the warm start and its stop criterion."""

    def warm_examples(
        self, rng: np.random.Generator, count: int, skill_share: float
    ) -> tuple[list[WarmExample], list[WarmExample]]:
        """Draw `count` supervised examples, without and with a context."""
        # Contexts are learned within 500 steps, the skills take over a thousand and get the larger share.
        bare_count = round(count * BARE_SHARE)
        bare = [self.bare_example(rng, skill_share) for _ in range(bare_count)]
        return bare, [self.privileged_example(rng) for _ in range(count - bare_count)]


def held_out_fifth(items: Sequence[int], key: int) -> tuple[list[int], list[int]]:
    """Split items into (train, held out). A fifth is held out, which depends on the key alone."""
    mixed = seeds.shuffled(items, key)
    return mixed[len(mixed) // 5 :], mixed[: len(mixed) // 5]
