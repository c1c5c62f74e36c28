"""Runs a module of this directory in several gloo processes, one thread each."""

from __future__ import annotations

import datetime
import functools
import json
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from forks import Forks

HERE = Path(__file__).parent
TIMEOUT_S = 300


def launch(
    script: str, world: int, folder: Path, *arguments: str, timeout_s: float = TIMEOUT_S
) -> list[dict]:
    """What each rank wrote as its result. Fails with the output of a rank that failed."""
    places = [(folder / f"rank{rank}.json", folder / f"rank{rank}.log") for rank in range(world)]
    ranks = [
        ((str(rank), str(world), str(folder / "rendezvous"), str(result), *arguments), str(log))
        for rank, (result, log) in enumerate(places)
    ]
    codes = forks().run(script.removesuffix(".py"), ranks, timeout_s)
    assert not any(codes), "\n".join(
        f"rank {rank} ended with {code}:\n{places[rank][1].read_text()[-3000:]}"
        for rank, code in enumerate(codes)
        if code
    )
    return [json.loads(result.read_text()) for result, _ in places]


@functools.cache
def forks() -> Forks:
    """Start the process that forks all ranks of this session, until `end_forks`."""
    return Forks("imported", HERE, OMP_NUM_THREADS="1")


def end_forks() -> None:
    if forks.cache_info().currsize:
        forks().end()


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


def once(make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes, on every rank: references that all ranks would compute alike."""
    import torch.distributed as dist

    made, error = None, None
    if dist.get_rank() == 0:
        try:
            made = make()
        except Exception as raised:  # told to the others, which would wait
            error = raised
    told = [made, error]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


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
