"""The privileged view: what the teacher is told that the student is not.

`sdpo`, eq. 1 of arXiv:2601.20802: the problem, a *correct* answer of the same group if there is one other than this rollout, the environment's feedback
if this attempt failed, and the instruction to solve. The failed attempt itself is not shown, unless the feedback quotes it.
`positive`, `contrastive`, `failure`, MOPD (arXiv:2605.12652): right siblings to imitate, the same and wrong ones to avoid, wrong ones alone; feedback
beside them if the environment gives any. A rollout with nothing to show has no context and stays out of the loss.
`none`: the teacher sees what the student sees (ordinary on-policy distillation), and every rollout is in the loss.

A control keeps the number of blocks of a view and replaces what is in them by answers of about as many tokens.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsd_kernels.train import seeds
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.types import Context, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "0"  # a text that every chat template keeps as it is
RIGHT, WRONG, INSTEAD = 1, 2, 3  # streams of random numbers


@dataclass(frozen=True)
class ContextTemplate:
    """How the blocks of the teacher's user turn open and close."""

    demonstration: tuple[str, str] = ("<solution>\nA correct solution:\n", "\n</solution>")
    failure: tuple[str, str] | None = ("<failure>\nAn unsuccessful attempt, to be avoided:\n", "\n</failure>")
    feedback: tuple[str, str] = (
        "<feedback>\nFeedback on your earlier, unsuccessful attempt:\n",
        "\n</feedback>",
    )
    instruction: str = "Solve the original problem."

    @classmethod
    def words(cls, instruction: str, failures: bool) -> ContextTemplate:
        """Nothing but the markers, each one token of the tiny tokenizer, which has those of failures only if it is to read some."""
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
        """The strings whose appearance inside a block could end it or open another."""
        lines = (line.strip() for block in self.blocks() for side in block for line in side.splitlines())
        return tuple(line for line in lines if line.startswith("<"))

    def render(self, problem: str, context: Context | None, markers: Sequence[str]) -> str:
        """The user turn. Without a context it is the problem alone; the texts in the blocks are neutralised."""
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
    """A context per rollout, None where there is nothing to show. `key` (seed, step) and the rollout's place decide every draw."""
    if config.context == "none":
        return [Context() for _ in rollouts]
    # Sorted, so that a draw means the same rollout in whatever order they come.
    pool = sorted(rollouts, key=lambda rollout: (rollout.group, rollout.sample))
    groups: dict[int, list[Rollout]] = {}
    for rollout in pool:
        groups.setdefault(rollout.group, []).append(rollout)
    places = np.array([(rollout.group, rollout.sample) for rollout in rollouts], dtype=np.uint64)
    keys = seeds.mix(
        *key, places[:, :1], places[:, 1:], np.array([RIGHT, WRONG, INSTEAD])
    ).tolist()  # all at once: one by one they took 3 % of a step
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
    """Right and wrong answers of the rollout's group, other than itself, as many as the view shows. Drawn at random."""
    counts = {
        "sdpo": (int(config.siblings), 0),
        "positive": (config.successes, 0),
        "contrastive": (config.successes, config.failures),
        "failure": (0, config.failures),
    }
    successes, failures = counts[config.context]
    others = [peer for peer in group if peer.sample != mine.sample]
    right = _draw([peer for peer in others if peer.verdict.success], successes, draws[0])
    # A contrast needs something to imitate: without a success there is none.
    wanted = failures if right or config.context == "failure" else 0
    return right, _draw([peer for peer in others if not peer.verdict.success], wanted, draws[1])


def _controlled(
    mine: Rollout, right: list[Rollout], wrong: list[Rollout], pool: Sequence[Rollout], control: str, key: int
) -> tuple[list[Rollout], list[Rollout]]:
    """The same number of blocks with other answers in them."""
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
    replaced = [
        _nearest(
            strangers,
            block,
            lambda peer, like=block: peer.verdict.success == like.verdict.success,
            key,
            index,
        )
        for index, block in enumerate(right + wrong)
    ]
    return replaced[: len(right)], replaced[len(right) :]


def _nearest(
    candidates: Sequence[Rollout], block: Rollout, fits: Callable[[Rollout], bool], *key: int
) -> Rollout:
    """A random one of those whose length is nearest to the block's, in tokens; one that fits if there is any, the block itself without a candidate."""
    among = [peer for peer in candidates if fits(peer)] or list(candidates) or [block]
    least = min(abs(len(peer.tokens) - len(block.tokens)) for peer in among)
    closest = [peer for peer in among if abs(len(peer.tokens) - len(block.tokens)) == least]
    return closest[seeds.pick(len(closest), *key)]


def _draw(items: Sequence[Rollout], count: int, key: int) -> list[Rollout]:
    """`count` different ones, or all there are."""
    if not items or count == 0:
        return []
    if count == 1:
        return [items[key % len(items)]]
    return [items[index] for index in seeds.shuffled(range(len(items)), key)[:count]]


def neutralise(text: str, markers: Sequence[str]) -> str:
    """`text` in which no marker appears: a space after a marker's first character breaks it.

    Capitals, compatibility forms (NFKC) and invisible characters hide no marker, since a tokenizer may fold them away. Repeated until none is left,
    since a break may complete another marker. A text without markers stays as it is.
    """
    pattern = _pattern(tuple(markers))
    plain = "".join(
        char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf"
    )
    if not pattern.search(plain) and not pattern.search(text):
        return text
    while pattern.search(plain):
        plain = pattern.sub(lambda found: found[0][0] + " " + found[0][1:], plain)
    return plain


@functools.lru_cache(maxsize=10_000)
def _neutral(text: str, markers: tuple[str, ...]) -> str:
    return neutralise(text, markers)


@functools.lru_cache(maxsize=16)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)) or r"\Z\A.", re.IGNORECASE)


def forbidden_markers(tokenizer: PreTrainedTokenizerBase, template: ContextTemplate) -> tuple[str, ...]:
    """Every string that means something to the tokenizer, the chat template or the blocks."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    frame = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True
    )
    pieces = [piece.strip() for piece in frame.split(PROBE)]
    candidates = [*added, *tokenizer.all_special_tokens, *pieces, *template.markers()]
    # A single character cannot be broken in two, and ends no block; nor do the runs of spaces that some tokenizers hold.
    return tuple(sorted({marker for marker in candidates if len(marker) > 1 and marker.strip()}))
