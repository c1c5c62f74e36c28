"""Shard student, optimiser states and teacher copies over the ranks with FSDP2.

A transformer block is a unit; the root holds the remaining weights, with the head and an embedding tied to
it. The root is unsharded between the trunk's forward and the end of backward, so that the op reads a plain
head: one all-gather per micro-batch for any number of chunks. Sampling unshards all weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from opsd_kernels.integrations.transformers import forward_to_head, without_adapter
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed.ranks import Ranks
from opsd_kernels.vocab_parallel import is_dtensor

# The root's method that FSDP treats as a forward.
FORWARD = "last_hidden"
SomeModule = TypeVar("SomeModule", bound=Module)


def place(model: SomeModule, config: TrainConfig, ranks: Ranks) -> SomeModule:
    """Shard the model in place with `shard=fsdp` and several ranks; otherwise a no-op.

    Make copies of the model before, and its optimiser after this call.
    """
    if config.shard == "none" or ranks.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    root = without_adapter(model)
    # Gradients of bf16 weights are summed over the ranks in fp32, as Ranks.sum_gradients does.
    options: dict[str, Any] = {
        "mesh": init_device_mesh(config.device, (ranks.world,)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for block in blocks(root):
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(root, reshard_after_forward=False, **options)
    for unit in units(root):
        # A sum, not a mean: losses are divided by the counts of all ranks already.
        unit.set_gradient_divide_factor(1.0)
        # gloo has no pre-multiplied sum.
        unit.set_force_sum_reduction_for_comms(True)
    setattr(root, FORWARD, MethodType(_last_hidden, root))
    register_fsdp_forward_method(root, FORWARD)
    # FSDP finds the root unit in its first forward.
    with torch.no_grad():
        last_hidden(model, torch.zeros(1, 1, dtype=torch.int64, device=config.device))
    release(model)
    return model


def blocks(root: Any) -> list[Module]:
    """Return the modules that transformers does not split over devices and that share no weight.

    A module that shares a weight with the head or another module belongs to the root.
    """
    names = set(getattr(root, "_no_split_modules", None) or ())
    found = [module for module in root.modules() if type(module).__name__ in names]
    users = Counter(
        id(weight) for module in (*found, root.get_output_embeddings()) for weight in module.parameters()
    )
    return [module for module in found if all(users[id(weight)] == 1 for weight in module.parameters())]


def units(root: Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: Module) -> bool:
    return FORWARD in vars(without_adapter(model))


def last_hidden(model: Module, tokens_BL: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Return the hidden states (B, L, H) that enter the head, and the output of the model's forward.

    A sharded model runs through its root, which leaves the head unsharded. `options` go to the forward.
    """
    root = without_adapter(model)
    run = getattr(root, FORWARD) if is_sharded(model) else MethodType(_last_hidden, root)
    return run(tokens_BL, **options)


def _last_hidden(root: Module, tokens_BL: Tensor, **options: Any) -> tuple[Tensor, Any]:
    # Not root(...): FSDP's hooks of the root run around this method already.
    return forward_to_head(root, {"input_ids": tokens_BL, **options}, root.forward)


def release(model: Module) -> None:
    """Reshard after forwards without a backward."""
    if not is_sharded(model):
        return
    root: Any = without_adapter(model)
    for unit in units(root):
        unit.reshard()
    # Not in torch 2.10, where FSDP's list of such forwards grows by an entry per block.
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()


@contextmanager
def whole(model: Module) -> Iterator[None]:
    """Unshard all weights, so that ranks may run the model a different number of times. A collective call."""
    if not is_sharded(model):
        yield
        return
    root: Any = without_adapter(model)
    root.set_reshard_after_forward(False)
    for unit in units(root):
        unit.unshard()
    try:
        yield
    finally:
        root.set_reshard_after_forward(True)
        root.set_reshard_after_forward(False, recurse=False)
        release(model)


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on ranks with `keep`, sharded ones on the CPU, and nothing elsewhere.

    A collective call. A tensor under two names, as tied weights have, is gathered once.
    """
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            sharded = is_dtensor(tensor)
            all_of_it = full(tensor.detach()) if sharded else tensor
            # Dropped at once on ranks without `keep`, which take part in the collective only.
            made[id(tensor)] = (all_of_it.cpu() if sharded else all_of_it) if keep else tensor
    return {name: made[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def full(tensor: Any) -> Tensor:
    """Gather a DTensor; any other tensor is returned itself. A collective call for a DTensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def cut_as(like: Any, value: Tensor) -> Tensor:
    """Lay out a whole tensor over the ranks like `like`.

    Every rank has the value, so no collective is issued.
    """
    value = value.to(like.device)
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Cloned, since a view would keep the whole tensor alive.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()
