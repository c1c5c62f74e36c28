"""Every causal language model of transformers, built tiny from its config alone."""

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

# Not built here, with the reason.
ABSENT = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "reads the keys and values of another model",
    "gemma4_unified_assistant": "reads the keys and values of another model",
}
NAMES = tuple(name for name in CLASSES if name not in ABSENT)
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
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What one model needs beside.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Multi-head latent attention does not group queries.
LATENT = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BLT_PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
BLT = {"num_key_value_heads": 4, "num_hidden_layers": 1, "hidden_size_global": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note"), LATENT),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu", "musicgen", "musicgen_melody"), LATENT),
    **dict.fromkeys(("bamba", "granitemoehybrid"), MAMBA),
    "blt": {"encoder_hash_byte_group_vocab": 64, **dict.fromkeys(BLT_PARTS, BLT)},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"num_hidden_layers": 4, "rope_parameters": {kind: ROPE for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8}},
    "gemma4_text": {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"mamba_d_state": 8, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"mamba_d_state": 8, "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _smaller(config: Any, extra: dict[str, Any]) -> dict[str, Any]:
    kind = type(config)
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    known -= {name for name in known if isinstance(getattr(kind, name, None), property)}
    values = {name: value for name, value in SMALL.items() if name in known}
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            values[name] = _smaller(part, extra.get(name, {}))
    parts = getattr(config, "sub_configs", {})
    return {**values, **{name: value for name, value in extra.items() if name not in parts}}


def build(name: str, **options: Any) -> Any:
    """Build the class of model type `name` with random weights that do not depend on the caller's."""
    model = getattr(transformers, CLASSES[name])
    kind = model.config_class
    config = kind(**{**_smaller(kind(), SPECIAL.get(name, {})), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config).eval()
