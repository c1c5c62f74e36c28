"""Run one rank of the vocabulary-parallel tests (test_vocab_parallel.py).

Every case on shards is compared with float64 by the gates of a single process.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from launching import join, once, run_checks

from opsd_kernels import VocabShard, linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import (
    LOGPROB_NATS,
    LOGSUMEXP_NATS,
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    hard_case,
    plain_outcomes,
)
from opsd_kernels.testing.cases import invariant_variants
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.weights import EntropyGate, MeanOne, PrefixDiscrepancy

V = 211
OF_TOKENS = torch.linspace(0.6, 1.6, 28)
TRANSFORM = {
    "temperature": 0.7,
    "teacher_temperature": 1.4,
    "student_logit_scale": 1.2,
    "student_softcap": 25.0,
    "teacher_softcap": 30.0,
}
# name: arguments of the case, options of op and reference, options of the op alone
CASES: dict[str, tuple[dict, dict, dict]] = {}
for name in KIND_NAMES:
    CASES[f"{name}, two heads"] = ({}, {"divergence": name}, {})
    CASES[f"{name}, shared head, near"] = ({"shared_head": True, "near": 1e-3}, {"divergence": name}, {})
    CASES[f"{name}, clips"] = ({}, {"divergence": name, "entry_clip": 0.05, "token_clip": 0.6}, {})
for side in ("student", "teacher"):
    for tail in ("bucket", "renormalize", "none"):
        CASES[f"top 5 of the {side}, {tail}"] = (
            {"views": False, "largest_logit": 8.0},
            {"topk": 5, "topk_support": side, "topk_tail": tail},
            {},
        )
CASES |= {
    "padded": ({"padding": 3, "shared_head": True}, {}, {}),
    "transforms": ({}, {**TRANSFORM, "divergence": "jsd"}, {}),
    "wider teacher": ({"teacher_width": 61}, {"divergence": "skew_reverse_kl", "beta": 0.9}, {}),
    "teacher entry masked": ({"masked_entry": "teacher"}, {"divergence": "forward_kl"}, {}),
    "frozen head": ({"frozen_head": True}, {"divergence": "jsd"}, {}),
    "teacher mix": ({"shared_head": True, "near": 1e-2}, {"teacher_mix": 0.3}, {}),
    "recompute": ({}, {"divergence": "jsd"}, {"backward": "recompute"}),
    "per token": ({}, {"divergence": "forward_kl", "reduction": "none"}, {}),
    "sequences": ({"batch": 4}, {"reduction": "sequence_mean"}, {}),
    "temperatures of tokens": ({"shared_head": True, "near": 1e-2}, {"temperature": OF_TOKENS}, {}),
    "temperatures of tokens on each side, recompute": (
        {},
        {"divergence": "jsd", "temperature": OF_TOKENS, "teacher_temperature": OF_TOKENS.flip(0)},
        {"backward": "recompute"},
    ),
    "temperatures of tokens, top 5": (
        {"largest_logit": 8.0},
        {"temperature": OF_TOKENS, "topk": 5, "topk_support": "teacher"},
        {},
    ),
    "gate": ({"batch": 4}, {"token_weights": EntropyGate("student", below=2.0)}, {}),
    "z-loss": ({}, {"z_loss": 0.03, "token_clip": 0.6}, {}),
    "z-loss, recompute": ({}, {"z_loss": 0.03, "divergence": "mixed_kl"}, {"backward": "recompute"}),
    "z-loss, top 5": (
        {"largest_logit": 8.0},
        {"z_loss": 0.03, "topk": 5},
        {},
    ),
    "prefix": ({"batch": 4}, {"token_weights": MeanOne(PrefixDiscrepancy(0.5))}, {}),
    "prefix, several chunks": (
        {"batch": 4},
        {"token_weights": PrefixDiscrepancy(0.5)},
        {"workspace_bytes": 6200},
    ),
}
# The same for linear_logprobs, and for linear_topk_divergence
LOGPROBS: dict[str, tuple[dict, dict, dict]] = {
    "trainable head": ({}, {}, {}),
    "frozen head": ({"frozen_head": True}, {}, {}),
    "frozen head, recompute": ({"frozen_head": True}, {}, {"backward": "recompute"}),
    "entropy": ({"largest_logit": 8.0}, {"return_entropy": True}, {}),
    "temperatures of tokens": ({}, {"temperature": OF_TOKENS, "return_entropy": True}, {}),
    "padded, transforms": (
        {"padding": 3},
        {"temperature": 0.7, "logit_scale": 1.2, "softcap": 25.0, "return_entropy": True},
        {},
    ),
}
SMOOTH = {"largest_logit": 8.0}
LISTS: dict[str, tuple[dict, dict, dict]] = {
    f"{divergence}, {tail}": (SMOOTH, {"divergence": divergence, "tail": tail}, {})
    for divergence in ("forward_kl", "reverse_kl", "jsd") for tail in ("bucket", "renormalize", "none")
}  # fmt: skip
LISTS |= {
    "clips": (SMOOTH, {"entry_clip": 0.05, "token_clip": 0.6}, {}),
    "z-loss": (SMOOTH, {"z_loss": 0.03, "token_clip": 0.6, "divergence": "mixed_kl"}, {}),
    "recompute": (SMOOTH, {"tail": "none"}, {"backward": "recompute"}),
    "per token": (SMOOTH, {"reduction": "none"}, {}),
    "temperatures of tokens": (SMOOTH, {"temperature": OF_TOKENS, "divergence": "jsd"}, {}),
    "gate, padded": (
        {**SMOOTH, "batch": 4, "padding": 3},
        {"token_weights": EntropyGate("student", below=2.0), "temperature": 0.7},
        {},
    ),
    "frozen head": ({**SMOOTH, "frozen_head": True}, {"divergence": "tvd"}, {}),
}
OF_A_SIDE = ("entropy", "max_prob", "logprob", "logsumexp")
SIDES = [f"{side}_{name}" for side in ("student", "teacher") for name in OF_A_SIDE]
STATISTICS = ("divergence", "top1_agreement", "label_is_top1", *SIDES)


def cut(case: Case, shard: VocabShard) -> Case:
    """Return this rank's part of a case."""

    def rows(tensor):
        return None if tensor is None else tensor[shard.start : shard.stop]

    weight = rows(case.student_weight)
    teacher = weight if case.teacher_weight is case.student_weight else rows(case.teacher_weight)
    bias = rows(case.student_bias)
    teacher_bias = bias if case.teacher_bias is case.student_bias else rows(case.teacher_bias)
    return replace(
        case, student_weight=weight, teacher_weight=teacher, student_bias=bias, teacher_bias=teacher_bias
    )


def whole(outcome: Outcome) -> Outcome:
    """Concatenate the gradients of the head; all else must be bitwise equal on all ranks."""
    alike, cut_up = ("loss", "student_hidden"), ("student_weight", "student_bias")
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {name: getattr(outcome, name) for name in alike + cut_up})
    for name in alike:
        first, *others = (rank[name] for rank in ranks)
        assert all(torch.equal(first, one) or (first.isnan() == one.isnan()).all() for one in others), (
            f"{name} differs between ranks"
        )
    return replace(
        outcome,
        **{
            name: torch.cat([rank[name] for rank in ranks])
            for name in cut_up
            if getattr(outcome, name) is not None
        },
    )


def shards(count: int) -> list[VocabShard]:
    """Return even shards, and shards of very different widths."""
    world, group = dist.get_world_size(), dist.group.WORLD
    uneven = (0, *(count // 2 + 7 * rank for rank in range(world - 1)), count)
    return [VocabShard.from_vocab(count, group), VocabShard(uneven, group)]


def logprobs_of(op: Callable) -> Callable:
    """Return log-probs, stacked on entropies if asked, in the signature of linear_divergence."""

    def run(
        h, W, t, Wt, *, labels, mask=None, student_bias=None, teacher_bias=None, token_weights=None, **options
    ):
        found = op(h, W, labels, bias=student_bias, mask=mask, **options)
        return torch.stack(found) if options.get("return_entropy") else found

    return run


def topk_of(op: Callable, case: Case, K: int = 9, shift: int = 0) -> Callable:
    """Return the divergence from a teacher's K most likely tokens, fewer for every other row."""
    head, vocab = case.teacher_weight.float(), case.vocab_size or case.teacher_weight.shape[0]
    logits = torch.nan_to_num(case.teacher_hidden.float()) @ head.T + (
        0 if case.teacher_bias is None else case.teacher_bias.float()
    )
    logprobs, ids = logits[..., :vocab].log_softmax(-1).topk(K)
    logprobs.flatten(0, -2)[::2, K // 2 :] = -torch.inf

    def run(h, W, t, Wt, *, teacher_bias=None, **options):
        return op(h, W, ids + shift, logprobs, **options)

    return run


def check_sibling(cases: dict[str, tuple[dict, dict, dict]], name: str, dtype: torch.dtype) -> None:
    made, told, alone = cases[name]
    case = hard_case(28, V, 48, dtype, **made)
    ops = {
        True: (linear_logprobs, linear_logprobs_reference),
        False: (linear_topk_divergence, linear_topk_divergence_reference),
    }[cases is LOGPROBS]
    op, reference = ((logprobs_of(op) if cases is LOGPROBS else topk_of(op, case)) for op in ops)
    if cases is LISTS and "token_weights" in told:
        case = replace(case, token_weights=None)
    truth, plain, one = once(
        lambda: (
            evaluate(reference, case.double(), **told),
            evaluate(reference, case, **told),
            evaluate(op, case, **told, **alone),
        )
    )
    chunked = {"workspace_bytes": V * dtype.itemsize * 9, **alone}
    for shard in shards(case.student_weight.shape[0]):
        ours = whole(evaluate(op, cut(case, shard), **told, **chunked, group=shard))
        assert_no_worse(ours, (plain, one), truth)


def check(name: str, dtype: torch.dtype) -> None:
    made, told, alone = CASES[name]
    case = hard_case(28, V, 48, dtype, **made)
    told = {"reduction": "sum", **told}
    if told.get("topk") or not isinstance(told.get("token_weights", torch.ones(())), torch.Tensor):
        case = replace(case, token_weights=None)
    truth, plain = once(
        lambda: (
            evaluate(linear_divergence_reference, case.double(), **told),
            plain_outcomes(case, **told),
        )
    )
    alone = {"workspace_bytes": 2 * V * dtype.itemsize * 9, **alone}
    for shard in shards(case.student_weight.shape[0]):
        ours = whole(evaluate(linear_divergence, cut(case, shard), **told, **alone, group=shard))
        if told.get("divergence") == "tvd" and "near" in made:
            # The gradient of entries at the kink is arbitrary.
            assert_on_target(ours, truth, "default")
            assert_no_worse(ours.value(), [outcome.value() for outcome in plain], truth.value())
        else:
            assert_no_worse(ours, plain, truth)


def check_16_bit_logits(dtype: torch.dtype, labelled: bool) -> None:
    """Shards of logits relative to a constant of their row meet the target of whole heads, at any offset.

    Each rank finds likely columns of its own; each label lies in one shard.
    """
    case = hard_case(48, 2003, 48, dtype, shared_head=True, near=1e-2, largest_logit=16.0, widths=(1.0,))
    case = replace(case, token_weights=None, mask=case.mask & (case.labels != -100))
    logits = case.student_hidden.double().nan_to_num(0, 0, 0) @ case.student_weight.double().T
    own = logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    assert all(((own >= shard.start) & (own < shard.stop)).any() for shard in shards(2003)[:1])
    case = replace(case, labels=own if labelled else None)
    for at, (_, changed, told) in enumerate(invariant_variants(case, {"return_stats": True})):
        shard = shards(2003)[at % 2]
        ours = evaluate(linear_divergence, cut(changed, shard), **told, group=shard)
        truth = once(lambda at=changed, how=told: evaluate(linear_divergence_reference, at.double(), **how))
        assert_on_target(whole(ours), truth, "default")
        assert torch.equal(ours.stats.top1_agreement.double(), truth.stats["top1_agreement"])
        levels = "student_logsumexp", "teacher_logsumexp"
        bound = LOGPROB_NATS if labelled else LOGSUMEXP_NATS
        for name in (*levels, *(("student_logprob", "teacher_logprob") if labelled else ())):
            off = (getattr(ours.stats, name) - truth.stats[name])[changed.mask].abs().max()
            # At a temperature of 1/4 the rounding counts four times.
            assert off <= bound / min(told.get("temperature", 1.0), 1.0), (at, name, off)


def check_statistics(dtype: torch.dtype) -> None:
    case = replace(hard_case(28, V, 48, dtype, shared_head=True, near=0.1), trainable=())
    alone, truth = (
        evaluate(linear_divergence, one, return_stats=True).stats for one in (case, case.double())
    )
    for shard in shards(V):
        ours = evaluate(linear_divergence, cut(case, shard), return_stats=True, group=shard).stats
        for name in STATISTICS:
            assert_no_worse(getattr(ours, name), getattr(alone, name), getattr(truth, name))


def check_peaks_in_the_same_place_of_two_shards() -> None:
    """Argmaxes at the same local column of two shards are different tokens."""
    shard = VocabShard.from_vocab(V, dist.group.WORLD)
    weight = torch.eye(V)
    student, teacher = (9 * weight[[bound + 5]] for bound in shard.bounds[:2])
    own = weight[shard.start : shard.stop]
    for other, agrees in ((teacher, 0.0), (student, 1.0)):
        _, stats = linear_divergence(student, own, other, own, group=shard, return_stats=True)
        assert stats.top1_agreement.item() == agrees, stats


def check_nan_in_one_shard() -> None:
    """NaN in the head of any one rank reaches every token on all ranks, though Gloo's MAX drops some."""
    shard = VocabShard.from_vocab(V, dist.group.WORLD)
    for start in shard.bounds[:-1]:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = torch.ones(2, 9, 8, dtype=dtype)
            weight = torch.ones(V, 8, dtype=dtype).index_fill(0, torch.tensor(start + 5), torch.nan)
            own = weight[shard.start : shard.stop]
            loss, stats = linear_divergence(student, own, teacher, own, group=shard, return_stats=True)
            assert loss.isnan() and stats.divergence.isnan().all(), (dtype, start)


def check_unreduced() -> None:
    """Without reduce_hidden_grad each rank keeps its part of dh, and the parts add up to dh."""
    case, group = hard_case(28, V, 48), dist.group.WORLD
    shard = VocabShard.from_vocab(V, group)
    summed = evaluate(linear_divergence, cut(case, shard), group=shard).student_hidden
    part = evaluate(
        linear_divergence, cut(case, shard), group=replace(shard, reduce_hidden_grad=False)
    ).student_hidden
    assert not torch.equal(summed, part)
    dist.all_reduce(part)
    assert_no_worse(part, summed, evaluate(linear_divergence_reference, case.double()).student_hidden)
    for op in (logprobs_of(linear_logprobs), topk_of(linear_topk_divergence, case)):
        kept, every = (
            evaluate(op, cut(case, shard), group=replace(shard, reduce_hidden_grad=reduced)).student_hidden
            for reduced in (False, True)
        )
        assert not torch.equal(kept, every)
        dist.all_reduce(kept)
        assert_no_worse(kept, every, evaluate(op, case.double()).student_hidden)


def check_group_alone() -> None:
    """A process group alone gives the shards: the numbers of rows are gathered."""
    case, shard = hard_case(28, V, 48), VocabShard.from_vocab(V, dist.group.WORLD)
    for op in (linear_divergence, logprobs_of(linear_logprobs), topk_of(linear_topk_divergence, case)):
        assert_same_bits(
            evaluate(op, cut(case, shard), group=dist.group.WORLD),
            evaluate(op, cut(case, shard), group=shard),
        )


def check_communication() -> None:
    """A chunk communicates a few numbers per row, and dh.

    They are the statistics, the results of the second sweep, three per entry of a list and the statistics
    outside it, and two per label.
    """
    N, H, K, rows = 32, 48, 9, 8
    case = replace(hard_case(N, V, H, views=False), mask=None, labels=torch.arange(N), token_weights=None)
    frozen, shard = replace(case, trainable=("student_hidden",)), VocabShard.from_vocab(V, dist.group.WORLD)
    calls = (
        (
            linear_divergence,
            case,
            {"divergence": "jsd"},
            2,
            [("gather", 8), ("gather", 3), ("sum", 2), ("sum", H)],
        ),
        (
            linear_divergence,
            case._map(lambda t: t.bfloat16() if t.is_floating_point() else t),
            {"logits_dtype": "input"},
            1,
            [("largest", 1), ("largest", 1), ("gather", 8), ("sum", 2), ("sum", H)],
        ),
        (
            topk_of(linear_topk_divergence, case, K),
            case,
            {},
            1,
            [("gather", 8), ("sum", 3 * K), ("gather", 8), ("sum", 2), ("sum", H)],
        ),
        (logprobs_of(linear_logprobs), frozen, {}, 1, [("gather", 8), ("sum", 2), ("sum", H)]),
    )
    for op, whole_case, options, sides, of_row in calls:
        budget = sides * (-(-shard.widest // 16) * 16) * 4 * rows
        with collectives() as sent:
            evaluate(op, cut(whole_case, shard), **options, group=shard, workspace_bytes=budget)
        chunks = [sent[i : i + len(of_row)] for i in range(0, len(sent), len(of_row))]
        counts = [chunk[0][1] // of_row[0][1] for chunk in chunks]
        assert len(chunks) > 1 and sum(counts) == N, sent
        for chunk, count in zip(chunks, counts, strict=True):
            assert chunk == [(how, number * count) for how, number in of_row], sent


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Record each collective with its number of values per row."""
    sent: list[tuple[str, int]] = []
    originals = dist.all_gather, dist.all_reduce

    def gather(parts, values, group=None):
        sent.append(("gather", values.numel()))
        return originals[0](parts, values, group=group)

    def reduce(values, op=dist.ReduceOp.SUM, group=None):
        sent.append(("sum" if op == dist.ReduceOp.SUM else "largest", values.numel()))
        return originals[1](values, op=op, group=group)

    dist.all_gather, dist.all_reduce = gather, reduce
    try:
        yield sent
    finally:
        dist.all_gather, dist.all_reduce = originals


def check_dtensor() -> None:
    """DTensor heads work as shards, and gathered ones scatter their gradients to the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from opsd_kernels.vocab_parallel import gathered

    world = dist.get_world_size()
    mesh, case = init_device_mesh("cpu", (world,)), hard_case(28, V, 48, views=False, bias=False)
    one = evaluate(linear_divergence, case)
    head = distribute_tensor(case.student_weight, mesh, [Shard(0)]).requires_grad_()
    hidden = case.student_hidden.clone().requires_grad_()
    for weight, group in ((head, mesh.get_group()), (gathered(head), None)):
        loss = linear_divergence(
            hidden, weight, case.teacher_hidden, weight.detach() * 0.9, group=group, **case.options()
        )
        expected = replace(case, teacher_weight=case.student_weight * 0.9)
        truth = evaluate(linear_divergence, expected)
        dh, dW = torch.autograd.grad(loss * case.upstream, [hidden, head])
        assert dW.placements == head.placements
        assert_no_worse(
            Outcome(loss.detach(), dh, dW.full_tensor()),
            plain_outcomes(expected),
            evaluate(linear_divergence_reference, expected.double()),
        )
        assert truth.loss.shape == one.loss.shape
        of_whole = linear_logprobs(hidden, case.student_weight, case.labels, mask=case.mask)
        assert_no_worse(
            linear_logprobs(hidden, weight, case.labels, mask=case.mask, group=group), of_whole, of_whole
        )
    for weight, says in (
        (head, "with `group`"),
        (distribute_tensor(case.student_weight, mesh, [Replicate()]), "sharded on dimension 0"),
    ):
        group = None if weight is head else dist.group.WORLD
        with pytest.raises(ValueError, match=says):
            linear_divergence(hidden, weight, case.teacher_hidden, case.teacher_weight, group=group)


def check_errors() -> None:
    case, shard = hard_case(28, V, 48), VocabShard.from_vocab(V, dist.group.WORLD)
    part = cut(case, shard)
    wrong = {
        "student_weight: expected": lambda: evaluate(linear_divergence, case, group=shard),
        "weight: expected": lambda: linear_logprobs(
            case.student_hidden, case.student_weight, case.labels, mask=case.mask, group=shard
        ),
        "teacher_topk_ids: expected entries in [0, 211)": lambda: evaluate(
            topk_of(linear_topk_divergence, case, shift=V), part, group=shard
        ),
        "group: expected": lambda: evaluate(linear_divergence, part, group="all"),
        "vocab_size: expected a size above": lambda: evaluate(
            linear_divergence, part, group=shard, vocab_size=3
        ),
        "bounds: expected": lambda: VocabShard((0, 5), dist.group.WORLD),
        "at least one row": lambda: VocabShard.from_vocab(1, dist.group.WORLD),
    }
    for says, call in wrong.items():
        with pytest.raises((ValueError, TypeError), match=re.escape(says)):
            call()


def main(rank: str, world: str, rendezvous: str, result: str) -> None:
    """Run the cases: in fp32 on three ranks, which have a middle one, in float64 on two."""
    join(rank, world, rendezvous)
    dtype = torch.float64 if world == "2" else torch.float32
    checks = {name: (check, name, dtype) for name in CASES}
    checks |= {
        f"{what}, {name}": (check_sibling, cases, name, dtype)
        for what, cases in (("log-probs", LOGPROBS), ("list", LISTS))
        for name in cases
    }
    checks["statistics"] = (check_statistics, dtype)
    for narrow in (torch.bfloat16, torch.float16):
        for labelled in (True, False):
            checks[f"16-bit logits, {narrow}, labels: {labelled}"] = (check_16_bit_logits, narrow, labelled)
    apart = (
        check_peaks_in_the_same_place_of_two_shards,
        check_nan_in_one_shard,
        check_unreduced,
        check_group_alone,
        check_communication,
        check_dtensor,
        check_errors,
    )
    checks |= {f.__name__.removeprefix("check_"): (f,) for f in apart}
    run_checks(world, result, checks)


if __name__ == "__main__":
    main(*sys.argv[1:])
