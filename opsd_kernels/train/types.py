"""The values that travel through the trainer. A suffix names the dimensions: B rollouts, T completion positions, L positions of a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

StepMetrics = dict[str, Any]  # one line of metrics.jsonl: plain numbers, and lists of them for values by position
Messages = tuple[dict[str, str], ...]  # a conversation: {"role": ..., "content": ...}


@dataclass(frozen=True)
class Prompt:
    """A problem as the model sees it. `problem` identifies the instance inside its environment."""

    problem: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """What the world says about an answer: a reward in [0, 1] and, on failure, a text that may help. 1 is success."""

    reward: float
    feedback: str | None = None

    @property
    def success(self) -> bool:
        return self.reward >= 1.0


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. `tokens` are the model's own, an end-of-sequence token included if it came to one."""

    prompt: Prompt
    group: int  # which prompt of the step
    sample: int  # which answer to that prompt
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Context:
    """The privileged part of the teacher's view of one rollout. At least one of the two is there."""

    demonstration: str | None
    feedback: str | None


@dataclass(frozen=True)
class Sequences:
    """Prompt + completion of each rollout, padded on the right, and where the completion's rows lie."""

    tokens_BL: Tensor  # int64
    rows_BT: Tensor  # int64: position whose hidden state predicts completion token t; 0 where masked


@dataclass(frozen=True)
class Batch:
    """The rollouts that enter the loss, seen by both sides. Row (b, t) of either side predicts the same token."""

    student: Sequences
    teacher: Sequences
    labels_BT: Tensor  # int64, -100 where masked
    mask_BT: Tensor  # bool
    rollouts: tuple[Rollout, ...]

    @property
    def size(self) -> int:
        return len(self.rollouts)

    @property
    def num_tokens(self) -> int:
        return int(self.mask_BT.sum())


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped in order. The message says what was saved and how to go on."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is inf or NaN. The message names the step and the rows; the last good state is saved."""


class RunDirectoryError(FileExistsError):
    """The run directory holds another run, or a run of another configuration."""
