"""What an environment is: a Task owns the instances and their split, an Env is one attempt at one instance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.contexts import ContextTemplate
from opsd_kernels.train.types import Context, Prompt, Verdict

BARE_SHARE = 0.6  # of the warm start's examples


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
    """A family of problems. The four lists are disjoint; nothing ever trains on `held_out` and `untrained`."""

    template: ContextTemplate
    train: Sequence[int]
    held_out: Sequence[int]
    untrained: Sequence[int]  # a skill the base model has and the run does not practise; may be empty
    rehearsal: Sequence[int]  # other instances of such a skill, which a run may be told to keep; may be empty

    @abstractmethod
    def env(self, problem: int, key: int) -> Env:
        """A fresh attempt. `key` decides whatever is random about the feedback."""


class DemoTask(Task):
    """A task of made-up problems, with what the tiny base model needs: its words, and supervised examples."""

    vocabulary: tuple[str, ...]

    def __init__(self, feedback: str, peers: bool = False):
        """`feedback` names what a failure is told; with `peers` the base model learns to read several siblings, and failures (MOPD, arXiv:2605.12652)."""
        self.feedback, self.peers = feedback, peers
        self.template = ContextTemplate.words("solve", failures=peers)

    def siblings(self, answer: str, wrong: str, rng: np.random.Generator) -> Context:
        """A context of sibling answers: one right one; with `peers` one or two, in half of them a wrong one too."""
        if not self.peers:
            return Context((answer,))
        return Context((answer,) * int(rng.integers(1, 3)), None, (wrong,) if rng.random() < 0.5 else ())

    @abstractmethod
    def bare_example(self, rng: np.random.Generator, skill_share: float) -> WarmExample:
        """Without a context: the skill to be trained in `skill_share` of them, the untrained one and fillers in the others."""

    @abstractmethod
    def privileged_example(self, rng: np.random.Generator) -> WarmExample:
        """With a context that says more about the answer than the problem does: what makes the model a teacher."""

    @abstractmethod
    def solution(self, problem: int) -> str:
        """A right answer, for the warm start and its stop criterion."""

    def warm_examples(
        self, rng: np.random.Generator, count: int, skill_share: float
    ) -> tuple[list[WarmExample], list[WarmExample]]:
        """`count` supervised examples, without and with a context."""
        # Contexts are learned within 500 steps, the skills take over a thousand: these get the larger share.
        bare_count = round(count * BARE_SHARE)
        bare = [self.bare_example(rng, skill_share) for _ in range(bare_count)]
        return bare, [self.privileged_example(rng) for _ in range(count - bare_count)]


def held_out_fifth(items: Sequence[int], key: int) -> tuple[list[int], list[int]]:
    """(train, held out): a fifth is held out, always the same one for the same key."""
    mixed = seeds.shuffled(items, key)
    return mixed[len(mixed) // 5 :], mixed[: len(mixed) // 5]
