"""Make the task of a run, the rows of a data file checked against the model that will read them."""

from __future__ import annotations

from collections.abc import Sequence

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.envs.base import Task
from opsd_kernels.train.envs.jsonl import Jsonl
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.sampling.prompts import PromptEncoder, complaints
from opsd_kernels.train.types import Prompt


def checked_task(config: TrainConfig) -> Task:
    """Make the configured task before the weights of its model load.

    Raises ConfigError that names every row of a data file that the run cannot use: one that is wrong in
    itself, that the chat template or the tokenizer refuses, or that leaves no room for an answer in the
    context of the model.
    """
    if config.env != "jsonl":
        return make_task(config)
    encoder = PromptEncoder(pretrained.load_tokenizer(config), Jsonl.template)
    length = pretrained.named_context_length(config)

    def check(prompts: Sequence[Prompt]) -> list[tuple[str, str] | None]:
        return complaints(encoder, prompts, None if length is None else length - config.max_new_tokens)

    return make_task(config, check)
