"""The environments by name: problems, verifiers and feedback."""

from __future__ import annotations

from collections.abc import Callable

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs.base import DemoTask, Env, Task
from opsd_kernels.train.envs.chain import Chain
from opsd_kernels.train.envs.expr import Expr
from opsd_kernels.train.envs.jsonl import Jsonl, PromptCheck
from opsd_kernels.train.envs.mastermind import Mastermind
from opsd_kernels.train.envs.plan import Plan
from opsd_kernels.train.envs.python import Python
from opsd_kernels.train.envs.secret_op import SecretOp

__all__ = ["DemoTask", "Env", "Task", "make_task"]

DEMOS: dict[str, Callable[[str, bool], DemoTask]] = {
    "secret_op": SecretOp,
    "expr": Expr,
    "mastermind": Mastermind,
    "chain": Chain,
    "plan": Plan,
}


def make_task(config: TrainConfig, check: PromptCheck | None = None) -> Task:
    """Make the configured task. Raises ConfigError for a wrong data file or verifier, or no sandbox.

    `check` is asked about the prompts of a data file, as the model's tokenizer decides which it accepts.
    """
    if config.env == "jsonl":
        return Jsonl(config, check)
    if config.env == "python":
        return Python(config.feedback)
    return DEMOS[config.env](config.feedback, config.shows_peers)
