"""Runs a script of this directory in several gloo processes, one thread each."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
TIMEOUT_S = 300


def launch(
    script: str, world: int, folder: Path, *arguments: str, timeout_s: float = TIMEOUT_S
) -> list[dict]:
    """What each rank wrote as its result. Fails with the output of a rank that failed."""
    paths = os.pathsep.join((str(HERE.parents[1]), str(HERE.parent / "helpers")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    places = [(folder / f"rank{rank}.json", folder / f"rank{rank}.log") for rank in range(world)]
    processes = []
    for rank, (result, log) in enumerate(places):
        command = [
            sys.executable,
            str(HERE / script),
            str(rank),
            str(world),
            str(folder / "rendezvous"),
            str(result),
            *arguments,
        ]
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(
        f"rank {rank} ended with {code}:\n{places[rank][1].read_text()[-3000:]}"
        for rank, code in enumerate(codes)
        if code
    )
    return [json.loads(result.read_text()) for result, _ in places]


def join(rank: str, world: str, rendezvous: str, timeout_s: float = 240.0) -> None:
    """Join the default process group; call it in a rank.

    A rank that waits longer than `timeout_s` for the others fails.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world), timeout=timeout
    )


def run_checks(world: str, result: str, checks: Mapping[str, Sequence[Any]]) -> NoReturn:
    """Run each check, (function, *arguments), write what failed as the rank's result, and end the rank."""
    import torch.distributed as dist

    outcomes = {}
    for name, (function, *arguments) in checks.items():
        try:
            function(*arguments)
            outcomes[name] = None
        except Exception:  # reported by name; the other checks still run
            outcomes[name] = traceback.format_exc()[-2000:]
        failed = [None] * int(world)
        dist.all_gather_object(failed, outcomes[name] is not None)  # also syncs the ranks after a failure
    Path(result).write_text(json.dumps(outcomes))
    leave()


def assert_none_failed(results: list[dict]) -> None:
    """Every check of every rank left None, not a traceback."""
    failed = {
        f"{name}, rank {rank}": text
        for rank, result in enumerate(results)
        for name, text in result.items()
        if text is not None
    }
    assert not failed, f"{len(failed)} failed: " + "\n".join(
        f"{name}: {text}" for name, text in list(failed.items())[:6]
    )


def leave() -> NoReturn:
    """End a rank whose result is written.

    At interpreter shutdown gloo's threads may outlive the objects they use and abort the process
    (torch 2.13).
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
