"""One rank of a sharded loss head, alone in a process: time of its shard, its peak memory, its traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from parallel_groups import EchoGroup, Gate, cut, emulated
from torch import Tensor

from opsd_kernels import VocabShard, linear_divergence
from opsd_kernels.bench.measure.context import blank, free
from opsd_kernels.bench.measure.rows import part_row
from opsd_kernels.bench.measure.timing import Variant, interleave
from opsd_kernels.bench.providers import BASE, Op, bare_gemms, stepper
from opsd_kernels.bench.report.results import Row
from opsd_kernels.bench.shapes import Setting, make_case
from opsd_kernels.testing import evaluate, peak_bytes

# (divergence, labels, statistics, dtype) of the calls whose traffic is counted.
COUNTED = (
    ("reverse_kl", False, False, "float32"),
    ("reverse_kl", True, False, "float32"),
    ("jsd", True, False, "float32"),
    ("jsd", True, True, "float32"),
    ("reverse_kl", True, False, "bfloat16"),
    ("reverse_kl", True, True, "bfloat16"),
)


def grouped(setting: Setting, group: dist.ProcessGroup, V: int) -> Op:
    """Return the op on this rank's shard of a vocabulary of V, in a group."""
    shard = VocabShard.from_vocab(V, group)
    return lambda h, W, t, Wt: linear_divergence(h, W, t, Wt, divergence=setting.divergence, group=shard)


def plainly(setting: Setting, normalizer: float | None = None) -> Op:
    """Return the op without a group."""
    return lambda h, W, t, Wt: linear_divergence(
        h, W, t, Wt, divergence=setting.divergence, normalizer=normalizer
    )


def shard_rows(setting: Setting, ranks_list: tuple[int, ...], rounds: int) -> list[Row]:
    """Time the first shard for each number of ranks, all in turn.

    Per number of ranks: the bare GEMMs of the shard, the op on it as on a smaller vocabulary, and the op with
    its group.
    """
    gate = Gate(setting)
    errors = {ranks: gate.errors(emulated(gate.case, setting.divergence, ranks)) for ranks in ranks_list}
    del gate
    free()
    case, variants, settings = make_case(setting), {}, {}
    for ranks in ranks_list:
        group = EchoGroup(0, ranks)
        part = cut(case, VocabShard.from_vocab(setting.V, group))
        own = settings[ranks] = setting.at(V=part.student_weight.shape[0])
        variants[f"{BASE} {ranks}"] = Variant(bare_gemms(part, own, own.plan().rows))
        variants[f"op {ranks}"] = Variant(stepper(plainly(own), part, own))
        variants[f"group {ranks}"] = Variant(stepper(grouped(own, group, setting.V), part, own))
    interleave(variants, f"{BASE} {ranks_list[0]}", "cpu", rounds=(rounds, rounds), seconds=0.0)
    rows = []
    for ranks, own in settings.items():
        for name, base in ((BASE, BASE), ("op", BASE), ("group", BASE), ("added", "op")):
            fields = errors[ranks] if name == "group" else {}
            row = blank("parallel", name, own, variant=str(ranks), rows=own.plan().rows, **fields)
            timed = "group" if name == "added" else name
            rows.append(part_row(row, variants, f"{timed} {ranks}", f"{base} {ranks}"))
    return rows


def prepare(setting: dict[str, Any], ranks: int) -> Callable[[], Tensor]:
    """Return the call that `testing.peak_bytes` measures, after a small call of the same kind."""
    full = Setting(**setting)
    for made in (full.at(N=64, V=999), full):
        group = EchoGroup(0, ranks)
        part = cut(make_case(made), VocabShard.from_vocab(made.V, group))
        # A view would keep the whole head alive.
        part = replace(part, student_weight=part.student_weight.clone())
        part = replace(part, teacher_weight=part.student_weight)
        step = stepper(grouped(made, group, made.V), part, made.at(V=part.student_weight.shape[0]))
        if made is not full:
            step()
    return step


def peak_rows(setting: Setting, ranks_list: tuple[int, ...]) -> list[Row]:
    """Measure the peak of one rank for every second number of ranks."""
    rows = []
    for ranks in ranks_list[::2]:
        own = setting.at(V=-(-setting.V // ranks))
        made = own.plan()
        peak = peak_bytes("from parallel_shards import prepare as make", setting.as_dict(), ranks, threads=1)
        row = blank("parallel", "peak", own, variant=str(ranks), rows=made.rows)
        rows.append(replace(row, peak_bytes=peak, predicted_bytes=made.peak_bytes))
    return rows


def exchanges(ranks: int) -> list[dict[str, Any]]:
    """Count the traffic of one rank: per chunk the numbers of each collective, in their order."""
    N, H, V, rows = 32, 48, 211, 8
    found = []
    for divergence, labels, statistics, dtype in COUNTED:
        made = make_case(Setting(N, H, V, dtype))
        group = EchoGroup(0, ranks)
        shard = VocabShard.from_vocab(V, group)
        case = replace(cut(made, shard), labels=torch.arange(N) if labels else None)
        evaluate(
            linear_divergence,
            case,
            divergence=divergence,
            group=shard,
            workspace_bytes=2 * (-(-shard.widest // 16) * 16) * 4 * rows,
            return_stats=statistics,
        )
        # Each chunk sums dh once; the sum for labels has two numbers per row.
        calls = sum(kind == "reduce" and numbers >= H for kind, numbers in group.sent)
        chunk = len(group.sent) // calls
        kinds = [kind for kind, _ in group.sent[:chunk]]
        totals = [sum(numbers for _, numbers in group.sent[at::chunk]) for at in range(chunk)]
        found.append(
            {
                "divergence": divergence,
                "labels": labels,
                "statistics": statistics,
                "dtype": dtype,
                "H": H,
                "chunks": calls,
                "per_row": [[kind, total / N] for kind, total in zip(kinds, totals, strict=True)],
            }
        )
    return found
