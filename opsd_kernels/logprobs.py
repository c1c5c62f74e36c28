"""Define the ops of one head: log-probs of labels or given ids, entropies, the k most likely tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._core.autograd import log_probs, log_probs_at
from ._core.listed import topk
from ._core.problem import Side, check_list, of_one_side
from .quantized import QuantizedHead
from .spec import BACKWARDS, Adapter, LogitTransform, check_choice, check_tensor, expect


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor | QuantizedHead,  # (V, H)
    labels: Tensor,  # (...) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    lora: Adapter | None = None,
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
    problem = of_one_side(
        Side(hidden, weight, bias, lora), transform, labels=labels, ignore_index=ignore_index, mask=mask,
        vocab_size=vocab_size, logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, backend=backend,
        group=group,
    )  # fmt: skip
    possible = problem.wants[0] and not (problem.trainable or return_entropy)
    late = "'auto' or 'recompute' for a trainable head or an entropy: forward lacks the upstream gradient"
    expect(possible or backward != "in_forward", "backward", late, repr(backward))
    logprobs, entropies = log_probs(problem, possible and backward != "recompute", return_entropy)
    shaped = logprobs.reshape(hidden.shape[:-1])
    return (shaped, entropies.reshape(hidden.shape[:-1])) if return_entropy else shaped


class TopK(NamedTuple):
    """Hold the k most likely tokens of each position, in nats. Masked tokens: ids -1, log-probs 0."""

    ids: Tensor  # (..., k) int64, by falling probability, the lower id first among equals
    logprobs: Tensor  # (..., k), under the whole vocabulary
    tail_logprob: Tensor  # (...), log of the probability of all other tokens; -inf if there are none


def linear_topk(
    hidden: Tensor,  # (..., H)
    weight: Tensor | QuantizedHead,  # (V, H)
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    lora: Adapter | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> TopK:
    """List the k most likely tokens of each position under one head, with their log-probs in nats.

    What a server returns as top log-probs, from the hidden states: a teacher's list for
    `linear_topk_divergence`. The logits are those of `linear_logprobs`, in fp32 (fp64 for fp64 inputs), and
    never more than `workspace_bytes` of them. The order is exact, on equal logits too. `tail_logprob` is
    summed from the other tokens, and keeps its digits where the list holds nearly all probability. With
    `group` the head is the slice of this rank, and ids are those of the whole vocabulary. One GEMM pass over
    the head; without a gradient.

    A token that a bias of -inf removes is listed after all others, with log-prob -inf. The log-probs of a row
    with a NaN logit are NaN.

    Raises ValueError for k outside [1, vocabulary]; ValueError or TypeError for other bad arguments, as
    `linear_divergence` does.
    """
    expect(isinstance(k, int) and not isinstance(k, bool), "k", "an int", type(k).__name__, TypeError)
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    problem = of_one_side(
        Side(hidden, weight, bias, lora), transform,
        mask=mask, vocab_size=vocab_size, workspace_bytes=workspace_bytes, backend=backend, group=group,
    )  # fmt: skip
    expect(1 <= k <= problem.vocab, "k", f"at least 1 and at most {problem.vocab}, the vocabulary", k)
    ids, logprobs, tail = topk(problem, k)
    leading = hidden.shape[:-1]
    return TopK(ids.reshape(*leading, k), logprobs.reshape(*leading, k), tail.reshape(leading))


def linear_logprobs_at(
    hidden: Tensor,  # (..., H)
    weight: Tensor | QuantizedHead,  # (V, H)
    ids: Tensor,  # (..., K) int64
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    lora: Adapter | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor:
    """Compute the log-probs of K given tokens at each position under one head, in nats.

    The logits and their memory are those of `linear_topk`. Gradients flow to `hidden`, `weight`, `bias` and
    the adapter `lora` (A, B, scaling), for any upstream gradient: one GEMM pass forward, and in backward
    three with a trainable head and two with a frozen one, because it projects the logits again. An id may
    occur several times; an id of -1 is none.

    Returns (..., K) in fp32 (fp64 for fp64 inputs), 0 for an id of -1 and for masked tokens.

    Raises ValueError if an id of an unmasked token lies outside [-1, vocabulary); on CUDA that is an
    asynchronous device-side assert. ValueError or TypeError for other bad arguments, as `linear_divergence`
    does.
    """
    transform = LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)
    problem = of_one_side(
        Side(hidden, weight, bias, lora), transform,
        mask=mask, vocab_size=vocab_size, workspace_bytes=workspace_bytes, backend=backend, group=group,
    )  # fmt: skip
    check_list("ids", ids, hidden.shape[:-1])
    expect(ids.dtype == torch.int64, "ids", "dtype int64", ids.dtype, TypeError)
    expect(ids.device == hidden.device, "ids", f"a tensor on {hidden.device}, as hidden", ids.device)
    return log_probs_at(problem, ids.reshape(-1, ids.shape[-1])).reshape(ids.shape)
