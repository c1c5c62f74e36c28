"""From a problem and a context to token ids, through the model's own chat template. Student, teacher and warm start all come through here."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opsd_kernels.train.contexts import ContextTemplate, forbidden_markers
from opsd_kernels.train.types import Context, Prompt


class PromptEncoder:
    """Encodes user turns. Raises ValueError for a tokenizer without a chat template or an end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ContextTemplate):
        if tokenizer.chat_template is None:
            raise ValueError("model: expected a tokenizer with a chat template (an instruction-tuned model; chat_template gives it one), got one without")
        if tokenizer.eos_token_id is None:
            raise ValueError("model: expected a tokenizer with an end-of-sequence token, got one without")
        self.tokenizer, self.template = tokenizer, template
        self.markers = forbidden_markers(tokenizer, template)

    def encode(self, prompts: Sequence[Prompt], contexts: Sequence[Context | None]) -> list[tuple[int, ...]]:
        """Token ids up to and including the start of the assistant's turn, one tuple per prompt."""
        turns = [self.template.render(prompt.text, context, self.markers) for prompt, context in zip(prompts, contexts, strict=True)]
        if not turns:
            return []
        chats = [[*prompt.before, {"role": "user", "content": turn}] for prompt, turn in zip(prompts, turns, strict=True)]
        rendered = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template has written them already
        return [tuple(row) for row in ids]

    def answer(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of answers, each closed by the end-of-sequence token."""
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [(*row, self.tokenizer.eos_token_id) for row in ids]

    @functools.cache  # noqa: B019 - a run has one encoder
    def containing(self, text: str) -> frozenset[int]:
        """The token ids whose text holds `text`."""
        return frozenset(token for token in self.tokenizer.get_vocab().values() if text in self.tokenizer.decode([token]))
