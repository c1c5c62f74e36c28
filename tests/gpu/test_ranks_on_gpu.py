"""The vocabulary-parallel op in a group of one with the device's collectives, and the trainer."""

import json

import placing
import pytest
import torch
import torch.distributed as dist
from placing import placed, unmasked

from opsd_kernels import VocabShard, linear_divergence
from opsd_kernels.testing import assert_no_worse, assert_on_target, evaluate, hard_case, plain_outcomes
from opsd_kernels.testing.reference import linear_divergence_reference

SIZES = (29, 211, 24) if placing.DRY_RUN else (301, 4099, 64)
OPTIONS = {
    "reverse KL": {},
    "JSD": {"divergence": "jsd"},
    "clips": {"divergence": "forward_kl", "entry_clip": 0.05, "token_clip": 0.6},
    "top-k": {"topk": 5},
}


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group(
        "gloo" if placing.DRY_RUN else "nccl", store=dist.HashStore(), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_group_of_one(backend, alone, options, backward, dtype):
    """The merges and collectives of a shard keep the gates of the op without a group."""
    case = placed(unmasked(hard_case(*SIZES, dtype, largest_logit=8.0)))
    shard = VocabShard.from_vocab(case.student_weight.shape[0], alone)
    got = evaluate(linear_divergence, case, backend=backend, backward=backward, group=shard, **options)
    truth = evaluate(linear_divergence_reference, case.double(), **options)
    if dtype == torch.float32:
        assert_no_worse(got, plain_outcomes(case, **options), truth)
    else:
        assert_on_target(got, truth, "default")


def test_the_trainer_learns_there(tmp_path):
    """A base made on the CPU takes steps on the device with positive losses and a complete summary."""
    pytest.importorskip("transformers")
    from opsd_kernels.train.config import TrainConfig
    from opsd_kernels.train.loop import train
    from opsd_kernels.train.records.log import read_metrics

    small = {
        "tiny_hidden": 32,
        "tiny_layers": 1,
        "tiny_heads": 2,
        "warm_accuracy": 2e-4,
        "warm_batch": 32,
        "warm_max_steps": 100,
        "tensorboard": False,
    }
    sizes = {"steps": 3, "prompts_per_step": 4, "group_size": 4, "eval_samples": 8, "probe_samples": 4}
    train(
        TrainConfig(**small, **sizes, device=placing.DEVICE.type, cache_dir=str(tmp_path / "cache")),
        tmp_path / "run",
    )
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["loss"] > 0 for line in lines)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
