"""The loss of one micro-batch: a divergence between the student's and the teacher's next-token distributions at the student's own tokens.

Two trunk forwards give hidden states; `linear_divergence` takes them and the two heads. Logits are never held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from opsd_kernels import TokenStats, linear_divergence
from opsd_kernels.train.batch import IGNORE, completion_hidden
from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.types import Batch, Sequences


@dataclass(frozen=True)
class Head:
    """An LM head as the op takes it, read from the model: weight, bias, and the scale and softcap that its config names."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """Raises ValueError for a model whose output head is not a plain linear map."""
        module = model.get_output_embeddings()
        if not isinstance(module, Module) or getattr(module, "weight", None) is None or module.weight.ndim != 2:
            raise ValueError(f"model: expected a causal language model with a linear head, got {type(model).__name__}")
        config = model.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None)  # Granite divides by it; Cohere multiplies by logit_scale
        scale = 1.0 / divisor if divisor else float(getattr(config, "logit_scale", None) or 1.0)
        return cls(module.weight, getattr(module, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def hidden_states(model: PreTrainedModel, side: Sequences) -> Tensor:  # -> (B, T, H)
    """The trunk's last hidden states at the rows that predict the completion."""
    return completion_hidden(model.base_model(input_ids=side.tokens_BL, use_cache=False).last_hidden_state, side.rows_BT)


def distillation(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, config: TrainConfig, tokens: int, sequences: int
) -> tuple[Tensor, TokenStats]:
    """This micro-batch's part of the step's loss, in nats, and the statistics of its tokens.

    `tokens` and `sequences` count the whole optimisation step, so that the parts add up to what one batch would give.
    """
    # base_model is the trunk without its head: no logits are made, here or in the student's forward.
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, batch.teacher)
    student_hidden = hidden_states(student, batch.student)
    options: dict[str, Any] = {"reduction": "mean", "normalizer": tokens}
    if config.reduction == "sequence_mean":
        options = {"reduction": "sequence_mean"}
    mine, theirs = Head.of(student), Head.of(teacher)
    loss, stats = linear_divergence(
        student_hidden,
        mine.weight,
        teacher_hidden,
        theirs.weight,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.distill_temperature,
        student_bias=mine.bias,
        teacher_bias=theirs.bias,
        student_logit_scale=mine.logit_scale,
        teacher_logit_scale=theirs.logit_scale,
        student_softcap=mine.softcap,
        teacher_softcap=theirs.softcap,
        labels=batch.labels_BT,
        ignore_index=IGNORE,
        return_stats=True,
        backend=config.backend,
        **options,
    )
    if config.reduction == "sequence_mean":
        # `sequence_mean` knows this micro-batch only; every rollout has a token, so sizes are counts of sequences.
        loss = loss * (batch.size / sequences)
    return loss, stats
