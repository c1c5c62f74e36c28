"""Run one rank of the tests of lists over ranks (test_forms_over_ranks.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from launching import join, once, run_checks
from quantised_cases import quantised_case
from vocab_ranks import cut
from vocab_ranks import whole as whole_outcome

from opsd_kernels import (
    QuantizedHead,
    VocabShard,
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs_at,
    linear_topk,
)
from opsd_kernels.testing import assert_no_worse, assert_same_bits, evaluate, hard_case, plain_outcomes
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference, linear_topk_reference

V, N, H = 211, 17, 12


def shards() -> list[VocabShard]:
    """Return even shards, and shards of very different widths."""
    world, group = dist.get_world_size(), dist.group.WORLD
    narrow = (0, *(V - 2 * (world - 1 - rank) for rank in range(world - 1)), V)
    return [VocabShard.from_vocab(V, group), VocabShard(narrow, group)]


def whole(part: torch.Tensor) -> torch.Tensor:
    """Concatenate the parts of all ranks."""
    parts: list[torch.Tensor] = [part] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return torch.cat(parts)


def check_lists(k: int, bias: bool) -> None:
    """Integer logits, so that entries of several shards tie, and a list longer than the narrow shards."""
    gen = torch.Generator().manual_seed(k)
    hidden, weight = torch.eye(5), torch.randint(-2, 3, (V, 5), generator=gen).float()
    removed = torch.where(torch.arange(V) % 3 == 0, -torch.inf, 0.0) if bias else None
    told = {"temperature": 0.5, "vocab_size": V - 1, "mask": torch.tensor([1, 1, 0, 1, 1])}
    truth = linear_topk_reference(hidden.double(), weight.double(), k, bias=removed, **told)
    for shard in shards():
        rows = slice(shard.start, shard.stop)
        own = None if removed is None else removed[rows]
        ours = linear_topk(hidden, weight[rows], k, bias=own, group=shard, workspace_bytes=40_000, **told)
        assert_same_bits(ours.ids, truth[0])
        assert_no_worse(ours.logprobs, truth[1].float(), truth[1])
        assert_no_worse(ours.tail_logprob, truth[2].float(), truth[2])


def check_logprobs_at(softcap: float | None) -> None:
    case = hard_case(N, V, H, torch.float32, largest_logit=8.0, masked_entry=None)
    mask = case.mask & (case.labels != -100)
    ids = torch.randint(V, (N, 6), generator=torch.Generator().manual_seed(0))
    ids[:, 2], ids[:, 3], ids[5] = -1, ids[:, 0], -1
    upstream = torch.linspace(-1, 2, N * 6).view(N, 6)

    def run(op: Callable, dtype: torch.dtype, rows: slice, **how: object) -> list[torch.Tensor]:
        leaves = [
            x.detach().to(dtype).requires_grad_()
            for x in (case.student_hidden, case.student_weight[rows], case.student_bias[rows])
        ]
        out = op(*leaves[:2], ids, bias=leaves[2], mask=mask, softcap=softcap, **how)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    every = slice(None)
    truth, plain = once(
        lambda: [run(linear_logprobs_at_reference, dtype, every) for dtype in (torch.float64, torch.float32)]
    )
    for shard in shards():
        rows = slice(shard.start, shard.stop)
        ours = run(linear_logprobs_at, torch.float32, rows, group=shard, workspace_bytes=12_000)
        ours[2:] = map(whole, ours[2:])
        for mine, peer, exact in zip(ours, plain, truth, strict=True):
            assert_no_worse(mine, peer, exact)


def check_target(divergence: str, topk: int | None) -> None:
    """Each rank holds the columns of its slice of a target, here logits in float64."""
    case = replace(hard_case(28, V, 48, torch.float32, largest_logit=8.0), token_weights=None)
    told = {"divergence": divergence, "topk": topk, "topk_support": "teacher"}
    truth, plain = once(
        lambda: (
            evaluate(linear_divergence_reference, case.double(), **told),
            plain_outcomes(case, **told),
        )
    )
    target = case.teacher_hidden.double() @ case.teacher_weight.double().T + case.teacher_bias.double()

    for shard in shards():

        def run(h, W, t, Wt, *, teacher_bias=None, shard=shard, **options):
            own = target[:, shard.start : shard.stop]
            return linear_divergence_to(h, W, own, group=shard, workspace_bytes=20_000, **options)

        assert_no_worse(whole_outcome(evaluate(run, cut(case, shard), **told)), plain, truth)


def check_cached(frozen_bias: bool) -> None:
    """The means of the slices add up, the gradient of the hidden states is summed over the ranks."""
    case = hard_case(28, V, 48, torch.float32, largest_logit=8.0, frozen_head=True, bias=frozen_bias)
    case = replace(case, token_weights=None)
    told = {"divergence": "forward_kl"}
    truth, plain = once(
        lambda: (
            evaluate(linear_divergence_reference, case.double(), **told),
            plain_outcomes(case, **told),
        )
    )
    for shard in shards():

        def run(h, W, t, Wt, *, labels, mask, divergence, shard=shard, **biases):
            mask, own = mask & (labels != -100), biases.get("student_bias")
            shared = {"student_bias": own, "mask": mask, "group": shard, "workspace_bytes": 20_000}
            cache = cache_forward_kl(t, Wt, W, teacher_bias=biases.get("teacher_bias"), **shared)
            return linear_cached_forward_kl(h, W, cache, **shared)

        assert_no_worse(whole_outcome(evaluate(run, cut(case, shard), **told)), plain, truth)


def check_quantised(role: str) -> None:
    """Each rank holds the values and scales of its rows."""
    case, _, head = quantised_case("int4 in int8, groups, zero points", role, torch.float32, V=V, N=28)
    truth, plain = once(lambda: (evaluate(linear_divergence_reference, case.double()), plain_outcomes(case)))
    for shard in shards():
        rows = slice(shard.start, shard.stop)
        own = QuantizedHead(head.values[rows], head.scales[rows], head.zero_points[rows], head.block_size)

        def run(h, W, t, Wt, *, shard=shard, own=own, **options):
            W, Wt = own if role != "teacher" else W, own if role != "student" else Wt
            return linear_divergence(h, W, t, Wt, group=shard, workspace_bytes=20_000, **options)

        assert_no_worse(whole_outcome(evaluate(run, cut(case, shard))), plain, truth)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for k in (1, 7, 40, V - 1):
        for bias in (False, True):
            yield f"list of {k}, {bias}", lambda k=k, bias=bias: check_lists(k, bias)
    for softcap in (None, 5.0):
        yield f"log-probs at ids, {softcap}", lambda softcap=softcap: check_logprobs_at(softcap)
    for divergence, topk in (("jsd", None), ("reverse_kl", None), ("forward_kl", 5)):
        name = f"target, {divergence}, {topk}"
        yield name, lambda divergence=divergence, topk=topk: check_target(divergence, topk)
    for role in ("teacher", "student", "shared"):
        yield f"quantised, {role}", lambda role=role: check_quantised(role)
    for bias in (False, True):
        yield f"cached forward KL, {bias}", lambda bias=bias: check_cached(bias)


def main(rank: str, world: str, rendezvous: str, result: str) -> None:
    join(rank, world, rendezvous)
    run_checks(world, result, {name: (check,) for name, check in checks()})


if __name__ == "__main__":
    main(*sys.argv[1:])
