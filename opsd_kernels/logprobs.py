"""`linear_logprobs`: log-probs and entropies of one head, on the loop and sweeps of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from ._core import checks
from ._core.autograd import LogProbs
from ._core.checks import Head
from ._rows.contract import Column
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
    shard, head = checks.of_rank(group, **{"": Head(hidden, weight, bias)})
    flat, nobody, _ = checks.heads(**head)
    expect(isinstance(labels, Tensor), "labels", "a tensor", type(labels).__name__, TypeError)
    valid, flat_labels = checks.valid_tokens(hidden, labels, ignore_index, mask)
    transform = _transform(logit_scale, softcap, temperature)
    vocab = checks.vocabulary(weight.shape[0] if shard is None else shard.vocab_size, None, vocab_size)
    spec = RowSpec(Divergence.parse("reverse_kl"), transform, LogitTransform())
    call = checks.make_call(
        spec,
        flat,
        nobody,
        False,
        valid,
        flat_labels,
        vocab,
        logits_dtype,
        workspace_bytes,
        backend,
        shard=shard,
    )
    possible = call.grad_hidden and not (call.grad_weight or call.grad_bias or return_entropy)
    expect(
        possible or backward != "in_forward",
        "backward",
        "'auto' or 'recompute' for a trainable head or an entropy: the upstream gradient comes too late",
        repr(backward),
    )
    logprobs, entropies = _evaluate(call, possible and backward != "recompute", return_entropy)
    shaped = logprobs.reshape(hidden.shape[:-1])
    return (shaped, entropies.reshape(hidden.shape[:-1])) if return_entropy else shaped


def _transform(logit_scale: float, softcap: float | None, temperature: float) -> LogitTransform:
    return LogitTransform.parse("", logit_scale, softcap, "temperature", temperature)


def _evaluate(call: checks.Call, in_forward: bool, entropy: bool) -> tuple[Tensor, Tensor]:
    if not call.gradient():
        _, _, stats, logprobs, *_ = torch.ops.opsd_kernels.linear_divergence(*call, entropy, False)
        return logprobs[:, 0].clone(), stats[:, Column.STUDENT_ENTROPY].clone()
    if in_forward:
        weights = checks.known_weights(
            None,
            call.labels.shape,
            call.labels.device,
            checks.stats_dtype(call.student_hidden.dtype),
            call.valid,
        )
        call = call._replace(factor=torch.zeros_like(weights), policy=weights)
    return LogProbs.apply(*call, entropy)
