"""Run one rank of the vocabulary-parallel tests of heads that are more than one matrix."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from launching import join, run_checks

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from lora_cases import WHICH, Adapted, adapted_case, outcome
from teacher_cases import outcome as outcome_of_several
from teacher_cases import several_case

from opsd_kernels import VocabShard, linear_divergence
from opsd_kernels.testing import assert_no_worse, assert_on_target
from opsd_kernels.testing.heads import with_dense_heads
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing.reference_rows import linear_divergence_by_index_reference
from opsd_kernels.weights import EntropyGate

V = 211
OPTIONS = {
    "plain": {},
    "chunks": {"workspace_bytes": 16000},
    "recompute": {"backward": "recompute", "divergence": "jsd"},
    "top 5": {"topk": 5, "topk_support": "teacher"},
    "gate": {"token_weights": EntropyGate("student", below=2.0)},
}


def everyone(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return parts


def cut(adapted: Adapted, shard: VocabShard) -> Adapted:
    """Return this rank's rows of heads, biases and B."""
    rows, case = slice(shard.start, shard.stop), adapted.case
    weight = case.student_weight[rows]
    teacher = weight if case.teacher_weight is case.student_weight else case.teacher_weight[rows]
    case = replace(
        case,
        student_weight=weight,
        teacher_weight=teacher,
        student_bias=case.student_bias[rows],
        teacher_bias=case.teacher_bias[rows],
    )
    one = adapted.student is adapted.teacher
    student, other = (x and (x[0], x[1][rows], x[2]) for x in (adapted.student, adapted.teacher))
    return Adapted(case, student, student if one else other)


def check_adapters(which: str, name: str, dtype: torch.dtype, shared: bool) -> None:
    adapted = adapted_case(28, V, 48, dtype, which, shared_head=shared, largest_logit=8.0, batch=4)
    told = OPTIONS[name]
    if "topk" in told or "token_weights" in told:
        adapted = replace(adapted, case=replace(adapted.case, token_weights=None))
    reference = with_dense_heads(linear_divergence_reference)
    alone = {k: v for k, v in told.items() if k not in ("workspace_bytes", "backward")}
    truth, plain = (outcome(reference, x, **alone) for x in (adapted.double(), adapted))
    shard = VocabShard.from_vocab(V, dist.group.WORLD)
    found = outcome(linear_divergence, cut(adapted, shard), group=shard, **told)
    for key, value in found.items():
        parts = everyone(value)
        if key in ("student_weight", "student_bias", "B"):
            value = torch.cat(parts)
        else:
            assert all(torch.equal(parts[0], part) for part in parts), f"{key} differs between ranks"
        if dtype.itemsize == 2:
            assert_on_target(value, truth[key], "default")
        else:
            assert_no_worse(value, plain[key], truth[key])


def check_teachers(name: str, packed: bool, shared: bool) -> None:
    several = several_case(
        28, V, 48, torch.float32, packed=packed, shared_head=shared, largest_logit=8.0, batch=4
    )
    told = OPTIONS[name]
    if "topk" in told or "token_weights" in told:
        several = replace(several, case=replace(several.case, token_weights=None))
    alone = {k: v for k, v in told.items() if k not in ("workspace_bytes", "backward")}
    reference = linear_divergence_by_index_reference
    truth, plain = (outcome_of_several(reference, x, **alone) for x in (several.double(), several))
    shard = VocabShard.from_vocab(V, dist.group.WORLD)
    rows, case = slice(shard.start, shard.stop), several.case
    head = case.student_weight[rows]
    own = replace(case, student_weight=head, student_bias=case.student_bias[rows])
    biases = [None if b is None else b[rows] for b in several.options.get("teacher_bias", [])]
    options = {**several.options, **({"teacher_bias": biases} if biases else {})}
    weights = tuple(head if shared else weight[rows] for weight in several.weight)
    part = replace(several, case=own, weight=weights, options=options)
    found = outcome_of_several(linear_divergence, part, group=shard, **told)
    for key, exact in truth.items():
        parts = everyone(found[key])
        value = torch.cat(parts) if key in ("student_weight", "student_bias") else parts[0]
        assert_no_worse(value, plain[key], exact)


def check_unreduced() -> None:
    """Without reduce_hidden_grad each rank keeps its part of dA, and the parts add up."""
    adapted = adapted_case(28, V, 48, torch.float64, "student")
    shard = VocabShard.from_vocab(V, dist.group.WORLD)
    summed = outcome(linear_divergence, cut(adapted, shard), group=shard)["A"]
    kept = replace(shard, reduce_hidden_grad=False)
    part = outcome(linear_divergence, cut(adapted, shard), group=kept)["A"]
    assert not torch.equal(summed, part)
    dist.all_reduce(part)
    assert_no_worse(part, summed, summed)


def checks() -> dict[str, tuple]:
    adapters = {
        f"{which}, {name}, {dtype}, {'one head' if shared else 'two heads'}": (
            check_adapters,
            which,
            name,
            dtype,
            shared,
        )
        for which in WHICH
        for name in OPTIONS
        for dtype in (torch.float32, torch.bfloat16)
        for shared in (False, True)
        if (which != "one for both" or shared) and (dtype == torch.float32 or name == "plain")
    }
    teachers = {
        f"teachers, {name}, packed: {packed}, one head: {shared}": (check_teachers, name, packed, shared)
        for name in OPTIONS
        for packed in (False, True)
        for shared in (False, True)
    }
    return {**adapters, **teachers, "unreduced": (check_unreduced,)}


def main(rank: str, world: str, rendezvous: str, result: str) -> None:
    join(rank, world, rendezvous)
    run_checks(world, result, checks())


if __name__ == "__main__":
    main(*sys.argv[1:])
