"""One rank under DeepSpeed ZeRO-3: DistillationHead against one process that sees all tokens.

See test_deepspeed.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from data_ranks import MANY_CHUNKS, RATE, STEPS, Collectives, H, Model, V, made, same_as_one, together
from launching import join, leave
from torch import Tensor

# These two limit the parameters that ZeRO-3 keeps beyond their module: at 0, every module gathers its own
# once in forward and once in backward.
LEAST = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


class Trunk(Model):
    """Its forward pass, the engine's, ends before the head."""

    def forward(self, inputs: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = torch.tanh(self.trunk(inputs + told))
        return torch.tanh(self.trunk(inputs)), teacher


def engine_of(model: Model, **zero: int) -> tuple[object, Callable[[Tensor], None]]:
    """The engine, and its backward pass and step."""
    import deepspeed

    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        **zero,
    }  # by default parameters below 100000 numbers stay whole
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=RATE), config=config
    )

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, update


def whole(model: Model) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_inside_the_engine(rank: int, ranks: int) -> None:
    for options in ({}, {"backward": "recompute", "workspace_bytes": MANY_CHUNKS}):
        model = made()
        engine, update = engine_of(model)
        assert not model.head.lm_head.weight.numel(), "ZeRO-3 has left the head whole"
        same_as_one(ranks, together(engine, rank, ranks, update, **options), whole(model))


def check_after_the_engine(rank: int, ranks: int) -> None:
    """Call the head outside the engine's forward pass, where ZeRO-3 does not see the use of a parameter."""
    model = made()
    model.__class__ = Trunk
    engine, update = engine_of(model)

    def loss_of(inputs: Tensor, told: Tensor, **tensors: object) -> Tensor:
        return model.head(*engine(inputs, told), **tensors)

    same_as_one(ranks, together(loss_of, rank, ranks, update), whole(model))


class Gathers(Collectives):
    """Counts gathers by the number of values, as they pad to the ranks."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "allgather" in function.name():
            self.counts[arguments[0].numel()] += 1
        return function(*arguments, **(options or {}))


def check_gathers_of_the_head(rank: int, ranks: int) -> None:
    """One in forward and one in backward, whatever the number of chunks."""
    size = -(-V * H // ranks) * ranks
    for options in (
        {},
        {"workspace_bytes": MANY_CHUNKS},
        {"workspace_bytes": MANY_CHUNKS, "backward": "recompute"},
    ):
        model = made()
        engine, update = engine_of(model, **LEAST)
        with Gathers() as gathers:
            together(engine, rank, ranks, update, **options)
        assert gathers.counts[size] == 2 * STEPS, gathers.counts
        assert max(gathers.counts) == size, gathers.counts


def main(rank: str, world: str, rendezvous: str, result: str, packages: str) -> None:
    if packages:
        sys.path.append(packages)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
    import deepspeed

    # else each machine compiles DeepSpeed's all-reduce through shared memory, 20 s
    deepspeed.ops.__compatible_ops__.clear()
    # on a busy machine a stall of 100 s was seen twice, and not explained
    join(rank, world, rendezvous, timeout_s=240)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    outcomes = {}
    for function in (check_inside_the_engine, check_after_the_engine, check_gathers_of_the_head):
        try:
            function(int(rank), int(world))
            outcomes[function.__name__] = None
        except Exception:  # told by name: the other checks go on
            outcomes[function.__name__] = traceback.format_exc()[-2000:]
        dist.barrier()
    Path(result).write_text(json.dumps(outcomes))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
