"""What a rank of a spread loss head costs, on one machine without GPUs: the constants of docs/scaling.md, and runs of two processes to hold them against.

    python benchmarks/parallel.py [--quick] [--json FILE]

One thread per rank. Shards of R ranks are measured in one process, on a group whose other ranks do not exist: what a rank computes, merging included, but no
wire. Two gloo processes give the wire, and whole steps. Nothing is timed before losses and gradients of R real shards, put together, have passed the gates of
the unit tests against the whole vocabulary in float64. Some five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import VocabShard, linear_divergence, report_json
from opsd_kernels._core.planner import DEFAULT_WORKSPACE_BYTES
from opsd_kernels.bench.gate import CHECKED_ROWS, TOKENS, outcome_of, reference
from opsd_kernels.bench.measure import blank, describe, free, part_row
from opsd_kernels.bench.parallel import fit_link, ring_gather, ring_sum
from opsd_kernels.bench.providers import BASE, Op, bare_gemms, stepper
from opsd_kernels.bench.results import Row, rounded, row_dict, script_report
from opsd_kernels.bench.shapes import Setting, make_case
from opsd_kernels.bench.timing import Variant, cpu_clock, interleave, ratio
from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    peak_bytes,
    relative_error,
)

WORLD = 2  # processes of the real runs
LIMIT_S = 900  # of their run, which takes two minutes on an idle machine
KINDS = ("gather", "reduce", "data")  # statistics, dh in fp32, dW in bf16


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    ranks: tuple[int, ...]
    shards: tuple[Setting, ...]
    peaks: tuple[Setting, ...]
    runs: tuple[Setting, ...]
    messages: tuple[int, ...]  # bytes
    rounds: int
    message_rounds: int


FULL = Scope(
    ranks=(1, 2, 4, 8, 16),
    shards=(
        Setting(256, 1024, 32000),
        Setting(256, 2048, 32000),
        Setting(256, 512, 128256),
        Setting(256, 512, 32000, divergence="jsd"),
        Setting(128, 1024, 32000, "float32"),
    ),
    peaks=(Setting(2048, 512, 32000), Setting(512, 256, 128256)),
    runs=(Setting(1536, 512, 32000), Setting(256, 512, 32000)),
    messages=tuple(1 << power for power in range(10, 26, 2)) + (1 << 25,),
    rounds=5,
    message_rounds=8,
)
QUICK = Scope(
    (1, 2, 3),
    (Setting(24, 32, 501), Setting(16, 32, 501, "float32", divergence="jsd")),
    (),
    (Setting(24, 32, 501),),
    (1 << 10, 1 << 22),
    3,
    3,
)


# ---------------------------------------------------------------- groups without processes


class Alone(dist.ProcessGroup):
    """One of `size` ranks of which no other exists: it hears its own numbers from each, and its sums are its own. Keeps a list of what it sent."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.sent: list[tuple[str, int]] = []

    @property
    def group_name(self) -> str:
        return f"{type(self).__name__} {id(self)}"

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: object = None) -> None:
        self.sent.append(("gather", inputs[0].numel()))
        for output, heard in zip(outputs[0], self._heard(inputs[0]), strict=True):
            output.copy_(heard)

    def allreduce(self, tensors: list[Tensor], options: object = None) -> None:
        self.sent.append(("reduce", tensors[0].numel()))

    def _heard(self, own: Tensor) -> list[Tensor]:
        return [own] * self.size()


class Together(Alone):
    """A rank that is a thread: it really exchanges with those that share its `barrier` and `desk`."""

    def __init__(self, rank: int, barrier: threading.Barrier, desk: list[Tensor | None]) -> None:
        super().__init__(rank, barrier.parties)
        self._barrier, self._desk = barrier, desk

    def allreduce(self, tensors: list[Tensor], options: object = None) -> None:
        tensors[0].copy_(torch.stack(self._heard(tensors[0])).sum(0))

    def _heard(self, own: Tensor) -> list[Tensor]:
        self._desk[self.rank()] = own.clone()
        self._barrier.wait()
        heard = list(self._desk)
        self._barrier.wait()  # nobody puts the next one down before all have taken this one
        return heard


# ---------------------------------------------------------------- the gate


def cut(case: Case, shard: VocabShard) -> Case:
    """This rank's part of a case without biases."""
    weight = case.student_weight[shard.start : shard.stop]
    shared = case.teacher_weight is case.student_weight
    return replace(
        case,
        student_weight=weight,
        teacher_weight=weight if shared else case.teacher_weight[shard.start : shard.stop],
    )


def whole(parts: list[Outcome]) -> Outcome:
    """Of all ranks: what they share must be the same to the bit. Of the head's gradient the rows that gate.outcome_of keeps."""
    for part in parts[1:]:
        assert_same_bits(replace(part, student_weight=None), replace(parts[0], student_weight=None))
    weight = torch.cat([part.student_weight for part in parts])
    return replace(parts[0], student_weight=weight[:: max(1, weight.shape[0] // CHECKED_ROWS)])


def emulated(case: Case, divergence: str, ranks: int) -> Outcome:
    """The op on all shards at once, a thread each."""
    barrier, desk, parts = threading.Barrier(ranks, timeout=60), [None] * ranks, [None] * ranks

    def run(rank: int) -> None:
        shard = VocabShard.from_vocab(case.student_weight.shape[0], Together(rank, barrier, desk))
        try:
            parts[rank] = evaluate(linear_divergence, cut(case, shard), divergence=divergence, group=shard)
        except Exception as error:  # raised below; the others must not wait
            parts[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = sorted(
        (part for part in parts if isinstance(part, Exception)),
        key=lambda error: isinstance(error, threading.BrokenBarrierError),
    )
    if errors:
        raise errors[0]
    return whole(parts)


class Gate:
    """A setting's truth in float64 on the whole vocabulary, at TOKENS tokens."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting.at(N=TOKENS)
        self.case = make_case(self.setting)
        op = reference(self.setting)
        self._truth, self._plain = outcome_of(op, self.case.double()), outcome_of(op, self.case)

    def errors(self, actual: Outcome) -> dict[str, float]:
        """Relative ones. Raises AssertionError where they pass the gate."""
        if self.setting.torch_dtype.itemsize == 2:
            assert_on_target(actual, self._truth, "default")
        else:
            assert_no_worse(actual, self._plain, self._truth)
        off = {name: relative_error(value, dict(self._truth.named())[name]) for name, value in actual.named()}
        return {"loss_error": off.pop("loss"), "gradient_error": max(off.values())}


# ---------------------------------------------------------------- one rank, alone


def grouped(setting: Setting, group: dist.ProcessGroup, V: int) -> Op:
    shard = VocabShard.from_vocab(V, group)
    return lambda h, W, t, Wt: linear_divergence(h, W, t, Wt, divergence=setting.divergence, group=shard)


def plainly(setting: Setting, normalizer: float | None = None) -> Op:
    return lambda h, W, t, Wt: linear_divergence(
        h, W, t, Wt, divergence=setting.divergence, normalizer=normalizer
    )


def shard_rows(setting: Setting, scope: Scope) -> list[Row]:
    """For each number of ranks: the bare GEMMs of the first shard, the op on it as on a smaller vocabulary, and with its group; all in turn."""
    gate = Gate(setting)
    errors = {ranks: gate.errors(emulated(gate.case, setting.divergence, ranks)) for ranks in scope.ranks}
    del gate
    free()
    case, variants, settings = make_case(setting), {}, {}
    for ranks in scope.ranks:
        group = Alone(0, ranks)
        part = cut(case, VocabShard.from_vocab(setting.V, group))
        own = settings[ranks] = setting.at(V=part.student_weight.shape[0])
        variants[f"{BASE} {ranks}"] = Variant(bare_gemms(part, own, own.plan().rows))
        variants[f"op {ranks}"] = Variant(stepper(plainly(own), part, own))
        variants[f"group {ranks}"] = Variant(stepper(grouped(own, group, setting.V), part, own))
    interleave(variants, f"{BASE} {scope.ranks[0]}", "cpu", rounds=(scope.rounds, scope.rounds), seconds=0.0)
    rows = []
    for ranks, own in settings.items():
        for name, base in ((BASE, BASE), ("op", BASE), ("group", BASE), ("added", "op")):
            row = blank(
                "parallel",
                name,
                own,
                variant=str(ranks),
                rows=own.plan().rows,
                **(errors[ranks] if name == "group" else {}),
            )
            rows.append(
                part_row(row, variants, f"{'group' if name == 'added' else name} {ranks}", f"{base} {ranks}")
            )
    return rows


def prepare(setting: dict[str, Any], ranks: int) -> Callable[[], Tensor]:
    """The call that `testing.peak_bytes` measures, after a small one of the same kind."""
    full = Setting(**setting)
    for made in (full.at(N=64, V=999), full):
        group = Alone(0, ranks)
        part = cut(make_case(made), VocabShard.from_vocab(made.V, group))
        part = replace(part, student_weight=part.student_weight.clone())
        part = replace(part, teacher_weight=part.student_weight)  # a view would keep the whole head
        step = stepper(grouped(made, group, made.V), part, made.at(V=part.student_weight.shape[0]))
        if made is not full:
            step()
    return step


def peak_rows(setting: Setting, scope: Scope) -> list[Row]:
    rows = []
    for ranks in scope.ranks[::2]:
        own = setting.at(V=-(-setting.V // ranks))
        peak = peak_bytes("from parallel import prepare as make", setting.as_dict(), ranks, threads=1)
        rows.append(
            blank(
                "parallel",
                "peak",
                own,
                variant=str(ranks),
                peak_bytes=peak,
                predicted_bytes=own.plan().peak_bytes,
                rows=own.plan().rows,
            )
        )
    return rows


def exchanges() -> list[dict[str, Any]]:
    """What one rank sends, counted: per chunk the numbers of each collective, in its order."""
    N, H, V, rows = 32, 48, 211, 8
    made = make_case(Setting(N, H, V, "float32"))
    found = []
    for divergence, labels, statistics in (
        ("reverse_kl", False, False),
        ("reverse_kl", True, False),
        ("jsd", True, False),
        ("jsd", True, True),
    ):
        group = Alone(0, WORLD)
        shard = VocabShard.from_vocab(V, group)
        case = replace(cut(made, shard), labels=torch.arange(N) if labels else None)
        budget = 2 * (-(-shard.widest // 16) * 16) * 4 * rows
        evaluate(
            linear_divergence,
            case,
            divergence=divergence,
            group=shard,
            workspace_bytes=budget,
            return_stats=statistics,
        )
        calls = sum(
            kind == "reduce" and numbers >= H for kind, numbers in group.sent
        )  # dh; labels have two numbers for each row
        chunk = len(group.sent) // calls
        kinds = [kind for kind, _ in group.sent[:chunk]]
        totals = [sum(numbers for _, numbers in group.sent[at::chunk]) for at in range(chunk)]
        found.append({"divergence": divergence, "labels": labels, "statistics": statistics, "H": H, "chunks": calls,
                      "per_row": [[kind, total / N] for kind, total in zip(kinds, totals, strict=True)]})  # fmt: skip
    return found


# ---------------------------------------------------------------- two processes


def in_step(variants: dict[str, tuple[Variant, bool]], rounds: int) -> dict[str, Variant]:
    """Fills in the times of variants that all ranks run (True) or rank 0 alone: those of the slowest rank, each right after an untimed run of its own."""
    for turn in range(-1, rounds):
        for variant, everyone in variants.values():
            reading = 0.0
            if everyone or dist.get_rank() == 0:
                variant.run()
            dist.barrier()
            if everyone or dist.get_rank() == 0:
                reading = cpu_clock(variant)()
            slowest = torch.tensor(reading, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if turn >= 0:
                variant.times[turn] = slowest.item()
    return {name: variant for name, (variant, _) in variants.items()}


def summed(step: Callable[[], Tensor], live: Case) -> Callable[[], None]:
    """A step whose head's gradient is then added up over the ranks."""

    def run() -> None:
        step()
        dist.all_reduce(live.student_weight.grad)

    return run


def rows_of(case: Case, rank: int) -> Case:
    each = case.student_hidden.shape[0] // WORLD
    mine = slice(rank * each, (rank + 1) * each)
    return replace(case, student_hidden=case.student_hidden[mine], teacher_hidden=case.teacher_hidden[mine])


def judge(setting: Setting, rank: int) -> dict[str, dict[str, float]]:
    """Errors of both ways to split the work, on all ranks. Raises AssertionError in all of them."""
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
    verdict: list[Any] = [None]
    found = {}
    for name, outcome in own.items():
        parts: list[Any] = [None] * WORLD
        dist.all_gather_object(parts, outcome)
        if gate is not None and verdict[0] is None:
            if name == "data":
                hidden, step = (
                    torch.cat([part.student_hidden for part in parts]),
                    max(1, setting.V // CHECKED_ROWS),
                )
                outcome = replace(
                    outcome, student_hidden=hidden, student_weight=outcome.student_weight[::step]
                )
            try:
                found[name] = gate.errors(whole(parts) if name == "vocabulary" else outcome)
            except AssertionError as error:
                verdict = [f"{name}: {error}"]
    dist.broadcast_object_list(verdict)
    assert verdict[0] is None, verdict[0]
    return found


def run_setting(setting: Setting, scope: Scope, rank: int) -> dict[str, Any]:
    """One step by one process, by ranks that hold half of the vocabulary each, and by ranks that hold half of the tokens each."""
    errors = judge(setting, rank)
    case, own, few = (
        make_case(setting),
        setting.at(V=-(-setting.V // WORLD)),
        setting.at(N=setting.N // WORLD),
    )
    part, tokens = cut(case, VocabShard.from_vocab(setting.V, dist.group.WORLD)), rows_of(case, rank)
    leaves = tokens.leaves()
    alone = stepper(grouped(own, Alone(rank, WORLD), setting.V), part, own)
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
        scope.rounds,
    )
    ratios = {
        way: ratio(variants[f"{way} alone"], variants[f"{way} gemms"]) for way in ("vocabulary", "data")
    }
    ms = {name: variant.sample().__dict__ for name, variant in variants.items()}
    return {
        **setting.as_dict(),
        "world": WORLD,
        "errors": errors,
        "ms": ms,
        "overheads": {way: sample.__dict__ for way, sample in ratios.items()},
    }


def stepper_on(live: Case, op: Op) -> Callable[[], Tensor]:
    """providers.stepper over leaves that the caller knows, whose gradients are to be summed."""

    def step() -> Tensor:
        live.student_hidden.grad = live.student_weight.grad = None
        loss = op(*live.inputs())
        loss.backward()
        return loss.detach()

    return step


def collectives(scope: Scope) -> list[dict[str, Any]]:
    """Seconds of each collective by bytes sent."""
    variants = {}
    for nbytes in scope.messages:
        wide, narrow = torch.ones(nbytes // 4), torch.zeros(nbytes // 2, dtype=torch.bfloat16)
        heard = [torch.empty_like(wide) for _ in range(WORLD)]
        zeros = torch.zeros_like(wide)  # sums of zeros stay what they are
        variants[f"gather {nbytes}"] = (
            Variant(lambda heard=heard, wide=wide: dist.all_gather(heard, wide)),
            True,
        )
        variants[f"reduce {nbytes}"] = (Variant(lambda zeros=zeros: dist.all_reduce(zeros)), True)
        variants[f"data {nbytes}"] = (Variant(lambda narrow=narrow: dist.all_reduce(narrow)), True)
    found = []
    for name, variant in in_step(variants, scope.message_rounds).items():
        kind, nbytes = name.split()
        sent = (ring_gather if kind == "gather" else ring_sum)(WORLD, int(nbytes))
        found.append({"kind": kind, "bytes": round(sent), "ms": variant.sample().__dict__})
    return found


def rank_main(rank: int, rendezvous: str, result: Path, quick: bool) -> None:
    scope = QUICK if quick else FULL
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timeout
    )
    found = {
        "collectives": collectives(scope),
        "runs": [run_setting(setting, scope, rank) for setting in scope.runs],
    }
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive what they use (torch 2.13)


def together(quick: bool) -> dict[str, Any]:
    """What rank 0 of WORLD processes found."""
    with tempfile.TemporaryDirectory() as folder:
        result, program = (
            Path(folder) / "result.json",
            [sys.executable, __file__, *["--quick"] * quick, "--rank"],
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*program, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(WORLD)
        ]
        try:
            said = [process.communicate(timeout=LIMIT_S)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        failed = [text for process, text in zip(ranks, said, strict=True) if process.returncode]
        if failed:
            raise SystemExit(failed[0].strip()[-2000:])
        return json.loads(result.read_text())


# ---------------------------------------------------------------- the report


def links(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for kind in KINDS:
        link, off = fit_link(
            (point["bytes"], point["ms"]["median"] / 1e3) for point in points if point["kind"] == kind
        )
        found[kind] = {"latency": link.latency, "bandwidth": link.bandwidth, "off": off}
    return found


def measure(scope: Scope, quick: bool) -> dict[str, Any]:
    began = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)

    pairs, rows = together(quick), []
    done(f"{WORLD} processes")
    for setting in scope.shards:
        rows += shard_rows(setting, scope)
        done(f"shards of {describe(setting)}")
    for setting in scope.peaks:
        rows += peak_rows(setting, scope)
        done(f"memory of {describe(setting)}")
    return {
        "exchanges": exchanges(),
        **pairs,
        "links": links(pairs["collectives"]),
        "rows": [row_dict(row) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a test of this script")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank is not None:
        rank, folder = arguments.rank
        rank_main(int(rank), f"{folder}/rendezvous", Path(folder) / "result.json", arguments.quick)
        return
    began = time.monotonic()
    head = {**script_report("parallel", "parallel.py"), "quick": arguments.quick}
    found = measure(QUICK if arguments.quick else FULL, arguments.quick)
    report = rounded(
        {**head, "seconds": time.monotonic() - began, "workspace_bytes": DEFAULT_WORKSPACE_BYTES, **found}
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(report_json.dumps(report))
    print(
        f"{len(found['rows'])} rows, {len(found['runs'])} runs of {WORLD} processes, {report['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
