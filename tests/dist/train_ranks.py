"""Run one rank of the trainer, as a launcher would start it. See test_train_ranks.py.

The jobs are a JSON list of [configuration, run directory, how]. `interrupt`: the last rank gets Ctrl-C after
the third step. `stop`: the same by SIGTERM, and nothing is counted. `resume`: the run continues. `full`: the
disk of the first rank is full. `slow`: its first save takes six seconds. `die`: the last rank is killed in
the middle of a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launching import join, leave
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels.train import loop, objective, step
from opsd_kernels.train.config import load_config
from opsd_kernels.train.distributed import sharding
from opsd_kernels.train.records import checkpoint
from opsd_kernels.train.types import CheckpointError, TrainingInterrupted

STOP_AFTER, DIE_AFTER = 3, 5  # steps; losses
SLOW_S = 6


def even(answer: str, row: dict[str, Any]) -> bool:
    """Accept many answers of a model with random weights."""
    return sum(map(ord, answer)) % 2 == 0


def pressing_ctrl_c(plain: Any, number: int = signal.SIGINT) -> Any:
    """Wrap one_step to interrupt its own process."""

    def one_step(run: loop.Run) -> dict[str, Any]:
        metrics = plain(run)
        if metrics["step"] == STOP_AFTER:
            os.kill(os.getpid(), number)
        return metrics

    return one_step


def dying(plain: Any) -> Any:
    """Replace step_loss by one that kills the process."""
    calls = []

    def step_loss(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == DIE_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    return step_loss


def no_space(tensors: dict[str, Any], path: Path) -> None:
    """Raise the error of a full disk from the second file on."""
    if path.name != "teacher.safetensors":
        raise OSError(28, "No space left on device")


def slow(plain: Any) -> Any:
    """Wrap save_file to take its time at the first file."""
    calls = []

    def save_file(tensors: dict[str, Any], path: Path) -> None:
        if not calls:
            time.sleep(SLOW_S)
        calls.append(path)
        plain(tensors, path)

    return save_file


def local_bytes(run: loop.Run) -> dict[str, int]:
    """Return the sizes of this rank's part of the state."""

    def size(tensors: Any) -> int:
        return sum(
            local.numel() * local.element_size()
            for local in (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
        )

    state = run.state
    moments = [
        value for entry in state.optimizer.state.values() for name, value in entry.items() if name != "step"
    ]
    copies = [
        teacher.model
        for teacher in (state.teacher, state.reference)
        if teacher is not None and teacher.model is not state.model
    ]
    return {
        "model": size(state.model.parameters()),
        "optimizer": size(moments),
        "copies": size(p for copy in copies for p in copy.parameters()),
    }


class Gathers(TorchDispatchMode):
    """A record of the sizes of all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name() == "c10d::_allgather_base_":
            self.sizes.append(arguments[0].numel())
        return function(*arguments, **(options or {}))


def counting(plain: Any, calls: list[tuple[int, int]]) -> Any:
    """Wrap `gradients` to record its micro-batches and the all-gathers of the root (embedding and head)."""

    def gradients(
        student: Any, teacher: Any, batch: Any, config: Any, *rest: Any, ranks: Any, **known: Any
    ) -> Any:
        sharding.release(student)  # computing old log-probs leaves it unsharded
        with Gathers() as gathers:
            result = plain(student, teacher, batch, config, *rest, ranks=ranks, **known)
        inside = {id(p) for unit in sharding.units(student)[1:] for p in unit.parameters()}
        padded = [
            -(-p.shape[0] // ranks.world) * ranks.world * p.numel() // p.shape[0]
            for p in student.parameters()
            if id(p) not in inside
        ]
        calls.append(
            (sum(map(len, step.share(batch, config, ranks, equally=True))), gathers.sizes.count(sum(padded)))
        )
        return result

    return gradients


def measuring(plain: Any, told: dict[str, Any]) -> Any:
    """Wrap one_step to count, with the op in one chunk and, in the second step, in many."""
    gradients = step.gradients

    def one_step(run: loop.Run) -> dict[str, Any]:
        calls: list[tuple[int, int]] = []
        step.gradients = counting(gradients, calls)
        if run.state.step == 1:
            os.environ["OPSD_WORKSPACE_BYTES"] = "1000"
        metrics = plain(run)
        os.environ.pop("OPSD_WORKSPACE_BYTES", None)
        told.setdefault("bytes", local_bytes(run))
        told.setdefault("gathers", []).append(calls)
        return metrics

    return one_step


def work(config: str, out: str, how: str, last: bool) -> dict[str, Any]:
    told: dict[str, Any] = {}
    plain, write, loss = loop.one_step, checkpoint.save_file, objective.step_loss
    gradients = step.gradients
    if how == "interrupt":
        loop.one_step = measuring(plain, told) if load_config(config).shard == "fsdp" else plain
        loop.one_step = pressing_ctrl_c(loop.one_step) if last else loop.one_step
    if how == "stop" and last:
        loop.one_step = pressing_ctrl_c(plain, signal.SIGTERM)
    if how == "full":
        checkpoint.save_file = no_space
    if how == "slow":
        checkpoint.save_file = slow(write)
    if how == "die" and last:
        objective.step_loss = dying(loss)
    try:
        return told | loop.train(load_config(config), Path(out), resume=how == "resume")
    except TrainingInterrupted as stopped:
        return told | {"interrupted": str(stopped), "number": stopped.number}
    except CheckpointError as error:
        return {"error": str(error)}
    finally:
        loop.one_step, checkpoint.save_file, objective.step_loss = plain, write, loss
        step.gradients = gradients


def main(rank: str, world: str, rendezvous: str, result: str, jobs: str, timeout_s: str = "240") -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": world}
    join(rank, world, rendezvous, float(timeout_s))
    ended = [work(*job, last=rank == str(int(world) - 1)) for job in json.loads(jobs)]
    Path(result).write_text(json.dumps(ended))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
