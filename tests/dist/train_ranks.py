"""One rank of a run of the trainer, as a launcher would start it. `interrupt`: the last rank gets Ctrl-C after the third step. See test_train_ranks.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from launching import join, leave

from opsd_kernels.train import loop
from opsd_kernels.train.config import load_config
from opsd_kernels.train.types import TrainingInterrupted


def interrupting(step: int):
    """one_step that presses Ctrl-C in its own process."""
    plain = loop.one_step

    def one_step(run):
        metrics = plain(run)
        if metrics["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    return one_step


def main(rank: str, world: str, rendezvous: str, result: str, config: str, out: str, how: str) -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": world}
    join(rank, world, rendezvous)
    if how == "interrupt" and rank == str(int(world) - 1):
        loop.one_step = interrupting(3)
    try:
        ended = loop.train(load_config(config), Path(out), resume=how == "resume")
    except TrainingInterrupted as stopped:
        ended = {"interrupted": str(stopped)}
    Path(result).write_text(json.dumps(ended))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
