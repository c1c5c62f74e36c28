"""Load the model to train and its tokenizer.

The tiny demo model and a Hugging Face model take the same path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opsd_kernels import linear_divergence
from opsd_kernels.integrations.transformers import check_head, without_adapter
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.models.gguf_file import located
from opsd_kernels.train.models.routers import router_weight


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id plus one.

    Rows of a head from here on are padding: probability zero, never sampled.
    """
    return max(tokenizer.get_vocab().values()) + 1


def load_pretrained(
    source: str | Path, config: TrainConfig, name: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights from safetensors only, without remote code.

    Raises ConfigError, with `name` as the key, if transformers cannot, or if the fused loss would not be that
    of the model's own log-probs (check_head).
    """
    dtype = getattr(torch, config.dtype)
    source = located(source, config.cache_dir, name)
    with _named(source, name):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = cast(Any, model).to(config.device)
    try:
        check_head(model, name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model, tokenizer


@contextmanager
def _named(source: str | Path, name: str = "model") -> Iterator[None]:
    """Turn an exception of transformers into a ConfigError that names the key and the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{name}: expected 'tiny', 'smollm2', a .gguf file or a Hugging Face model with safetensors "
            f"weights, got {str(source)!r}: {reason}"
        ) from error


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face model with its chat template, without the weights."""
    source = located(config.model, config.cache_dir)
    with _named(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    _set_template(tokenizer, config)
    return tokenizer


def _set_template(tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    if config.chat_template is None:
        return
    path = Path(config.chat_template)
    if not path.is_file():
        raise ConfigError(f"chat_template: expected an existing Jinja file, got {config.chat_template!r}")
    try:
        # A mark of byte order would stand in every prompt.
        tokenizer.chat_template = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ConfigError(f"chat_template: expected UTF-8 in {path}, got {error}") from error


def named_context_length(config: TrainConfig) -> int | None:
    """Return `context_length` of the configured model and external teacher, without their weights."""
    names = {"model": config.model, "teacher_model": config.teacher_model}
    settings = []
    for key, name in names.items():
        if name is not None:
            source = located(name, config.cache_dir, key)
            with _named(source, key):
                settings.append(AutoConfig.from_pretrained(source, trust_remote_code=False))
    return context_length(*settings)


def context_length(*settings: PretrainedConfig) -> int | None:
    """Return the positions, in tokens, that every model of these configs has; None without a limit.

    Recurrent models and ALiBi have none. A scaled rotary embedding reaches as far as its factor says.
    """
    lengths = [_positions(each.get_text_config()) for each in settings]
    return min((length for length in lengths if length is not None), default=None)


def _positions(settings: Any) -> int | None:
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    found = [getattr(settings, name, None) for name in names]
    length = next((value for value in found if isinstance(value, int) and value > 0), None)
    # The name since transformers 5, and the one before.
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    if length is None or not isinstance(rope, dict) or not isinstance(rope.get("factor"), int | float):
        return length
    if rope.get("rope_type", rope.get("type")) not in ("linear", "dynamic", "yarn"):
        return length
    before = rope.get("original_max_position_embeddings") or length
    return max(length, int(before * rope["factor"]))


def load_student(
    base: str | Path, saved: Path | None, config: TrainConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model to train: the base, or the checkpoint in `saved`.

    With `lora_rank` that is the frozen base under an adapter, new or from the checkpoint.
    """
    if not config.lora_rank:
        model, tokenizer = load_pretrained(saved or base, config)
    else:
        model, tokenizer = load_pretrained(base, config)
        model = with_adapter(model, saved, config)
    _set_template(tokenizer, config)
    # Now, and not in the first step.
    router_weight(model, config)
    if config.gradient_checkpointing:
        recompute_activations(model)
    return model, tokenizer


def recompute_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, under either of its names in transformers."""
    inner: Any = without_adapter(model)
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def with_adapter(model: PreTrainedModel, saved: Path | None, config: TrainConfig) -> PreTrainedModel:
    """Put LoRA (arXiv:2106.09685) on every linear layer but the head, through peft.

    The result is a peft model, which forwards to the transformers model inside it. Raises ConfigError if peft
    is not installed.
    """
    try:
        import peft as library
    except ImportError as error:
        raise ConfigError(
            f"lora_rank: expected 0, as peft is not installed (pip install peft), got {config.lora_rank}"
        ) from error
    # Annotated: peft wants an int for lora_alpha and calls its models by other types.
    peft: Any = library
    if saved is not None:
        return peft.PeftModel.from_pretrained(model, str(saved), is_trainable=True).to(config.device)
    adapter = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    # Forked, so that the new adapter does not advance the generator of the run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, adapter)


def check_same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if the vocabulary of an external teacher differs from the student's."""
    if student.get_vocab() != teacher.get_vocab():
        raise ConfigError(
            "teacher_model: expected a tokenizer with the student's vocabulary "
            f"of {len(student.get_vocab())} tokens, got one of {len(teacher.get_vocab())} with other entries"
        )


def check_machine(config: TrainConfig) -> None:
    """Raise ConfigError if this machine lacks the device or the row backend."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected 'cpu', as torch finds no CUDA device, got 'cuda'")
    row = torch.zeros(1, 1, device=config.device)
    try:
        linear_divergence(row, row, row, row, backend=config.backend)
    except ValueError as error:
        raise ConfigError(str(error)) from error
