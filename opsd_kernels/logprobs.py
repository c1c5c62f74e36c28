"""Define `linear_logprobs`: log-probs and entropies of one head, by the loop and sweeps of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from ._core.autograd import log_probs
from ._core.problem import Problem, Side
from .spec import BACKWARDS, Divergence, LogitTransform, RowSpec, check_choice, check_tensor, expect


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    backward: str = "auto",
    logits_dtype: str | torch.dtype = "auto",
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-probability of each label under one head, `log_softmax(logits)[label]`, in nats.

    The logits are those of `linear_divergence`: `hidden @ weight.T`, with `bias`, `lora`, `logit_scale`,
    `softcap` and `temperature`; columns from `vocab_size` on have probability zero. The op never holds more
    than `workspace_bytes` of them, in fp32 unless `logits_dtype="input"`. Gradients flow to `hidden`,
    `weight`, `bias` and the adapter `lora` (A, B, scaling), for any upstream gradient per token. With `group`
    the head is the slice of this rank, as in `linear_divergence`, and labels are those of the whole
    vocabulary.

    The forward pass takes one GEMM pass over the head, and backward takes three with a trainable head,
    because it projects the logits again. With a frozen head and no entropy, "auto" and "in_forward" compute
    the gradient in the forward pass (two passes, none in backward); "recompute" takes one, and two in
    backward.

    Returns the log-probs, (...) in fp32 (fp64 for fp64 inputs), 0 for ignored tokens. With `return_entropy`
    returns (log-probs, entropies), both differentiable, both (...) in nats.

    Raises ValueError if the label of a valid token lies outside the vocabulary, and for
    `backward="in_forward"` with a trainable head or an entropy; ValueError or TypeError for other bad
    arguments, as `linear_divergence` does.
    """
    check_choice("backward", backward, BACKWARDS)
    check_tensor("labels", labels)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    problem = Problem.of(
        RowSpec(Divergence.parse("reverse_kl"), transform, LogitTransform()),
        Side(hidden, weight, bias, lora),
        None,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
        group=group,
        prefixes=("", ""),
    )
    possible = problem.wants[0] and not (problem.trainable or return_entropy)
    late = "'auto' or 'recompute' for a trainable head or an entropy: forward lacks the upstream gradient"
    expect(possible or backward != "in_forward", "backward", late, repr(backward))
    logprobs, entropies = log_probs(problem, possible and backward != "recompute", return_entropy)
    shaped = logprobs.reshape(hidden.shape[:-1])
    return (shaped, entropies.reshape(hidden.shape[:-1])) if return_entropy else shaped
