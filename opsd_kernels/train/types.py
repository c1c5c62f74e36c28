"""The records and exceptions of the trainer.

A suffix names the dimensions of a tensor: B rollouts, T completion positions, L positions of a sequence.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# One line of metrics.jsonl: plain numbers, and lists of them for values by position.
StepMetrics = dict[str, Any]
# A conversation: {"role": ..., "content": ...} per turn.
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it: the user's turn, after earlier turns if there are any.

    `problem` identifies the instance inside its environment.
    """

    problem: int
    text: str
    before: Messages = ()


@dataclass(frozen=True)
class Verdict:
    """A verifier's result: a reward in [0, 1], where 1 is success, and on failure optional feedback."""

    reward: float
    feedback: str | None = None

    @property
    def success(self) -> bool:
        return self.reward >= 1.0


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. `tokens` are as sampled, including the end-of-sequence token if there is one."""

    prompt: Prompt
    group: int  # index of the prompt within the step
    sample: int  # index of the answer to that prompt
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Context:
    """The privileged part of the teacher's prompt for one rollout; all empty for context `none`."""

    demonstrations: tuple[str, ...] = ()  # correct answers of sibling rollouts
    feedback: str | None = None
    failures: tuple[str, ...] = ()  # wrong answers, marked as such


@dataclass(frozen=True)
class Sequences:
    """Prompt + completion of each rollout, padded on the right, and the rows that predict the completion."""

    tokens_BL: Tensor  # int64
    rows_BT: Tensor  # int64: position whose hidden state predicts completion token t; 0 where masked
    # The same on the host, for tensors on a device: reading those would wait for it.
    host: Sequences | None = None

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(self.tokens_BL.to(device), self.rows_BT.to(device), self.host or self)


@dataclass(frozen=True)
class Batch:
    """The rollouts of the loss, tokenised for both sides.

    Row (b, t) of both sides predicts the same token.
    """

    student: Sequences
    teacher: Sequences
    labels_BT: Tensor  # int64, -100 where masked
    mask_BT: Tensor  # bool
    rollouts: tuple[Rollout, ...]
    # bool: the teacher has a prompt for this rollout; the others count in the policy gradient alone.
    distilled_B: Tensor
    # Reward minus the mean of its group.
    advantages_B: Tensor
    # bool: a segment starts here.
    boundaries_BT: Tensor
    # Of the policy that sampled, if the loss needs a ratio to it; None while that is the student itself.
    old_logprobs_BT: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.rollouts)

    @property
    def totals(self) -> Totals:
        distilled_BT = self.mask_BT & self.distilled_B[:, None]
        return Totals(
            int(self.mask_BT.sum()), self.size, int(distilled_BT.sum()), int(self.distilled_B.sum())
        )


@dataclass(frozen=True)
class Totals:
    """Counts over a whole optimisation step, the divisors of its micro-batches' losses."""

    tokens: int
    sequences: int
    distilled_tokens: int
    distilled_sequences: int


class TrainingInterrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or a scheduler's signal, `number`.

    The message says which state was saved and how to resume. A process that ends with it returns 128 plus the
    number, as a shell does.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT):
        super().__init__(message)
        self.number = int(number)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is inf or NaN.

    The message names the step and the rows; the last good state is saved.
    """

    # Updates made earlier in this step; if above 0, the weights differ from those at the start of the step.
    updates = 0


class RunDirectoryError(FileExistsError):
    """The run directory holds another run, or a run of another configuration."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read. The message names the file."""
