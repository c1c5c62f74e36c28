"""Loads the model to train and its tokenizer: the tiny demo model and a Hugging Face model take the same path."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels.train.config import TrainConfig


def load_pretrained(source: str | Path, config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights from safetensors only, no remote code. Errors are transformers' own, and name the source."""
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return model.to(config.device), tokenizer
