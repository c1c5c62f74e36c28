"""Load the model to train and its tokenizer.

The tiny demo model and a Hugging Face model take the same path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import linear_divergence
from opsd_kernels.integrations.transformers import (
    check_head,
    probe_tokens,
    router_coefficient,
    router_loss,
    scoring,
    without_adapter,
)
from opsd_kernels.train.batch import completion_hidden
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.distributed.sharding import last_hidden
from opsd_kernels.train.types import Sequences

# What makes a mixture-of-experts model return its auxiliary loss.
ROUTED = {"output_router_logits": True, "return_dict": True}
_routed: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


def hidden_states(model: PreTrainedModel, side: Sequences) -> Tensor:
    """Shape (B, T, H): the trunk's last hidden states at the rows that predict the completion.

    No logits are computed. A sharded model's head is readable afterwards.
    """
    return completion_hidden(last_hidden(model, side.tokens_BL)[0], side.rows_BT)


def routed_hidden_states(model: PreTrainedModel, side: Sequences, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return `hidden_states`, and the routers' auxiliary loss (0-dim), without padding."""
    length = side.tokens_BL.shape[1]
    last_B1 = (side.rows_BT * mask_BT).amax(1, keepdim=True)
    attended_BL = (torch.arange(length, device=last_B1.device) <= last_B1).long()
    hidden, output = last_hidden(model, side.tokens_BL, attention_mask=attended_BL, **ROUTED)
    router = router_loss(output)
    assert router is not None
    return completion_hidden(hidden, side.rows_BT), router


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
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{name}: expected 'tiny' or a Hugging Face model with safetensors weights, "
            f"got {str(source)!r}: {reason}"
        ) from error
    model = cast(Any, model).to(config.device)
    try:
        check_head(model, name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model, tokenizer


def router_weight(model: PreTrainedModel, config: TrainConfig) -> float:
    """Return the factor of the student's auxiliary router loss, 0 if it has none.

    Raises ConfigError for a factor of the settings that the model has no loss for.
    """
    given = config.router_aux_loss_coef
    weight = router_coefficient(model) if given is None else given
    if weight == 0 or _has_router_loss(model):
        return weight
    if given is not None:
        raise ConfigError(
            f"router_aux_loss_coef: expected null or 0 for {type(without_adapter(model)).__name__}, whose "
            f"forward returns no auxiliary loss of its routers, got {given}"
        )
    return 0.0


@torch.no_grad()
def _has_router_loss(model: PreTrainedModel) -> bool:
    """Try it once per model, since configs name a factor that some models do not use."""
    inner = without_adapter(model)
    if inner not in _routed:
        with scoring(model):
            try:
                _routed[inner] = router_loss(last_hidden(model, probe_tokens(model), **ROUTED)[1]) is not None
            except TypeError:
                # A forward without the argument.
                _routed[inner] = False
    return _routed[inner]


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
    if config.chat_template is not None:
        path = Path(config.chat_template)
        if not path.is_file():
            raise ConfigError(f"chat_template: expected an existing Jinja file, got {config.chat_template!r}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
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
