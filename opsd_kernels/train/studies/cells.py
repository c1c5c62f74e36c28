"""Compute the cells of a study in a worker process: plain arguments in, plain numbers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.models import warmstart
from opsd_kernels.train.records.log import Progress, read_metrics

CURVES = (
    "held_out_accuracy",
    "self_teacher_accuracy",
    "untrained_skill",
    "reward",
    "divergence",
    "sampled_logprob_gap",
    "student_entropy",
    "top1_agreement",
)
COSTS = ("completion_tokens", "teacher_tokens", "context_tokens")


def train(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the trainer; return its summary, `curves` as lists of (step, value), and `costs` in tokens."""
    summary = loop.train(TrainConfig(**arguments), folder / "run")
    metrics = read_metrics(folder / "run" / "metrics.jsonl")
    curves = {
        name: [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        for name in CURVES
    }
    costs = {name: sum(line[name] for line in metrics) for name in COSTS}
    generated = len(metrics) * arguments["prompts_per_step"] * arguments["group_size"]
    return {**summary, "curves": curves, "costs": {"generated_answers": generated, **costs}}


def warm(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the base model, unless the cache has it."""
    config = TrainConfig(**arguments)
    return {"folder": str(warmstart.base_model(config, make_task(config), Progress()))}
