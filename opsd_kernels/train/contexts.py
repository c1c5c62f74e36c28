"""Build the teacher's contexts: privileged information in its prompt that the student does not see.

- `sdpo`, eq. 1 of arXiv:2601.20802: the problem, a *correct* answer of the same group if there is one other
  than this rollout, the environment's feedback if this attempt failed, and the instruction to solve. The
  failed attempt itself is not shown, unless the feedback quotes it.
- `positive`, `contrastive`, `failure`, MOPD (arXiv:2605.12652): correct siblings to imitate, correct and
  wrong ones, wrong ones alone; plus the environment's feedback, if any.
- `none`: the teacher has the student's prompt (on-policy distillation), and every rollout is in the loss.

A rollout with nothing to show has no context and stays out of the loss. A control keeps the number of blocks
of a context and replaces their answers by others of about as many tokens.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.types import Context, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text that every chat template leaves unchanged.
PROBE = "0"
# Streams of random numbers.
RIGHT, WRONG, INSTEAD = 1, 2, 3


@dataclass(frozen=True)
class ContextTemplate:
    """Opening and closing texts of the blocks in the teacher's user turn."""

    demonstration: tuple[str, str] = ("<solution>\nA correct solution:\n", "\n</solution>")
    failure: tuple[str, str] | None = ("<failure>\nAn unsuccessful attempt, to be avoided:\n", "\n</failure>")
    feedback: tuple[str, str] = (
        "<feedback>\nFeedback on your earlier, unsuccessful attempt:\n",
        "\n</feedback>",
    )
    instruction: str = "Solve the original problem."

    @classmethod
    def words(cls, instruction: str, failures: bool) -> ContextTemplate:
        """Return a template of markers alone, each one token of the tiny tokenizer.

        Without `failures` the tokenizer has no markers for them.
        """
        return cls(
            ("<solution>", "</solution>"),
            ("<failure>", "</failure>") if failures else None,
            ("<feedback>", "</feedback>"),
            instruction,
        )

    def blocks(self) -> tuple[tuple[str, str], ...]:
        return tuple(
            block for block in (self.demonstration, self.feedback, self.failure) if block is not None
        )

    def markers(self) -> tuple[str, ...]:
        """Return the strings that could end a block or open another if they appeared inside it."""
        lines = (line.strip() for block in self.blocks() for side in block for line in side.splitlines())
        return tuple(line for line in lines if line.startswith("<"))

    def render(self, problem: str, context: Context | None, markers: Sequence[str]) -> str:
        """Return the user turn: the problem, then the context's blocks with their texts neutralised."""
        if context is None or context == Context():
            return problem
        blocks = [(self.demonstration, text) for text in context.demonstrations] + [
            (self.failure or self.feedback, text) for text in context.failures
        ]
        blocks += [] if context.feedback is None else [(self.feedback, context.feedback)]
        return "\n".join(
            [
                problem,
                *(opening + _neutral(text, tuple(markers)) + closing for (opening, closing), text in blocks),
                self.instruction,
            ]
        )


def build_contexts(rollouts: Sequence[Rollout], config: TrainConfig, *key: int) -> list[Context | None]:
    """Return a context per rollout, None if there is nothing to show.

    `key` (seed, step) and the rollout's (group, sample) decide every draw.
    """
    if config.context == "none":
        return [Context() for _ in rollouts]
    # Sorted, so that a draw selects the same rollout in any order of the input.
    pool = sorted(rollouts, key=lambda rollout: (rollout.group, rollout.sample))
    groups: dict[int, list[Rollout]] = {}
    for rollout in pool:
        groups.setdefault(rollout.group, []).append(rollout)
    places = np.array([(rollout.group, rollout.sample) for rollout in rollouts], dtype=np.uint64)
    # All keys in one call: one by one they took 3 % of a step.
    keys = seeds.mix(*key, places[:, :1], places[:, 1:], np.array([RIGHT, WRONG, INSTEAD])).tolist()
    contexts: list[Context | None] = []
    for rollout, draws in zip(rollouts, keys, strict=True):
        right, wrong = _siblings(rollout, groups[rollout.group], config, draws)
        right, wrong = _controlled(rollout, right, wrong, pool, config.control, draws[2])
        feedback = None if rollout.verdict.success else rollout.verdict.feedback
        context = Context(tuple(r.text for r in right), feedback, tuple(r.text for r in wrong))
        contexts.append(context if context != Context() else None)
    return contexts


def _siblings(
    mine: Rollout, group: Sequence[Rollout], config: TrainConfig, draws: Sequence[int]
) -> tuple[list[Rollout], list[Rollout]]:
    """Draw correct and wrong siblings of a rollout, as many as the context shows."""
    counts = {
        "sdpo": (int(config.siblings), 0),
        "positive": (config.successes, 0),
        "contrastive": (config.successes, config.failures),
        "failure": (0, config.failures),
    }
    successes, failures = counts[config.context]
    others = [peer for peer in group if peer.sample != mine.sample]
    right = _draw([peer for peer in others if peer.verdict.success], successes, draws[0])
    # A contrast needs a correct answer.
    wanted = failures if right or config.context == "failure" else 0
    return right, _draw([peer for peer in others if not peer.verdict.success], wanted, draws[1])


def _controlled(
    mine: Rollout, right: list[Rollout], wrong: list[Rollout], pool: Sequence[Rollout], control: str, key: int
) -> tuple[list[Rollout], list[Rollout]]:
    """Apply the control: keep the number of blocks, replace the answers in them."""
    if control == "none":
        return right, wrong
    siblings = [peer for peer in pool if peer.group == mine.group and peer.sample != mine.sample]
    strangers = [peer for peer in pool if peer.group != mine.group]
    if control == "random_sibling":
        drawn = _draw(siblings, len(right) + len(wrong), key)
        return drawn[: len(right)], drawn[len(right) :]
    if control == "successes_only":
        return right + _draw(
            [peer for peer in siblings if peer.verdict.success and peer not in right] or right,
            len(wrong),
            key,
        ), []
    replaced = [_nearest(strangers, block, key, index) for index, block in enumerate(right + wrong)]
    return replaced[: len(right)], replaced[len(right) :]


def _nearest(candidates: Sequence[Rollout], block: Rollout, *key: int) -> Rollout:
    """Draw a candidate among those of the length nearest to the block's, in tokens.

    Candidates with the block's verdict are preferred; without any candidate the block itself is returned.
    """
    alike = [peer for peer in candidates if peer.verdict.success == block.verdict.success]
    among = alike or list(candidates) or [block]
    least = min(abs(len(peer.tokens) - len(block.tokens)) for peer in among)
    closest = [peer for peer in among if abs(len(peer.tokens) - len(block.tokens)) == least]
    return closest[seeds.pick(len(closest), *key)]


def _draw(items: Sequence[Rollout], count: int, key: int) -> list[Rollout]:
    """Draw `count` different items, or all if there are fewer."""
    if not items or count == 0:
        return []
    if count == 1:
        return [items[key % len(items)]]
    return [items[index] for index in seeds.shuffled(range(len(items)), key)[:count]]


def neutralise(text: str, markers: Sequence[str]) -> str:
    """Break every marker in `text` by a space after its first character; nothing else changes.

    Markers are also found in other case, in compatibility forms (NFKC) and with invisible characters inside,
    since a tokenizer may fold those away. Repeated until none is left, since a break may complete another
    marker.
    """
    pattern = _pattern(tuple(markers))
    folded, origins = _folded(text)
    while matches := list(pattern.finditer(folded)):
        pieces, done = [], 0
        for found in matches:
            first, last = origins[found.start()], origins[found.end() - 1]
            if first < done:
                continue
            # One character that stands for a whole marker, as a ligature, is spelled out, to be broken next.
            pieces += [text[done:first], text[first] + " " if last > first else _folded(text[first])[0]]
            done = first + 1
        text = "".join([*pieces, text[done:]])
        folded, origins = _folded(text)
    return text


def _folded(text: str) -> tuple[str, Sequence[int]]:
    """Return the text as a tokenizer may fold it, and for each character its position in the original."""
    if text.isascii():
        return text.lower(), range(len(text))
    pieces, origins = [], []
    for place, char in enumerate(text):
        if unicodedata.category(char) != "Cf":
            # Decomposed, so that characters fold one by one; `upper` since a dotless i has no other fold.
            piece = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).upper().casefold())
            pieces.append(piece)
            origins += [place] * len(piece)
    return "".join(pieces), origins


# Texts of 64 kB make this 64 MB.
@functools.lru_cache(maxsize=1_000)
def _neutral(text: str, markers: tuple[str, ...]) -> str:
    return neutralise(text, markers)


@functools.lru_cache(maxsize=16)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    folded = {_folded(marker)[0] for marker in markers}
    return re.compile("|".join(re.escape(marker) for marker in sorted(folded) if len(marker) > 1) or r"\Z\A.")


def forbidden_markers(tokenizer: PreTrainedTokenizerBase, template: ContextTemplate) -> tuple[str, ...]:
    """Return every string with a meaning to the tokenizer, the chat template or the blocks."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True
    )
    pieces = [piece.strip() for piece in str(frame).split(PROBE)]
    candidates = [*added, *tokenizer.all_special_tokens, *pieces, *template.markers()]
    # A single character cannot be broken, and ends no block; nor do the runs of spaces in some tokenizers.
    return tuple(sorted({marker for marker in candidates if len(marker) > 1 and marker.strip()}))
