"""Several processes, one run, under a launcher such as `torchrun`: rollouts and micro-batches are split over the ranks, all else is the same on them.

Each rank holds the whole model, or with `shard` its part (sharding.py). Rollouts are exchanged as they are, so that contexts, metrics and evaluations are
computed by every rank from the same answers; gradients are summed, each already divided by the totals of the whole step, so the number of ranks changes no
mean. Rank 0 alone writes files: a checkpoint knows nothing of ranks, and resumes on any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from opsd_kernels.train.config.values import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process and the number of all. With one there is nothing to exchange."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part: every `world`-th."""
        return list(items[self.rank :: self.world])

    def together(self, mine: list[Item]) -> list[Item]:
        """All ranks' shares, in the order of the whole."""
        if self.world == 1:
            return mine
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, mine)
        return [shares[i % self.world][i // self.world] for i in range(sum(map(len, shares)))]

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Sums gradients over the ranks in place, all in one message. A rank that had no micro-batch adds zeros."""
        if self.world == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self.total(torch.cat([parameter.grad.flatten().float() for parameter in trained]))
        for parameter, summed in zip(
            trained, flat.split([parameter.numel() for parameter in trained]), strict=True
        ):
            parameter.grad.copy_(summed.view_as(parameter))

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.world == 1 else any(self.together([flag]))

    def on_first(self, action: Callable[[], Item]) -> Item | None:
        """Rank 0 acts while the others wait, who get None. What it raises all raise, so that none waits for a rank that has left."""
        if self.world == 1:
            return action()
        result, error = None, None
        if self.first:
            try:
                result = action()
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
        told: list[Any] = [error]
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise error or told[0]
        return result

    def on_first_asking(
        self, action: Callable[[Callable[[str], Item]], Any], answer: Callable[[str], Item]
    ) -> None:
        """Rank 0 acts, and may ask: `ask(name)` is `answer(name)` there, which all ranks call."""

        def told(name: str | None) -> str | None:
            sent = [name]
            if self.world > 1:
                dist.broadcast_object_list(sent)
            return sent[0]

        def ask(name: str) -> Item:
            told(name)
            return answer(name)

        def lead() -> None:
            try:
                action(ask)
            finally:
                told(None)

        if not self.first:
            while (name := told(None)) is not None:
                answer(name)
        self.on_first(lead)

    def first_then_all(self, action: Callable[[], Item]) -> Item:
        """Rank 0 acts, then the others: what it made is there for them."""
        result = self.on_first(action)
        return result if self.first else action()


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that the launcher made, in their process group; one process alone needs no launcher. A rank that dies leaves the others with an error."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        # transformers would load the weights in the first process alone, and leave them to accelerate's wrapper.
        raise ConfigError(
            "launcher: expected accelerate launch without --use_fsdp (shard=fsdp is the trainer's own), got ACCELERATE_USE_FSDP=true"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if own:
            dist.destroy_process_group()
