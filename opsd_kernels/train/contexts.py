"""The privileged view: what the teacher is told that the student is not.

SDPO, eq. 1 of arXiv:2601.20802: the problem, a *correct* answer of the same group if there is one other than this rollout, the environment's feedback
if this attempt failed, and the instruction to solve. The failed attempt itself is not shown, unless the feedback quotes it. A rollout with neither
has no context and stays out of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_kernels.train import seeds
from opsd_kernels.train.types import Context, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "0"  # a text that every chat template keeps as it is


@dataclass(frozen=True)
class ContextTemplate:
    """How the blocks of the teacher's user turn open and close."""

    demonstration: tuple[str, str] = ("<solution>\nA correct solution:\n", "\n</solution>")
    feedback: tuple[str, str] = ("<feedback>\nFeedback on your earlier, unsuccessful attempt:\n", "\n</feedback>")
    instruction: str = "Solve the original problem."

    def markers(self) -> tuple[str, ...]:
        """The strings whose appearance inside a block could end it or open another."""
        lines = (line.strip() for side in (*self.demonstration, *self.feedback) for line in side.splitlines())
        return tuple(line for line in lines if line.startswith("<"))

    def render(self, problem: str, context: Context | None, markers: Sequence[str]) -> str:
        """The user turn. Without a context it is the problem alone; the texts in the blocks are neutralised."""
        if context is None:
            return problem
        parts = [problem]
        for (opening, closing), text in ((self.demonstration, context.demonstration), (self.feedback, context.feedback)):
            if text is not None:
                parts.append(opening + neutralise(text, markers) + closing)
        return "\n".join([*parts, self.instruction])


def build_contexts(rollouts: Sequence[Rollout], siblings: bool, *key: int) -> list[Context | None]:
    """A context per rollout, None where there is neither a demonstration nor feedback.

    The demonstration is drawn at random among the successes of the rollout's group; `key` (seed, step) and the rollout's place decide the draw.
    """
    successes: dict[int, list[Rollout]] = {}
    # Sorted, so that the draw below means the same rollout in whatever order they come.
    for rollout in sorted(rollouts, key=lambda rollout: rollout.sample):
        if rollout.verdict.success:
            successes.setdefault(rollout.group, []).append(rollout)
    contexts: list[Context | None] = []
    for rollout in rollouts:
        others = [peer for peer in successes.get(rollout.group, ()) if peer.sample != rollout.sample] if siblings else []
        chosen = others[seeds.pick(len(others), *key, rollout.group, rollout.sample)].text if others else None
        feedback = None if rollout.verdict.success else rollout.verdict.feedback
        contexts.append(Context(chosen, feedback) if chosen is not None or feedback is not None else None)
    return contexts


def neutralise(text: str, markers: Sequence[str]) -> str:
    """`text` in which no marker appears: a space after a marker's first character breaks it.

    Repeated until none is left, since a break may complete another marker.
    """
    while found := [marker for marker in markers if marker in text]:
        for marker in found:
            text = text.replace(marker, marker[0] + " " + marker[1:])
    return text


def forbidden_markers(tokenizer: PreTrainedTokenizerBase, template: ContextTemplate) -> tuple[str, ...]:
    """Every string that means something to the tokenizer, the chat template or the blocks."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    frame = tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True)
    pieces = [piece.strip() for piece in frame.split(PROBE)]
    candidates = [*added, *tokenizer.all_special_tokens, *pieces, *template.markers()]
    # A single character cannot be broken in two, and ends no block.
    return tuple(sorted({marker for marker in candidates if len(marker) > 1}))
