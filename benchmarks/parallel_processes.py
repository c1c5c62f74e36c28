"""Two gloo processes: their collectives, and whole steps with the vocabulary or the tokens split."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_groups import EchoGroup, Gate, cut, merged
from parallel_shards import grouped, plainly
from torch import Tensor

from opsd_kernels import VocabShard, linear_divergence
from opsd_kernels.bench.measure.gate import CHECKED_ROWS, TOKENS
from opsd_kernels.bench.measure.timing import Variant, cpu_clock, ratio
from opsd_kernels.bench.parallel import ring_gather, ring_sum
from opsd_kernels.bench.providers import Op, bare_gemms, stepper
from opsd_kernels.bench.shapes import Setting, make_case
from opsd_kernels.testing import Case, Outcome, evaluate

WORLD = 2  # processes
LIMIT_S = 900  # for the whole run, which takes two minutes on an idle machine


def in_step(variants: dict[str, tuple[Variant, bool]], rounds: int) -> dict[str, Variant]:
    """Time variants that all ranks run (True) or rank 0 alone (False).

    Each timed run comes directly after an untimed one of the same variant. A time is that of the slowest
    rank.
    """
    for turn in range(-1, rounds):
        for variant, all_ranks in variants.values():
            reading = 0.0
            if all_ranks or dist.get_rank() == 0:
                variant.run()
            dist.barrier()
            if all_ranks or dist.get_rank() == 0:
                reading = cpu_clock(variant)()
            slowest = torch.tensor(reading, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 0:
                variant.times[turn] = slowest.item()
    return {name: variant for name, (variant, _) in variants.items()}


def summed(step: Callable[[], Tensor], live: Case) -> Callable[[], None]:
    """Return a step whose head gradient is then summed over the ranks."""

    def run() -> None:
        step()
        dist.all_reduce(live.student_weight.grad)

    return run


def rows_of(case: Case, rank: int) -> Case:
    """Return this rank's part of the tokens."""
    each = case.student_hidden.shape[0] // WORLD
    mine = slice(rank * each, (rank + 1) * each)
    return replace(case, student_hidden=case.student_hidden[mine], teacher_hidden=case.teacher_hidden[mine])


def check(setting: Setting, rank: int) -> dict[str, dict[str, float]]:
    """Return the errors of both ways to split. Raises AssertionError on all ranks if one is too large."""
    gate = Gate(setting) if rank == 0 else None
    case = make_case(setting.at(N=TOKENS))
    shard, part = VocabShard.from_vocab(setting.V, dist.group.WORLD), rows_of(case, rank)
    own = {
        "vocabulary": evaluate(
            linear_divergence, cut(case, shard), divergence=setting.divergence, group=shard
        ),
        "data": evaluate(linear_divergence, part, divergence=setting.divergence, normalizer=float(TOKENS)),
    }
    dist.all_reduce(own["data"].student_weight)
    dist.all_reduce(own["data"].loss)
    failure: list[str | None] = [None]
    found = {}
    for name, outcome in own.items():
        parts: list[Any] = [None] * WORLD
        dist.all_gather_object(parts, outcome)
        if gate is not None and failure[0] is None:
            try:
                found[name] = gate.errors(merged(parts) if name == "vocabulary" else joined(parts, outcome))
            except AssertionError as error:
                failure = [f"{name}: {error}"]
    dist.broadcast_object_list(failure)
    assert failure[0] is None, failure[0]
    return found


def joined(parts: list[Outcome], own: Outcome) -> Outcome:
    """Return the outcome of all tokens: the ranks' hidden gradients, and some rows of the summed dW."""
    step = max(1, own.student_weight.shape[0] // CHECKED_ROWS)
    hidden = torch.cat([part.student_hidden for part in parts])
    return replace(own, student_hidden=hidden, student_weight=own.student_weight[::step])


def stepper_on(live: Case, op: Op) -> Callable[[], Tensor]:
    """Return a step like providers.stepper, over leaves that the caller keeps to sum their gradients."""

    def step() -> Tensor:
        live.student_hidden.grad = live.student_weight.grad = None
        loss = op(*live.inputs())
        loss.backward()
        return loss.detach()

    return step


def run_setting(setting: Setting, rounds: int, rank: int) -> dict[str, Any]:
    """Time one step by one process, and by two with half of the vocabulary or half of the tokens each."""
    errors = check(setting, rank)
    case, own, few = (
        make_case(setting),
        setting.at(V=-(-setting.V // WORLD)),
        setting.at(N=setting.N // WORLD),
    )
    part, tokens = cut(case, VocabShard.from_vocab(setting.V, dist.group.WORLD)), rows_of(case, rank)
    leaves = tokens.leaves()
    alone = stepper(grouped(own, EchoGroup(rank, WORLD), setting.V), part, own)
    apart = stepper_on(leaves, plainly(few, float(setting.N)))
    variants = in_step(
        {
            "whole": (Variant(stepper(plainly(setting), case, setting)), False),
            "vocabulary gemms": (Variant(bare_gemms(part, own, own.plan().rows)), False),
            "vocabulary alone": (Variant(alone), False),
            "data gemms": (Variant(bare_gemms(tokens, few, few.plan().rows)), False),
            "data alone": (Variant(apart), False),
            "vocabulary apart": (Variant(alone), True),
            "vocabulary": (Variant(stepper(grouped(own, dist.group.WORLD, setting.V), part, own)), True),
            "data apart": (Variant(apart), True),
            "data": (Variant(summed(apart, leaves)), True),
        },
        rounds,
    )
    return {
        **setting.as_dict(),
        "world": WORLD,
        "errors": errors,
        "ms": {name: asdict(variant.sample()) for name, variant in variants.items()},
        "overheads": {
            way: asdict(ratio(variants[f"{way} alone"], variants[f"{way} gemms"]))
            for way in ("vocabulary", "data")
        },
    }


def collectives(messages: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Time each collective by bytes sent."""
    variants = {}
    for nbytes in messages:
        wide, narrow = torch.ones(nbytes // 4), torch.zeros(nbytes // 2, dtype=torch.bfloat16)
        received = [torch.empty_like(wide) for _ in range(WORLD)]
        zeros = torch.zeros_like(wide)  # a sum in place leaves zeros unchanged
        variants[f"gather {nbytes}"] = (
            Variant(lambda received=received, wide=wide: dist.all_gather(received, wide)),
            True,
        )
        variants[f"reduce {nbytes}"] = (Variant(lambda zeros=zeros: dist.all_reduce(zeros)), True)
        variants[f"data {nbytes}"] = (Variant(lambda narrow=narrow: dist.all_reduce(narrow)), True)
    found = []
    for name, variant in in_step(variants, rounds).items():
        kind, nbytes = name.split()
        sent = (ring_gather if kind == "gather" else ring_sum)(WORLD, int(nbytes))
        found.append({"kind": kind, "bytes": round(sent), "ms": asdict(variant.sample())})
    return found


def rank_main(rank: int, folder: Path, measure: Callable[[int], dict[str, Any]]) -> None:
    """Run `measure(rank)` in a process group and exit; rank 0 writes the result into `folder`."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    found = measure(rank)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the objects that they use (torch 2.13)


def launch(script: str, *options: str) -> dict[str, Any]:
    """Run `script --rank RANK FOLDER` in WORLD processes of one thread; return the result of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, script, *options, "--rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*program, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(WORLD)
        ]
        try:
            errors = [process.communicate(timeout=LIMIT_S)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        failed = [text for process, text in zip(ranks, errors, strict=True) if process.returncode]
        if failed:
            raise SystemExit(failed[0].strip()[-2000:])
        return json.loads((Path(folder) / "result.json").read_text())
