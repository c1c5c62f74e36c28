"""Decisions before any process group exists; tests/dist has the rest."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, Qwen3Config

from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.distributed import sharding
from opsd_kernels.train.distributed.ranks import ALONE, Ranks, joined

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("shape", [
    LlamaConfig(**SHAPE),
    Qwen3Config(head_dim=8, num_key_value_heads=1, tie_word_embeddings=True, **SHAPE),
    # The embeddings of BERT, which share the head's weight, are also among its _no_split_modules.
    BertConfig(is_decoder=True, **SHAPE),
], ids=["llama", "tied", "embeddings"])  # fmt: skip
def test_a_unit_is_a_block(shape):
    model = AutoModelForCausalLM.from_config(shape)
    assert [
        type(block).__name__.removesuffix("DecoderLayer").removesuffix("Layer").lower()
        for block in sharding.blocks(model)
    ] == [shape.model_type] * 2


def test_blocks_that_share_weights_stay_with_the_root():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    assert sharding.blocks(model) == []


def test_one_process_is_left_as_it_is():
    model = torch.nn.Linear(2, 2)
    assert sharding.place(model, TrainConfig(shard="fsdp"), ALONE) is model
    assert sharding.place(model, TrainConfig(), Ranks(0, 2)) is model
    with sharding.whole(model):
        assert not sharding.is_sharded(model)


def test_tied_tensors_are_gathered_once():
    tensor, other = torch.ones(2), torch.ones(2)
    found = sharding.gathered({"a": tensor, "b": tensor, "c": other}, keep=True)
    assert found["a"] is found["b"] is tensor and found["c"] is other
    assert sharding.gathered({"a": tensor}, keep=False) == {}


def test_accelerates_own_fsdp_is_refused(monkeypatch):
    """With it transformers loads the weights in the first process alone."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match="launcher: expected accelerate launch without --use_fsdp"),
        joined("cpu"),
    ):
        pass
