"""The feedback environments by name."""

from __future__ import annotations

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.envs.base import Env, Task
from opsd_kernels.train.envs.secret_op import SecretOp

__all__ = ["Env", "SecretOp", "Task", "make_task"]

TASKS: dict[str, type[SecretOp]] = {"secret_op": SecretOp}


def make_task(config: TrainConfig) -> Task:
    return TASKS[config.env](config.feedback)
