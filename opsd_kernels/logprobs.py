"""`linear_logprobs`: log-probs and entropies of one head, on the loop and sweeps of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from ._core.autograd import log_probs
from ._core.problem import Problem, Side
from .spec import BACKWARDS, Divergence, LogitTransform, RowSpec, check_choice, expect


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
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
    """Log-probability of each label under the head, `log_softmax(hidden @ weight.T / temperature)[label]`, (...) in nats; with the entropy if asked.

    Logits as in `linear_divergence`: bias, scale, softcap, temperature; columns from `vocab_size` on have probability zero. Never holds more than
    `workspace_bytes` of them, in fp32 unless `logits_dtype="input"`. Both results are fp32 (fp64 for fp64 inputs) and differentiable: gradients flow to
    `hidden`, `weight` and `bias`, for any upstream gradient per token. Ignored tokens give 0.

    Passes over the head: one, and in backward three with a trainable head, for the logits are made again. With a frozen head and no entropy `auto` computes
    the gradient in the forward pass (two, and none in backward); `backward="recompute"` does not. Raises ValueError if a label that counts lies outside the
    vocabulary. With `group` the head is this rank's slice, as in `linear_divergence`; labels speak of the whole vocabulary.
    """
    check_choice("backward", backward, BACKWARDS)
    expect(isinstance(labels, Tensor), "labels", "a tensor", type(labels).__name__, TypeError)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    problem = Problem.of(
        RowSpec(Divergence.parse("reverse_kl"), transform, LogitTransform()),
        Side(hidden, weight, bias),
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
    late = "'auto' or 'recompute' for a trainable head or an entropy: the upstream gradient comes too late"
    expect(possible or backward != "in_forward", "backward", late, repr(backward))
    logprobs, entropies = log_probs(problem, possible and backward != "recompute", return_entropy)
    shaped = logprobs.reshape(hidden.shape[:-1])
    return (shaped, entropies.reshape(hidden.shape[:-1])) if return_entropy else shaped
