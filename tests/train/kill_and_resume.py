"""Run trainers in forked processes and end them with a signal.

    python kill_and_resume.py SETTINGS_JSON FOLDER [SEED | short]

Without a seed signals come at given moments; with one, a run in FOLDER/hurt is killed at random moments until
it completes. `short` is for a large model: two steps, three events.
Forking after the imports saves a second of start-up per attempt. Prints JSON: an object of moments that hit
and exit codes, or the list of exit codes.
"""

import dataclasses
import errno
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from opsd_kernels.train import loop
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.loop import train
from opsd_kernels.train.types import CheckpointError, TrainingInterrupted

KILL, CTRL_C, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
# A limit on the size of a file stands for a full disk: logs fit, weights do not.
ROOM = 1 << 20


def attempt(
    config: TrainConfig,
    out: Path,
    moment: Callable[[], bool] | None,
    number: int = KILL,
    full_disk: bool = False,
) -> int:
    """Train in a child process and send it a signal once `moment()` is true.

    Returns its exit code, negative for a signal; 130 is TrainingInterrupted, ENOSPC CheckpointError.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if full_disk:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG instead of a signal, like ENOSPC
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        try:
            train(config, out, resume=out.exists())
        except TrainingInterrupted:
            os._exit(130)
        except CheckpointError:
            os._exit(errno.ENOSPC)
        os._exit(0)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if moment is not None and moment():
            os.kill(child, number)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.0005)


def pending(folder: Path, name: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(f".pending-{name}*"))


def later(condition: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    since: list[float] = []

    def holds() -> bool:
        if not since and condition():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= seconds

    return holds


def moments(out: Path, cache: Path) -> dict[str, tuple[Callable[[], bool], int]]:
    """Return the moments at which a run is interrupted, in their order."""
    log, folder = out / "metrics.jsonl", out / "checkpoint"

    def lines(count: int) -> Callable[[], bool]:
        return lambda: log.exists() and log.read_bytes().count(b"\n") >= count

    return {
        "warm start": (later((out / "config.json").exists, 0.3), KILL),
        "Ctrl-C in the warm start": (later((out / "config.json").exists, 0.5), CTRL_C),
        "writing the cache": (pending(cache / "warmstart", ""), KILL),
        "writing the first checkpoint": (pending(folder, "step_000000"), KILL),
        "in a step": (lines(1), KILL),
        "after a checkpoint, in a step": (lines(3), KILL),
        "writing a checkpoint": (pending(folder, "step_000004"), KILL),
        "later while writing a checkpoint": (later(pending(folder, "step_000004"), 0.01), KILL),
        "Ctrl-C": (lines(5), CTRL_C),
        "after the last step": (lines(8), KILL),
    }


def short(config: TrainConfig, root: Path) -> dict[str, tuple[int, str]]:
    """Make an undisturbed run of two steps, and one that is disturbed three times.

    Returns by event the exit code and the newest checkpoint.
    """
    out, begun = root / "hurt", root / "begun"
    folder, plain, found = out / "checkpoint", loop.one_step, {}

    def one_step(run: loop.Run) -> loop.StepMetrics:
        begun.touch()
        return plain(run)

    attempt(dataclasses.replace(config, checkpoint_every=2), root / "whole", None)
    loop.one_step = one_step
    for name, moment, number in (
        ("SIGTERM in a step", later(begun.exists, 0.1), TERM),
        ("full disk", None, KILL),
        ("writing a checkpoint", pending(folder, "step_000002"), KILL),
        ("last", None, KILL),
    ):
        code = attempt(config, out, moment, number, full_disk=name == "full disk")
        found[name] = code, max(path.name for path in folder.glob("step_*"))
    return found


def random_kills(config: TrainConfig, out: Path, seed: int) -> list[int]:
    """Kill attempts at random moments, each later, until one completes; return all exit codes."""
    draw, codes, budget = random.Random(seed), [], 0.4
    while not codes or codes[-1] == -KILL:
        end = time.monotonic() + draw.uniform(0, budget)
        codes.append(attempt(config, out, lambda end=end: time.monotonic() >= end))
        # Longer attempts let a busy machine complete the run, after several kills.
        budget = min(budget * 1.3, 4.0)
        if len(codes) > 40:
            codes.append(attempt(config, out, None))
    return codes


def main(settings: str, folder: str, seed: str | None = None) -> None:
    values, root = json.loads(settings), Path(folder)
    if seed == "short":
        print(json.dumps(short(TrainConfig(**values), root)))
        return
    if seed is not None:
        print(json.dumps(random_kills(TrainConfig(**values), root / "hurt", int(seed))))
        return
    whole = TrainConfig(**{**values, "cache_dir": str(root / "cache_whole")})
    hurt = TrainConfig(**{**values, "cache_dir": str(root / "cache_hurt")})
    codes = {"whole": attempt(whole, root / "whole", None)}
    for name, (moment, number) in moments(root / "hurt", root / "cache_hurt").items():
        codes[name] = attempt(hurt, root / "hurt", moment, number)
    codes["last"] = attempt(hurt, root / "hurt", None)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
