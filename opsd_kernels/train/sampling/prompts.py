"""Encode a problem and a context into token ids through the model's chat template.

Student, teacher and warm start share this path.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.contexts import ContextTemplate, forbidden_markers
from opsd_kernels.train.types import Context, Prompt

PROBES = (
    "q7Zk",
    "0",
    "a  b\n\n c",
    "{{ a }} {% b %} <b> </b> [c] | \\n 'd' \"e\" &amp;",
    "A\u00e9\u4e2d" * 50,
)
# Bytes of cached turns, by `_size`: 20 000 turns of 80 tokens, 400 of 4096.
REMEMBERED_BYTES = 64 << 20


class PromptEncoder:
    """An encoder of user turns.

    Raises ConfigError for a tokenizer without a chat template or an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ContextTemplate):
        if tokenizer.chat_template is None:
            raise ConfigError(
                "model: expected a tokenizer with a chat template (an instruction-tuned model; "
                "chat_template gives it one), got one without"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("model: expected a tokenizer with an end-of-sequence token, got one without")
        self.tokenizer, self.template = tokenizer, template
        self.markers = forbidden_markers(tokenizer, template)
        self.frame = verbatim_frame(tokenizer)
        # A group asks the same question, and so does the next epoch.
        self._known: dict[str, tuple[int, ...]] = {}
        self._bytes = 0

    def encode(self, prompts: Sequence[Prompt], contexts: Sequence[Context | None]) -> list[tuple[int, ...]]:
        """Return token ids up to and including the start of the assistant's turn, one tuple per prompt."""
        turns = [
            self.template.render(prompt.text, context, self.markers)
            for prompt, context in zip(prompts, contexts, strict=True)
        ]
        if not turns:
            return []
        rendered = [self._chat(prompt, turn) for prompt, turn in zip(prompts, turns, strict=True)]
        new = [text for text in dict.fromkeys(rendered) if text not in self._known]
        if new:
            # The template has added the special tokens.
            ids = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            fresh = dict(zip(new, map(tuple, ids), strict=True))
            self._known |= fresh
            self._bytes += sum(_size(text, row) for text, row in fresh.items())
        rows = [self._known[text] for text in rendered]
        if self._bytes > REMEMBERED_BYTES:
            self._known.clear()
            self._bytes = 0
        return rows

    def _chat(self, prompt: Prompt, turn: str) -> str:
        # A template takes .2 ms per prompt, which was 28 % of a step of the tiny model.
        if self.frame is not None and not prompt.before and turn and turn == turn.strip():
            return self.frame[0] + turn + self.frame[1]
        chat = [*prompt.before, {"role": "user", "content": turn}]
        return _rendered(self.tokenizer, chat)

    def answer(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the token ids of answers, each followed by the end-of-sequence token."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [(*row, self.tokenizer.eos_token_id) for row in ids]

    @functools.cache  # noqa: B019 - a run has one encoder
    def containing(self, text: str) -> frozenset[int]:
        """Return the token ids whose text contains `text`."""
        return frozenset(
            token for token in self.tokenizer.get_vocab().values() if text in self.tokenizer.decode([token])
        )


def complaints(
    encoder: PromptEncoder, prompts: Sequence[Prompt], longest: int | None
) -> list[tuple[str, str] | None]:
    """Return for each prompt what was expected of it and what came; None for one that can be asked.

    `longest` is the largest number of tokens, None without a limit.
    """
    found: list[tuple[str, str] | None] = []
    for prompt in prompts:
        try:
            length = len(encoder.encode([prompt], [None])[0])
        # Of any kind, since a template is a program of the model's author.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            found.append(("a prompt that the chat template and the tokenizer accept", reason))
            continue
        found.append(
            (
                f"a prompt of at most {longest} tokens, which leaves the model room to answer",
                f"{length} tokens",
            )
            if longest is not None and length > longest
            else None
        )
    return found


def verbatim_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return the chat template's text before and after a single user turn, or None.

    None if the template changes turns that neither begin nor end in white space.
    """

    def rendered(text: str) -> str:
        return _rendered(tokenizer, [{"role": "user", "content": text}])

    before, found, after = rendered(PROBES[0]).partition(PROBES[0])
    kept = found and all(rendered(probe) == before + probe + after for probe in PROBES)
    return (before, after) if kept else None


def _size(text: str, row: tuple[int, ...]) -> int:
    # Python has objects for the integers up to 256 only; any other one takes 28 bytes.
    return sys.getsizeof(text) + sys.getsizeof(row) + 28 * len(row)


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text
