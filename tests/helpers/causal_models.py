"""Every causal language model of transformers, built tiny from its config alone."""

import inspect
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.24", reason="the table of models is that of transformers 5.24"
)
CLASSES = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    name: value
    for names, value in (
        ("vocab_size text_vocab_size vocab_size_per_layer_input", V),
        ("hidden_size n_embd d_model embedding_size dim lru_width emb_dim", 32),
        ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers", 2),
        ("num_encoder_layers num_decoder_layers", 2),
        ("intermediate_size n_inner d_ff d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim", 48),
        ("feed_forward_size ffn_hidden_size", 48),
        ("num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads", 4),
        ("num_key_value_heads kv_n_heads num_experts_per_tok moe_k moe_topk moe_top_k", 2),
        ("head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim", 8),
        ("num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim", 4),
        ("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
        ("kv_lora_rank q_lora_rank linear_head_dim", 16),
        ("max_position_embeddings n_positions n_ctx max_seq_len", 64),
        ("n_group topk_group bos_token_id", 1),
        ("pad_token_id", 0),
        ("eos_token_id", 2),
        # Decoders, where a config describes an encoder by default.
        ("is_decoder causal", True),
    )
    for name in names.split()
}
# What one model needs beside: a multiple of its heads, a pattern of its layers, parts with other names.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
MAMBA |= {"mamba_chunk_size": 8}
# Multi-head latent attention does not group queries.
LATENT = {"num_key_value_heads": 4}
# Every fourth layer is attention.
PERIOD = {"num_hidden_layers": 4}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
INDEXER |= {"indexer_compress_ratio": 4}
NARROW = {"hidden_size_per_layer_input": 8}
BLT = {"num_key_value_heads": 4, "num_hidden_layers": 1, "hidden_size_global": 32}
BLT_PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TYPES = ("full_attention", "sliding_attention")
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note"), LATENT),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu", "musicgen", "musicgen_melody", "sarvam_mla"), LATENT),
    # The head has fewer rows than the embedding.
    "inkling2_text": {"unpadded_vocab_size": V - 4},
    "inkling2_loop_text": {
        "unpadded_vocab_size": V - 4,
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), PERIOD),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), {**PERIOD, **INDEXER}),
    "recurrent_gemma": PERIOD,
    "bailing_hybrid": {**LATENT, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, **dict.fromkeys(BLT_PARTS, BLT)},
    "cohere_compass_text": {**PERIOD, "rope_parameters": dict.fromkeys(TYPES, ROPE)},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1, **NARROW},
    "gemma4": {"text_config": NARROW},
    "gemma4_text": NARROW,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        **LATENT,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": PERIOD,
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**PERIOD, "mamba_d_state": 8, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"n_mamba_heads": 8, "chunk_size": 8, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


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


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """Build the class of model type `name` with random weights that do not depend on the caller's."""
    model = getattr(transformers, CLASSES[name])
    kind = model.config_class
    config = kind(**{**_smaller(kind(), SPECIAL.get(name, {})), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model(config).eval()
