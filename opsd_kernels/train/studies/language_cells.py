"""Compute the runs of a language model for a study: arguments in, plain numbers out.

The trainer's measurements, of the teacher and of both skills before and after every run, would take as long
as its steps. Here the base model, which all runs share, is measured once, a trained one only without context.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records import checkpoint
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.sampling import evaluate
from opsd_kernels.train.sampling.prompts import PromptEncoder
from opsd_kernels.train.sampling.rollout import Sampler, make_engine
from opsd_kernels.train.session import reproducible
from opsd_kernels.train.studies import cells
from opsd_kernels.train.task import checked_task

SKILLS = {"held_out_accuracy": "held_out", "untrained_skill": "untrained"}


def train(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the trainer; return its steps, curves and costs, and the skills of the trained model."""
    # One group, the least that the trainer measures.
    run = cells.train({**arguments, "eval_samples": 1}, folder)
    trained = checkpoint.latest(folder / "run" / "checkpoint")
    return {
        **{name: run[name] for name in ("steps", "curves", "costs")},
        **skills(replace(TrainConfig(**arguments), model=str(trained)), "after"),
    }


def before(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure the skills of a base model."""
    return skills(TrainConfig(**arguments), "before")


def skills(config: TrainConfig, when: str) -> dict[str, float | None]:
    """Return the shares of right answers of a model without context, of `eval_samples` answers each."""
    task = checked_task(config)
    with reproducible(config):
        model, tokenizer = pretrained.load_student(loop.base_of(config, task, Progress()), None, config)
        sampler = Sampler(
            PromptEncoder(tokenizer, task.template),
            config.max_new_tokens,
            config.rollout_temperature,
            config.rollout_batch,
            pretrained.vocabulary(tokenizer),
            make_engine(config),
            longest=pretrained.context_length(model.config),
            shares_prompts=config.shares_prompts,
        )
        return {
            f"{name}_{when}": evaluate.accuracy(
                sampler, model, task, getattr(task, split), config.eval_samples, config.seed
            )
            for name, split in SKILLS.items()
        }
