"""Run one training in several processes under a launcher such as `torchrun`.

Rollouts and micro-batches are split over the ranks; all else is equal on them. Each rank holds the whole
model, or its part with `shard` (sharding.py). Rollouts are gathered, so that every rank computes contexts,
metrics and evaluations from the same answers. Gradients are summed, each already divided by the totals of the
whole step, so that no mean depends on the number of ranks. Rank 0 alone writes files; a checkpoint resumes on
any number of ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.train.config.values import ConfigError

Item = TypeVar("Item")
# gloo counts milliseconds, so that this is far from its largest number.
FOREVER = timedelta(days=365)
PLAIN = {int, float, bool, str, bytes, type(None)}


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of ranks. With one rank every collective is a no-op.

    Objects travel over `objects` (gloo), their tensors through CPU memory to each rank's `device`. Ranks wait
    in `waiting` (gloo) for rank 0 to save or load alone, for as long as it takes; they raise if it dies. A
    group that is None is the default one.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    objects: dist.ProcessGroup | None = None
    waiting: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True on rank 0, which prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's part: every `world`-th item."""
        return list(items[self.rank :: self.world])

    def together(self, mine: list[Item]) -> list[Item]:
        """Gather the shares of all ranks, in the order before `share`, with tensors on this rank's device."""
        if self.world == 1:
            return mine
        shares: list[Any] = [None] * self.world
        # A tensor that is pickled on its GPU is unpickled on the sender's, which every rank then occupies.
        dist.all_gather_object(shares, [moved(item, "cpu") for item in mine], group=self.objects)
        ordered = [shares[i % self.world][i // self.world] for i in range(sum(map(len, shares)))]
        return [moved(item, self.device) for item in ordered]

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum gradients over the ranks in place, in one collective.

        A rank without a micro-batch adds zeros.
        """
        if self.world == 1:
            return
        grads: list[Tensor] = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        flat = self.total(torch.cat([grad.flatten().float() for grad in grads]))
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))

    def any(self, flag: bool) -> bool:
        """True if the flag is true on any rank."""
        return flag if self.world == 1 else any(self.together([flag]))

    def on_first(self, action: Callable[[], Item]) -> Item | None:
        """Run `action` on rank 0 while the others wait and return None.

        Every rank raises an exception of rank 0, so that none hangs in a later collective.
        """
        if self.world == 1:
            return action()
        result, error = None, None
        if self.first:
            try:
                result = action()
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
        told: list[Any] = [error]
        dist.broadcast_object_list(told, group=self.waiting)
        if told[0] is not None:
            raise error or told[0]
        return result

    def on_first_asking(
        self, action: Callable[[Callable[[str], Item]], Any], answer: Callable[[str], Item]
    ) -> None:
        """Run `action(ask)` on rank 0.

        There `ask(name)` calls `answer(name)` on all ranks, and returns it.
        """

        def told(name: str | None) -> str | None:
            sent = [name]
            if self.world > 1:
                dist.broadcast_object_list(sent, group=self.waiting)
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
        """Run `action` on rank 0, then on the others, which find the files that it made."""
        result = self.on_first(action)
        return cast(Item, result) if self.first else action()


ALONE = Ranks()


def moved(item: Any, device: str) -> Any:
    """Return the item with its tensors on `device`, also those in lists, tuples, dicts and dataclasses."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, dict):
        return {key: moved(value, device) for key, value in item.items()}
    if type(item) in (list, tuple):
        # The tokens of an answer are not asked one by one.
        plain = PLAIN.issuperset(map(type, item))
        return item if plain else type(item)(moved(value, device) for value in item)
    if is_dataclass(item) and not isinstance(item, type):
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        changed = {name: new for name, old in fields.items() if (new := moved(old, device)) is not old}
        return dataclasses.replace(item, **changed) if changed else item
    return item


@contextmanager
def joined(device: str, timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """Join the launcher's process group, and leave it at the end. One process alone needs no launcher.

    A rank that waits in a collective for more than `timeout_s` seconds raises; one that waits for rank 0 to
    save or load does not. After the death of a rank the collectives of the others raise.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        # transformers would load the weights in the first process only, for accelerate to distribute.
        raise ConfigError(
            "launcher: expected accelerate launch without --use_fsdp (shard=fsdp is the trainer's own), "
            "got ACCELERATE_USE_FSDP=true"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    own, timeout = not dist.is_initialized(), timedelta(seconds=timeout_s)
    if own:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    objects = dist.new_group(backend="gloo", timeout=timeout)
    waiting = dist.new_group(backend="gloo", timeout=FOREVER)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, objects, waiting)
    finally:
        for group in (objects, waiting, *([None] if own else [])):
            dist.destroy_process_group(group)
