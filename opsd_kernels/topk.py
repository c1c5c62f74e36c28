"""Define the ops for a teacher without a head: of known top-k log-probs, or given as rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import DEFAULTS, TokenStats, evaluate, prepare
from .quantized import QuantizedHead
from .spec import TAILS, Adapter, check_choice
from .weights import TokenWeighting


def linear_topk_divergence(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor | QuantizedHead,  # (V, H)
    teacher_topk_ids: Tensor,  # (..., K) int64
    teacher_topk_logprobs: Tensor,  # (..., K), nats
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    student_lora: Adapter | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    student_vocab_ids: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | TokenWeighting | None = None,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    z_loss: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    backward: str = "auto",
    logits_dtype: str | torch.dtype = "auto",
    gradient_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute a token divergence between a student and a teacher of which only the top K log-probs are known.

    The teacher typically runs behind a server that returns log-probs of its K most likely tokens. They are
    log-probs under the whole distribution of the teacher, in nats, at the temperature at which the student is
    compared. An entry of -inf is padding with an arbitrary id; an id that comes again counts once, with its
    first log-prob. The result is in nats.

    * `tail`: the treatment of the mass outside the list. "bucket" makes it one more entry on both sides,
      log(1 - sum of the listed probabilities), with a mass of at least 1e-7. "renormalize" removes it: both
      sides are normalised over the listed entries. "none" sums the terms of true log-probs over the listed
      entries alone; with "forward_kl" this is verl's top-k loss before its clamps.
    * `student_vocab_ids`: as in `linear_divergence`; the listed ids are the teacher's, and an entry that the
      student lacks is padding, whose mass is in the tail.
    * `group`: as in `linear_divergence`; the ids are those of the whole vocabulary.

    The other arguments, the reductions, the returned loss and its gradients are those of `linear_divergence`.
    The call takes three GEMM passes (two with a frozen head), four with `backward="recompute"`. Statistics
    that need the whole teacher are None in TokenStats, and weightings that read them cannot be used.

    Raises ValueError or TypeError as `linear_divergence` does, and ValueError for an id outside the
    vocabulary whose log-prob is above -inf.
    """
    check_choice("tail", tail, TAILS)
    options = DEFAULTS | dict(  # noqa: C408 - a literal would name each option twice
        divergence=divergence, beta=beta, temperature=temperature, student_bias=student_bias,
        student_lora=student_lora,
        student_logit_scale=student_logit_scale, student_softcap=student_softcap, vocab_size=vocab_size,
        student_vocab_ids=student_vocab_ids,
        labels=labels, ignore_index=ignore_index, mask=mask, token_weights=token_weights,
        entry_clip=entry_clip, token_clip=token_clip, z_loss=z_loss, reduction=reduction,
        normalizer=normalizer, logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance,
        workspace_bytes=workspace_bytes, backend=backend, group=group,
        teacher_temperature=1.0,  # of logits that are all 0
    )  # fmt: skip
    student = student_hidden, student_weight
    listed = teacher_topk_ids, teacher_topk_logprobs, tail
    problem, weigher = prepare(student, None, options, listed=listed)
    return evaluate(problem, weigher, backward, return_stats)


def linear_divergence_to(
    student_hidden: Tensor,  # (..., H)
    student_weight: Tensor | QuantizedHead,  # (V, H)
    target: Tensor,  # (..., V), floating point
    *,
    target_is: str = "logits",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    student_lora: Adapter | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    student_vocab_ids: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    token_weights: Tensor | TokenWeighting | None = None,
    teacher_mix: float = 0.0,
    entry_clip: float | None = None,
    token_clip: float | None = None,
    z_loss: float | None = None,
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
    * `student_vocab_ids`: as in `linear_divergence`; `target` holds the columns of the teacher's vocabulary,
      of which a chunk's are gathered.
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
        student_bias=student_bias, student_lora=student_lora, student_logit_scale=student_logit_scale,
        student_softcap=student_softcap, vocab_size=vocab_size, student_vocab_ids=student_vocab_ids,
        labels=labels, ignore_index=ignore_index,
        mask=mask, token_weights=token_weights, teacher_mix=teacher_mix, entry_clip=entry_clip,
        token_clip=token_clip, z_loss=z_loss,
        reduction=reduction, normalizer=normalizer, topk=topk, topk_support=topk_support, topk_tail=topk_tail,
        logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance, workspace_bytes=workspace_bytes,
        backend=backend, group=group,
    )  # fmt: skip
    student, given = (student_hidden, student_weight), (target, target_is)
    problem, weigher = prepare(student, None, options, target=given)
    return evaluate(problem, weigher, backward, return_stats)
