"""Define `linear_divergence`, and its options as a TypedDict for functions that forward them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ._core.autograd import evaluate as evaluate
from ._core.problem import Problem, Side
from ._core.problem import repeated as repeated
from ._core.reductions import RowWeigher, reads_logprobs, row_scale
from ._core.reductions import TokenStats as TokenStats
from ._core.teachers import OPTIONS, of_each_teacher, options_of, several
from .quantized import QuantizedHead
from .spec import CLIPS, Adapter, Divergence, LogitTransform, RowSpec, Support, check_number, expect
from .weights import TokenWeighting


class DivergenceOptions(TypedDict, total=False):
    """Type the keyword arguments of `linear_divergence`, for `Unpack`.

    The divergence, in nats, of teacher p and student q, with m = beta * p + (1 - beta) * q:

    * `divergence`: "reverse_kl" KL(q || p); "forward_kl" KL(p || q);
      "jsd" beta * KL(p || m) + (1 - beta) * KL(q || m) (arXiv:2306.13649, eq. 1);
      "skew_forward_kl" KL(p || m) and "skew_reverse_kl" KL(q || m) (arXiv:2402.03898, eq. 2-3);
      "tvd" sum |p - q| / 2; "mixed_kl" beta * KL(p || q) + (1 - beta) * KL(q || p).
      The loss of SDPO is arXiv:2601.20802, eq. 1.
    * `beta`: the weight on the teacher, in (0, 1), for "jsd" and the skew divergences; the weight of the
      forward KL, in [0, 1], for "mixed_kl".
    * `teacher_mix`: a in [0, 1). Teacher logits t become (1 - a) * t + a * s, with the student's logits s
      held constant (the trust-region teacher of SDPO).
    * `entry_clip`, `token_clip`: upper bounds, of each vocabulary entry's term and of each token's
      divergence. A clipped entry or token has no gradient.
    * `z_loss`: c >= 0 adds c * logsumexp(student logits)**2 to each token's loss, of the transformed logits
      over the whole vocabulary. No clip acts on it. Not beside a policy term.
    * `topk`, `topk_support`, `topk_tail`: restrict the sum to the `topk` largest entries of the "student" or
      the "teacher". The mass outside becomes one more entry ("bucket"), is removed by renormalising both
      sides ("renormalize"), or is left out ("none"). The support is a constant for the gradient.

    The logits, `softcap(logit_scale * (hidden @ weight.T + bias)) / temperature`, softcap(z) = c * tanh(z /
    c):

    * `temperature`, `teacher_temperature`: one temperature for both sides, unless the teacher has its own.
      A positive number, or a tensor that broadcasts to (...), for example (B, 1) for one per sequence.
      Detached. The loss is not multiplied by temperature**2.
    * `student_bias` (V_s,), `teacher_bias` (V_t,): an entry of -inf removes a token from the distribution.
    * `student_lora`, `teacher_lora`: a low-rank adapter of the head, (A, B, scaling) with A (r, H) and B (V,
      r). The head is `weight + scaling * B @ A`, which is never formed. Gradients flow to the student's A and
      B. They may have another floating-point dtype than the head, as peft's do.
    * `student_logit_scale`, `teacher_logit_scale`, `student_softcap`, `teacher_softcap`: a factor, and the c
      above.
    * `vocab_size`: columns from this one on have probability zero on both sides. Required if the two heads
      differ in rows, unless the next option says which tokens they are.
    * `student_vocab_ids` (V_s,) int64: distinct ids of the teacher's vocabulary. Row j of the student's head
      is the teacher's token `student_vocab_ids[j]`, as in a draft head for a part of the vocabulary. The
      teacher's distribution is restricted to these tokens and normalised, as EAGLE-3 drafts are trained
      (arXiv:2503.01840; SpecForge's `t2d` and `d2t`). Statistics are those of the restricted sides.

    Several teachers (docs/reference/linear-divergence.md):

    * `teacher_index`: int64 in [0, K), a tensor that broadcasts to (...): the teacher of each token.
      `teacher_hidden` and `teacher_weight` are then sequences of K tensors, of any widths; `teacher_bias`,
      `teacher_lora`, `teacher_logit_scale` and `teacher_softcap` may be. `teacher_hidden[k]` is (..., H_k),
      of which only the rows of its own tokens are read, or (n_k, H_k): these rows packed, in the order of the
      tokens.

    The tokens and the reduction:

    * `labels` (...) int64: the sampled tokens, for log-prob statistics and for weights that read them. With
      `student_vocab_ids` they are ids of the teacher's vocabulary, and a token whose label is none of these
      ids is not valid.
    * `ignore_index`, `mask` (...): a token with `labels == ignore_index` or `mask == 0` is not valid. It adds
      nothing to loss, gradients and statistics, and its hidden states may hold inf or NaN.
    * `token_weights`: a tensor (...), or a scheme of `opsd_kernels.weights`, which the op evaluates on its
      own statistics. Weights are detached.
    * `reduction`: "mean", the weighted sum / `normalizer`; "sum"; "sequence_mean", for hidden states (B, T,
      H): the weighted sum of each sequence / its number of valid tokens, averaged over the sequences that
      have one; "none", the weighted divergence of each token.
    * `normalizer`: a number or a 0-dim tensor for "mean"; 0, an empty step, gives 0. Default: the number of
      valid tokens.
    * `return_stats`: also return the `TokenStats` of the call.

    The computation:

    * `backward`: "in_forward" computes gradients during the forward pass (four GEMM passes, three with a
      frozen head); "recompute" projects again in backward (six, five with a frozen head) and accepts any
      upstream gradient per token; "auto" takes "recompute" for reduction "none" with a trainable head, else
      "in_forward".
    * `logits_dtype`: the dtype of the logits buffers. "input" takes the inputs' dtype, `torch.float32` takes
      fp32. "auto" takes the inputs' dtype for a shared head, where a constant subtracted from each row and
      the difference GEMM keep the accuracy, and fp32 for two heads, "tvd", an entry clip, a softcap, a logit
      scale / temperature outside (0, 4], temperatures in a tensor, and weights that read log-probs.
    * `gradient_tolerance`: the largest share of a chunk's gradient (Frobenius norm of the gradient of its
      logits) that may be left out of the backward GEMMs; None leaves out nothing. Columns of the vocabulary
      with the smallest norms are left out, where that is faster. See docs/guides/gradient-tolerance.md;
      `TokenStats.gradient_dropped` is the largest share that was left out. For reduction "none" with a
      frozen head all tokens count alike.
    * `workspace_bytes`: bound of the logits buffers. Default: OPSD_WORKSPACE_BYTES, else 1 GiB.
    * `backend`: "cuda", "triton", "cpp" or "torch". Default: OPSD_BACKEND, else the first that serves the
      device and dtype; "cuda" only on GPUs that it is checked on (`opsd doctor`).
    * `group`: a process group or a `VocabShard`. Both heads are slices of dimension 0, one per rank, and the
      hidden states are equal on all ranks. Loss and gradients are those of the whole heads;
      `student_hidden.grad` is summed over the group. A DTensor sharded on dimension 0 may stand for a slice.
    """

    divergence: str
    beta: float
    temperature: float
    teacher_temperature: float | None
    student_bias: Tensor | None
    teacher_bias: Tensor | Sequence[Tensor | None] | None
    student_lora: Adapter | None
    teacher_lora: Adapter | Sequence[Adapter | None] | None
    student_logit_scale: float
    teacher_logit_scale: float | Sequence[float]
    student_softcap: float | None
    teacher_softcap: float | Sequence[float | None] | None
    teacher_index: Tensor | None
    vocab_size: int | None
    student_vocab_ids: Tensor | None
    labels: Tensor | None
    ignore_index: int
    mask: Tensor | None
    token_weights: Tensor | TokenWeighting | None
    teacher_mix: float
    entry_clip: float | None
    token_clip: float | None
    z_loss: float | None
    reduction: str
    normalizer: float | Tensor | None
    return_stats: bool
    topk: int | None
    topk_support: str
    topk_tail: str
    backward: str
    logits_dtype: str | torch.dtype
    gradient_tolerance: float | None
    workspace_bytes: int | None
    backend: str | None
    group: object | None


def linear_divergence(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor | QuantizedHead,  # (V_s, H_s)
    teacher_hidden: Tensor | Sequence[Tensor],  # (..., H_t)
    teacher_weight: Tensor | QuantizedHead | Sequence[Tensor | QuantizedHead],  # (V_t, H_t)
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    student_lora: Adapter | None = None,
    teacher_lora: Adapter | Sequence[Adapter | None] | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | Sequence[float] = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    teacher_index: Tensor | None = None,
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
    """Compute a divergence between student and teacher per token, from hidden states and LM heads.

    The result is that of projecting both sides, taking two softmaxes and comparing the distributions token by
    token, but the op never holds more than `workspace_bytes` of logits. Gradients flow to `student_hidden`,
    `student_weight`, `student_bias` and the student's adapter, never to the teacher. Each tensor may have its
    own dtype of float64, float32, bfloat16 and float16: a side computes in the wider one of its hidden states
    and its weight. A teacher, and a frozen weight, may be on another device than `student_hidden`, and a
    frozen weight may be a `QuantizedHead`. Autocast casts hidden states and weights, float64 aside. Each
    option is explained in `opsd_kernels.divergence.DivergenceOptions`.

    Returns the loss in fp32 (fp64 for fp64 inputs): 0-dim, or (...) with zeros at invalid tokens for
    reduction "none". With `return_stats` returns (loss, TokenStats). Without a valid token the loss is 0,
    with gradients of 0.

    Raises ValueError or TypeError with the name of the argument, the expected value and the actual one: a bad
    shape, dtype or option, a label outside the vocabulary, a backend that cannot serve. On CUDA a bad label
    is an asynchronous device-side assert.
    """
    options = dict(  # noqa: C408 - a literal would name each option twice
        divergence=divergence, beta=beta, temperature=temperature,
        teacher_temperature=teacher_temperature, student_bias=student_bias, teacher_bias=teacher_bias,
        student_lora=student_lora, teacher_lora=teacher_lora, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, student_softcap=student_softcap,
        teacher_softcap=teacher_softcap, teacher_index=teacher_index, vocab_size=vocab_size,
        student_vocab_ids=student_vocab_ids, labels=labels, ignore_index=ignore_index, mask=mask,
        token_weights=token_weights, teacher_mix=teacher_mix, entry_clip=entry_clip,
        token_clip=token_clip, z_loss=z_loss, reduction=reduction, normalizer=normalizer, topk=topk,
        topk_support=topk_support, topk_tail=topk_tail,
        logits_dtype=logits_dtype, gradient_tolerance=gradient_tolerance, workspace_bytes=workspace_bytes,
        backend=backend, group=group,
    )  # fmt: skip
    problem, weigher = prepare((student_hidden, student_weight), (teacher_hidden, teacher_weight), options)
    return evaluate(problem, weigher, backward, return_stats)


DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_divergence).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


def with_defaults(options: DivergenceOptions) -> dict[str, Any]:
    """Return all options of `linear_divergence`: the given ones, and the defaults of the others.

    Raises TypeError for an unknown option.
    """
    unknown = sorted(set(options) - set(DEFAULTS))
    expect(not unknown, "options", "arguments of linear_divergence", ", ".join(map(repr, unknown)), TypeError)
    return {**DEFAULTS, **options}


def check_options(options: DivergenceOptions) -> None:
    """Raise ValueError or TypeError for an unknown option, and for a bad one that needs no tensors."""
    given = with_defaults(options)
    counts = {len(given[name]) for name in OPTIONS if of_each_teacher(name, given[name])} or {1}
    for k in range(max(counts)):
        row_spec(options_of(given, k, max(counts)))
    row_scale(given["reduction"], given["normalizer"], torch.empty(1, 1, 1), None)


def prepare(
    student: tuple[Tensor, Any],  # hidden states and weight
    teacher: tuple[Any, Any] | None,
    options: dict[str, Any],
    *,
    listed: tuple[object, object, str] | None = None,
    target: tuple[object, object] | None = None,
    policy: Any = None,
    policy_weight: float = 0.0,
) -> tuple[Problem, RowWeigher]:
    """Check all options of `linear_divergence` and a policy term; return the problem and its weigher.

    `listed` is (ids, log-probs, tail) of a teacher of which only the top-k is known, `target` (rows, their
    form) of one that is given as rows.
    """
    both = policy is not None and options["z_loss"]
    expect(not both, "z_loss", "None beside a policy term", options["z_loss"])
    if teacher is not None and (
        options["teacher_index"] is not None or isinstance(teacher[0], (tuple, list))
    ):
        further = {"listed": listed, "policy": policy, "policy_weight": policy_weight}
        return several(prepare, student, teacher, options, **further)
    problem = Problem.of(
        row_spec(options),
        Side(*student, options["student_bias"], options["student_lora"]),
        None if teacher is None else Side(*teacher, options["teacher_bias"], options["teacher_lora"]),
        labels=options["labels"],
        ignore_index=options["ignore_index"],
        mask=options["mask"],
        vocab_size=options["vocab_size"],
        vocab_ids=options["student_vocab_ids"],
        logits_dtype=options["logits_dtype"],
        workspace_bytes=options["workspace_bytes"],
        backend=options["backend"],
        group=options["group"],
        gradient_tolerance=options["gradient_tolerance"],
        support=Support.parse(options["topk"], options["topk_support"], options["topk_tail"]),
        listed=listed,
        exact_logprobs=reads_logprobs(options["token_weights"], policy),
    )
    hidden = student[0]
    if target is not None:
        problem = problem.with_target(*target, hidden.shape[:-1], options["vocab_size"] is None)
    scale = row_scale(options["reduction"], options["normalizer"], hidden, problem.rows.valid)
    weigher = RowWeigher(problem, hidden.shape[:-1], options["token_weights"], scale, policy, policy_weight)
    return problem, weigher


def row_spec(options: dict[str, Any]) -> RowSpec:
    """Check the options that the row sweeps read, and return them as a RowSpec."""
    name = "temperature" if options["teacher_temperature"] is None else "teacher_temperature"
    mix = check_number("teacher_mix", options["teacher_mix"])
    expect(0 <= mix < 1, "teacher_mix", "a number in [0, 1), since at 1 the teacher has no weight", mix)
    student = options["student_logit_scale"], options["student_softcap"]
    teacher = options["teacher_logit_scale"], options["teacher_softcap"]
    entry_clip, token_clip = (
        math.inf if options[clip] is None else check_number(clip, options[clip], positive=True)
        for clip in CLIPS
    )
    z_loss = 0.0 if options["z_loss"] is None else check_number("z_loss", options["z_loss"])
    expect(z_loss >= 0, "z_loss", "None or a number of at least 0", z_loss)
    return RowSpec(
        Divergence.parse(options["divergence"], options["beta"]),
        LogitTransform.parse("student", *student, "temperature", options["temperature"]),
        LogitTransform.parse("teacher", *teacher, name, options[name]),
        teacher_mix=mix,
        entry_clip=entry_clip,
        token_clip=token_clip,
        z_loss=z_loss,
    )
