"""Every causal language model of transformers, built tiny from its config alone."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

NAMES = tuple(CLASSES)
V = 96
# Under the usual names; a config takes those it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), V),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "lru_width", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "d_inner", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "feed_forward_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What one model needs beside.
SPECIAL: dict[str, dict[str, Any]] = {}


def _smaller(config: Any, extra: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in SMALL.items() if hasattr(config, name)}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            values[name] = _smaller(part, extra.get(name, {}))
    return {**values, **{k: v for k, v in extra.items() if k not in values or not isinstance(v, dict)}}


def build(name: str, **options: Any) -> Any:
    """Build the class of model type `name` with random weights that do not depend on the caller's."""
    kind = CONFIG_MAPPING[name]
    config = kind(**{**_smaller(kind(), SPECIAL.get(name, {})), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, CLASSES[name])(config).eval()
