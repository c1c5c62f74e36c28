"""The values that travel through the trainer. A suffix names the dimensions: B rollouts, T completion positions, L positions of a whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

StepMetrics = dict[
    str, Any
]  # one line of metrics.jsonl: plain numbers, and lists of them for values by position
Messages = tuple[dict[str, str], ...]  # a conversation: {"role": ..., "content": ...}


@dataclass(frozen=True)
class Prompt:
    """A problem as the model sees it: the user's turn, after earlier turns if there are any. `problem` identifies the instance inside its environment."""

    problem: int
    text: str
    before: Messages = ()


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
    """The privileged part of the teacher's view of one rollout. At least one of the three is there."""

    demonstrations: tuple[str, ...] = ()  # right answers of sibling rollouts
    feedback: str | None = None
    failures: tuple[str, ...] = ()  # wrong answers, shown as ones to avoid


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
    distilled_B: Tensor  # bool: the teacher has a view of this rollout; the others are there for the policy gradient alone
    advantages_B: Tensor  # reward less its group's mean
    boundaries_BT: Tensor  # bool: a segment starts here
    old_logprobs_BT: Tensor | None = None  # of the policy that sampled, where a ratio to it is needed

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
    """Counts of a whole optimisation step, which its micro-batches divide by."""

    tokens: int
    sequences: int
    distilled_tokens: int
    distilled_sequences: int


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped in order. The message says what was saved and how to go on."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is inf or NaN. The message names the step and the rows; the last good state is saved."""

    updates = 0  # that this step had made before: with any, the weights are not those of the step's start


class RunDirectoryError(FileExistsError):
    """The run directory holds another run, or a run of another configuration."""


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read. The message names the file."""
