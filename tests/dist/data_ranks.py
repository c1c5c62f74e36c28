"""Run one rank of the data-parallel tests (test_data_parallel.py).

DistillationHead under FSDP2 and DDP is compared with one process that holds all tokens.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from launching import join, run_checks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import DistillationHead, linear_divergence
from opsd_kernels.testing import assert_no_worse, evaluate, hard_case, plain_outcomes
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.weights import (
    AcrossRanks,
    EntropyGate,
    FirstFraction,
    LinearDecay,
    MeanOne,
    PrefixDiscrepancy,
)

N, H, V, STEPS, RATE = 24, 16, 101, 3, 0.5
MANY_CHUNKS = 3000  # bytes of workspace: three rows per chunk
SEQUENCE_CHUNKS = 12_000  # five or six: a sequence each


class Model(nn.Module):
    """Define a trunk and a head that serves as its own teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(H, H)
        self.head = DistillationHead(nn.Linear(H, V, bias=False), divergence="jsd")

    def forward(self, inputs: Tensor, told: Tensor, **tensors: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = torch.tanh(self.trunk(inputs + told))
        return self.head(torch.tanh(self.trunk(inputs)), teacher, **tensors)


def made(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    with torch.no_grad():
        model.head.lm_head.weight.mul_(3)
    return model


def tokens(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return student inputs, teacher inputs and labels of all ranks, (ranks, N, ...).

    The last rank has no valid token.
    """
    gen = torch.Generator().manual_seed(1)
    inputs, told = torch.randn(2, ranks, N, H, generator=gen)
    labels = torch.randint(V, (ranks, N), generator=gen)
    labels[torch.rand(ranks, N, generator=gen) < 0.3] = -100
    if ranks > 1:
        labels[-1] = -100
    return inputs, told, labels


def alone(ranks: int, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """Return losses and weights after some steps of one process."""
    model, (inputs, told, labels) = made().to(dtype), tokens(ranks)
    inputs, told = inputs.to(dtype), told.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(inputs.flatten(0, 1), told.flatten(0, 1), labels=labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def by_sgd(model: nn.Module) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def together(
    model: Callable[..., Tensor],
    rank: int,
    ranks: int,
    update: Callable[[Tensor], None] | None = None,
    **options: object,
) -> list[float]:
    """Run the same steps with each rank's own tokens, and return the losses.

    The loss is the mean over the tokens of all ranks: the normalizer undoes the average over ranks.
    """
    inputs, told, labels = (part[rank] for part in tokens(ranks))
    update, losses = update or by_sgd(model), []
    for _ in range(STEPS):
        count = (labels >= 0).sum()
        dist.all_reduce(count)
        loss = model(inputs, told, labels=labels, normalizer=count / ranks, **options)
        update(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def check_fsdp(rank: int, ranks: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = made()
    fully_shard(model.head)
    fully_shard(model)
    same_as_one(
        ranks, together(model, rank, ranks), {name: p.full_tensor() for name, p in model.named_parameters()}
    )


class Collectives(TorchDispatchMode):
    """Count collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "c10d" in function.namespace:
            self.counts[function.name()] += 1
        return function(*arguments, **(options or {}))


def check_fsdp_gathers_the_head_once(rank: int, ranks: int) -> None:
    """The number of collectives is the same with one chunk and with many."""
    from torch.distributed.fsdp import fully_shard

    counts = []
    for options in ({}, {"workspace_bytes": MANY_CHUNKS}):
        model = made()
        fully_shard(model.head)
        fully_shard(model)
        with Collectives() as collectives:
            together(model, rank, ranks, **options)
        counts.append(collectives.counts)
    assert counts[0] == counts[1] and any("allgather" in name for name in counts[0]), counts


def check_ddp(rank: int, ranks: int) -> None:
    model = nn.parallel.DistributedDataParallel(made())
    same_as_one(
        ranks,
        together(model, rank, ranks),
        {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()},
    )


def check_tokens_over_ranks(rank: int, ranks: int) -> None:
    """Weights of whole sequences hold for sequences that are split over ranks.

    One sequence ends in the first rank, and one begins in the last.
    """
    B, T = 3, 6 * ranks
    case = replace(hard_case(B * T, V, H, batch=B, largest_logit=8.0, views=False), token_weights=None)
    labels = case.labels.clone()
    labels[0, 5:] = labels[1, : T - 4] = labels[2, :6] = -100
    case, mine = replace(case, labels=labels), slice(6 * rank, 6 * rank + 6)
    part = {
        name: getattr(case, name)[:, mine] for name in ("student_hidden", "teacher_hidden", "labels", "mask")
    }
    for scheme in (
        FirstFraction(0.4),
        PrefixDiscrepancy(0.5),
        MeanOne(PrefixDiscrepancy(0.5)) * LinearDecay(0.2),
        EntropyGate("student", below=2.0),
    ):
        told = {"reduction": "sum", "divergence": "jsd"}
        truth, plain = (
            evaluate(linear_divergence_reference, case.double(), token_weights=scheme, **told),
            plain_outcomes(case, token_weights=scheme, **told),
        )
        outermost = AcrossRanks(scheme, dist.group.WORLD)
        # Within a product too all ranks issue as many collectives, though one has more chunks than another.
        for across, budget in ((outermost, MANY_CHUNKS), (1.0 * outermost, SEQUENCE_CHUNKS)):
            ours = evaluate(
                linear_divergence,
                replace(case, **part),
                token_weights=across,
                workspace_bytes=budget,
                **told,
            )
            for summed in (ours.loss, ours.student_weight, ours.student_bias):
                dist.all_reduce(summed)
            hidden = [torch.empty_like(ours.student_hidden) for _ in range(ranks)]
            dist.all_gather(hidden, ours.student_hidden.contiguous())
            assert_no_worse(replace(ours, student_hidden=torch.cat(hidden, dim=1)), plain, truth)


def same_as_one(ranks: int, losses: list[float], weights: dict[str, Tensor]) -> None:
    """Assert an error against float64 no worse than that of one process at the same precision."""
    (losses_of_one, one), (true_losses, truth) = (
        alone(ranks, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_no_worse(*(torch.tensor(values) for values in (losses, losses_of_one, true_losses)))
    assert weights.keys() == truth.keys()
    for name, weight in truth.items():
        assert_no_worse(weights[name], one[name], weight)


def die(rank: int, ranks: int) -> None:
    """If the last rank exits in the middle of the work, the others must raise an error."""
    from torch.distributed.fsdp import fully_shard

    model = made()
    fully_shard(model.head)
    fully_shard(model)
    together(model, rank, ranks)
    if rank == ranks - 1:
        os._exit(7)
    together(model, rank, ranks)


def main(rank: str, world: str, rendezvous: str, result: str, task: str = "check") -> None:
    join(rank, world, rendezvous, timeout_s=20.0)
    if task == "die":
        die(int(rank), int(world))
        return
    functions = check_fsdp, check_fsdp_gathers_the_head_once, check_ddp, check_tokens_over_ranks
    run_checks(world, result, {each.__name__: (each, int(rank), int(world)) for each in functions})


if __name__ == "__main__":
    main(*sys.argv[1:])
