"""Loads the model to train and its tokenizer, and says where trunk and head are: the tiny demo model and a Hugging Face model take the same path."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import linear_divergence
from opsd_kernels.integrations.transformers import without_adapter
from opsd_kernels.train.batch import completion_hidden
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.distributed.sharding import last_hidden
from opsd_kernels.train.types import Sequences


def hidden_states(model: PreTrainedModel, side: Sequences) -> Tensor:  # -> (B, T, H)
    """The trunk's last hidden states at the rows that predict the completion: no logits are made. A sharded model's head can be read afterwards."""
    return completion_hidden(last_hidden(model, side.tokens_BL), side.rows_BT)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id. Rows of a head from here on are padding: probability zero on both sides, and never sampled."""
    return max(tokenizer.get_vocab().values()) + 1


def load_pretrained(
    source: str | Path, config: TrainConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights from safetensors only, no remote code. Raises ConfigError where transformers finds no model it can load so."""
    dtype = getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model: expected 'tiny' or a Hugging Face model with safetensors weights, got {str(source)!r}: {reason}"
        ) from error
    return model.to(config.device), tokenizer


def load_student(
    base: str | Path, saved: Path | None, config: TrainConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train: the base, or what a checkpoint holds; with `lora_rank`, the base frozen below an adapter, new or saved."""
    if not config.lora_rank:
        model, tokenizer = load_pretrained(saved or base, config)
    else:
        model, tokenizer = load_pretrained(base, config)
        model = with_adapter(model, saved, config)
    if config.chat_template is not None:
        path = Path(config.chat_template)
        if not path.is_file():
            raise ConfigError(f"chat_template: expected an existing Jinja file, got {config.chat_template!r}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model, tokenizer


def recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing, under either of the names that transformers has for it."""
    model = without_adapter(model)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def with_adapter(model: PreTrainedModel, saved: Path | None, config: TrainConfig) -> PreTrainedModel:
    """LoRA on every linear layer but the head (arXiv:2106.09685), through peft. Raises ConfigError where peft is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"lora_rank: expected 0, as peft is not installed (pip install peft), got {config.lora_rank}"
        ) from error
    if saved is not None:
        return peft.PeftModel.from_pretrained(model, str(saved), is_trainable=True).to(config.device)
    adapter = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    # Forked, so that building the adapter leaves the run's own generator where it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, adapter)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where an external teacher reads other tokens than the student."""
    if student.get_vocab() != teacher.get_vocab():
        raise ConfigError(
            f"teacher_model: expected a tokenizer with the student's vocabulary of {len(student.get_vocab())} tokens, "
            f"got one of {len(teacher.get_vocab())} with other entries"
        )


def check_machine(config: TrainConfig) -> None:
    """Raises ConfigError for a device or a row backend that this machine lacks."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected 'cpu', as torch finds no CUDA device, got 'cuda'")
    row = torch.zeros(1, 1, device=config.device)
    try:
        linear_divergence(row, row, row, row, backend=config.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
