"""Run one rank of the test of labels at the edges of shards (test_vocab_parallel.py).

Vocabularies of many sizes, so that shards of 16 successive widths, even and uneven ones, end the tiles of the
kernels in all places. Labels are the first
and the last column of each shard and their neighbours on other ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from launching import join, leave

from opsd_kernels import VocabShard, linear_divergence, linear_logprobs, linear_topk_divergence
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.testing import assert_no_worse
from opsd_kernels.weights import ImportanceRatio

H = 8
NAMES = ("log-probs", "mix", "weighted", "list", "student's log-probs", "teacher's log-probs", "dh", "dW")


def edges(shard: VocabShard, V: int) -> list[int]:
    """Return the columns around each boundary: last and first of two shards, and of the vocabulary."""
    around = {bound + step for bound in shard.bounds for step in (-2, -1, 0, 1)}
    return sorted(column for column in around if 0 <= column < V)


def results(V: int, shard: VocabShard | None, labels: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return log-probs, losses, statistics and gradients of all rows of the head."""
    gen = torch.Generator().manual_seed(V)
    N, rows = len(labels), slice(None) if shard is None else slice(shard.start, shard.stop)
    student, teacher = (torch.randn(N, H, generator=gen, dtype=torch.float64).to(dtype) for _ in range(2))
    heads = [torch.randn(V, H, generator=gen, dtype=torch.float64).to(dtype)[rows] for _ in range(2)]
    hidden, weight = student.requires_grad_(), heads[0].clone().requires_grad_()
    # Each token has a temperature of its own, at every other size.
    how = {} if V % 2 else {"temperature": torch.linspace(0.7, 1.4, N)}
    how |= {} if shard is None else {"group": shard}
    logprobs = linear_logprobs(hidden, weight, labels, **how)
    call = (hidden, weight, teacher, heads[1])
    options = {"labels": labels, "return_stats": True, **how}
    ratio = ImportanceRatio(torch.full((N,), -6.0))
    policy = PPOClip(torch.linspace(-1, 1, N), torch.full((N,), -6.0))
    mixed, stats = linear_policy_divergence(*call, policy=policy, **options)
    weighted, _ = linear_divergence(*call, token_weights=ratio, **options)
    ids = torch.stack([labels, labels.roll(1)], 1)
    listed = linear_topk_divergence(hidden, weight, ids, torch.full(ids.shape, -1.5), **how)
    values = [logprobs, mixed, weighted, listed, stats.student_logprob, stats.teacher_logprob]
    loss = mixed + weighted + listed + (logprobs * torch.linspace(-1, 1, N)).sum()
    dh, dW = torch.autograd.grad(loss, [hidden, weight])
    if shard is not None:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, dW)
        dW = torch.cat(parts)
    return [*(value.detach() for value in values), dh, dW]


def main(rank: str, world: str, rendezvous: str, result: str) -> None:
    join(rank, world, rendezvous)
    failed = {}
    for V in (1000 + 3 * k + k % 3 for k in range(16)):
        shard = VocabShard.from_vocab(V, dist.group.WORLD)
        labels = torch.tensor(edges(shard, V))
        for dtype in (torch.float64, torch.float32):
            pairs = zip(results(V, shard, labels, dtype), results(V, None, labels, dtype), strict=True)
            for name, (got, one) in zip(NAMES, pairs, strict=True):
                try:
                    assert_no_worse(got, one, one)
                except AssertionError as error:
                    failed[f"V={V}, {dtype}, {name}"] = str(error)
    outcomes = {"labels at the edges of shards": json.dumps(failed) if failed else None}
    Path(result).write_text(json.dumps(outcomes))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
