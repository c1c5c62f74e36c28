"""FSDP2 under the trainer: weights, gradients, optimiser states and the copies that teach are cut over the ranks.

A transformer block is a unit; what is left, with the head and the embedding that may be tied to it, is the root's. Between the trunk's forward and the end
of backward the root is whole, so that the op reads a plain head: one gather a micro-batch, however many chunks. Sampling holds all weights whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from opsd_kernels.integrations.transformers import trunk, without_adapter
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.distributed.ranks import Ranks
from opsd_kernels.vocab_parallel import is_dtensor

FORWARD = "last_hidden"  # the root's method that FSDP treats as a forward


def place(model: Module, config: TrainConfig, ranks: Ranks) -> Module:
    """The model, in place: with `shard=fsdp` and several ranks each keeps its part. Copies of it are made before, its optimiser after."""
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
        unit.set_gradient_divide_factor(1.0)  # sums: losses are divided by the counts of all ranks already
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies first
    setattr(root, FORWARD, MethodType(_last_hidden, root))
    register_fsdp_forward_method(root, FORWARD)
    with torch.no_grad():
        last_hidden(
            model, torch.zeros(1, 1, dtype=torch.int64, device=config.device)
        )  # FSDP learns in a first forward which unit is the root
    release(model)
    return model


def blocks(root: Module) -> list[Module]:
    """The modules that transformers would not split over devices, but those that share a weight with the head or each other: such a one is the root's."""
    names = set(getattr(root, "_no_split_modules", None) or ())
    found = [module for module in trunk(root).modules() if type(module).__name__ in names]
    users = Counter(
        id(weight) for module in (*found, root.get_output_embeddings()) for weight in module.parameters()
    )
    return [module for module in found if all(users[id(weight)] == 1 for weight in module.parameters())]


def units(root: Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: Module) -> bool:
    return FORWARD in vars(without_adapter(model))


def last_hidden(model: Module, tokens_BL: Tensor) -> Tensor:  # -> (B, L, H)
    """The trunk's output; of a sharded model through its root, whose head is whole from then on."""
    root = without_adapter(model)
    return getattr(root, FORWARD)(tokens_BL) if is_sharded(model) else _last_hidden(root, tokens_BL)


def _last_hidden(root: Module, tokens_BL: Tensor) -> Tensor:
    return trunk(root)(input_ids=tokens_BL, use_cache=False).last_hidden_state


def release(model: Module) -> None:
    """Back to shards after forwards that no backward followed."""
    if not is_sharded(model):
        return
    root = without_adapter(model)
    for unit in units(root):
        unit.reshard()
    if hasattr(
        root, "reset_iter_state"
    ):  # not in torch 2.10, where FSDP's list of such forwards grows by an entry a block
        root.reset_iter_state()


@contextmanager
def whole(model: Module) -> Iterator[None]:
    """All weights on every rank meanwhile, so that ranks may run the model a different number of times. Entered by all ranks."""
    if not is_sharded(model):
        yield
        return
    root = without_adapter(model)
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
    """Whole tensors, sharded ones on the CPU, where `keep`; nothing elsewhere. Called by all ranks. One that comes twice comes out once, as tied weights do."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            full = tensor.detach().full_tensor() if is_dtensor(tensor) else tensor
            made[id(tensor)] = full.cpu() if is_dtensor(tensor) and keep else full if keep else tensor
    return {name: made[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def cut_as(like: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, laid out over the ranks as `like` is. Nothing is sent: every rank has the value."""
    value = value.to(like.device)
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value, like.device_mesh, like.placements, src_data_rank=None
    ).clone()  # a view would keep the whole
