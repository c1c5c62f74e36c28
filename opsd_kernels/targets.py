"""Define `linear_divergence_to`, for a teacher that is given as logits, log-probs or probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import DEFAULTS, TokenStats, evaluate, prepare
from .weights import TokenWeighting


def linear_divergence_to(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    target: Tensor,  # (..., V), floating point
    *,
    target_is: str = "logits",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | TokenWeighting | None = None,
    teacher_mix: float = 0.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    topk: int | None = None,
    topk_support: str = "student",
    topk_tail: str = "bucket",
    backward: str = "auto",
    logits_dtype: str | torch.dtype = "auto",
    gradient_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute a token divergence between a student's head and a teacher given as rows over the vocabulary.

    For a teacher whose logits, log-probs or probabilities are there already. They may be of any floating
    dtype, and never get a gradient. Rows of the dtype of the logits buffers (fp32, unless `logits_dtype`
    says otherwise) are read where they lie; others are cast chunk by chunk, inside `workspace_bytes`.

    * `target_is`: "logits"; "logprobs", which are logits that are normalised already; or "probs", whose
      logarithm is taken. -inf, or a probability of 0, removes a token from the teacher's distribution. Rows
      are normalised in each case.
    * `teacher_temperature`: divides the target's logits, by default `temperature` for "logits" and 1 for
      log-probs and probabilities, which are taken as they are. Another t makes them p^(1/t), normalised.
    * `vocab_size`: columns of `target` from this one on are ignored. Required where `target` has another
      number of columns than `student_weight` has rows.
    * `group`: as in `linear_divergence`; `target` holds the columns of this rank's slice.

    The other arguments, the reductions, statistics, the returned loss and its gradients are those of
    `linear_divergence`. The call takes three GEMM passes (two with a frozen head), four with
    `backward="recompute"`. The result is in nats.

    Raises ValueError or TypeError as `linear_divergence` does.
    """
    if teacher_temperature is None and target_is != "logits":
        teacher_temperature = 1.0
    options = DEFAULTS | dict(  # noqa: C408 - a literal would name each option twice
        divergence=divergence, beta=beta, temperature=temperature, teacher_temperature=teacher_temperature,
        student_bias=student_bias, student_logit_scale=student_logit_scale, student_softcap=student_softcap,
        vocab_size=vocab_size, labels=labels, ignore_index=ignore_index, mask=mask,
        token_weights=token_weights, teacher_mix=teacher_mix, entry_clip=entry_clip, token_clip=token_clip,
        reduction=reduction, normalizer=normalizer, topk=topk, topk_support=topk_support, topk_tail=topk_tail,
        logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance, workspace_bytes=workspace_bytes,
        backend=backend, group=group,
    )  # fmt: skip
    student, given = (student_hidden, student_weight), (target, target_is)
    problem, weigher = prepare(student, None, options, target=given)
    return evaluate(problem, weigher, backward, return_stats)
