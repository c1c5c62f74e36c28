"""Loads the model to train and its tokenizer: the tiny demo model and a Hugging Face model take the same path."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import linear_divergence
from opsd_kernels.train.config import ConfigError, TrainConfig


def load_pretrained(source: str | Path, config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights from safetensors only, no remote code. Raises ConfigError where transformers finds no model it can load so."""
    dtype = getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model: expected 'tiny' or a Hugging Face model with safetensors weights, got {str(source)!r}: {reason}") from error
    return model.to(config.device), tokenizer


def check_machine(config: TrainConfig) -> None:
    """Raises ConfigError for a device or a row backend that this machine lacks."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected 'cpu', as torch finds no CUDA device, got 'cuda'")
    row = torch.zeros(1, 1, device=config.device)
    try:
        linear_divergence(row, row, row, row, backend=config.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
