"""Liger's two fused JSD losses on the fused op, with their names and arguments (liger-kernel 0.8.5).

    from opsd_kernels.integrations.liger import LigerFusedLinearJSDLoss  # for liger_kernel.chunked_loss
    from opsd_kernels.integrations.liger import LigerFusedLinearJSD      # for liger_kernel.transformers

Both compute the same divergence: with teacher p, student q and m = beta * p + (1 - beta) * q it is beta *
KL(p || m) + (1 - beta) * KL(q || m). beta is the teacher's weight; 0 is KL(p || q) and 1 is KL(q || p), as
special cases (the limits of the JSD there are 0). Both average over labels that are not `ignore_index`. Liger
is not imported.

As functions: `fused_linear_jsd_loss` for `liger_kernel.chunked_loss.functional.liger_fused_linear_jsd`, and
`fused_linear_jsd` for `liger_kernel.transformers.functional.liger_fused_linear_jsd`.
`LigerFusedLinearJSDFunction.apply` is internal to Liger and has no counterpart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..divergence import linear_divergence
from ..logprobs import linear_logprobs
from ..objectives import PolicyGradient, linear_policy_divergence
from ..spec import check_number, expect, interpolation

# student hidden (..., H_s), student weight (V_s, H_s), teacher hidden (..., H_t), teacher weight (V_t, H_t)
Heads = tuple[Tensor, Tensor, Tensor, Tensor]


def _divergence(name: str, beta: float) -> dict[str, Any]:
    """Return the options of linear_divergence for Liger's `beta`."""
    expect(0 <= check_number(name, beta) <= 1, name, "a number in [0, 1]", beta)
    return interpolation(beta)


def _vocab_size(student_weight: Tensor, teacher_weight: Tensor) -> int | None:
    """Return the student's vocabulary if the teacher's is larger: both probabilities are zero beyond it."""
    return student_weight.shape[0] if student_weight.shape[0] < teacher_weight.shape[0] else None


class LigerFusedLinearJSDLoss(nn.Module):
    """`weight_hard_loss * cross-entropy + weight_soft_loss * JSD`, in nats, of `liger_kernel.chunked_loss`.

    `temperature` divides the logits of the JSD alone; the cross-entropy has temperature 1. With
    `return_soft_hard_loss` the result is (loss, soft loss, hard loss), the last two without weights and
    detached. `compiled` and `chunk_size` are attributes without effect: nothing is compiled, and
    `OPSD_WORKSPACE_BYTES` bounds the rows per chunk.

    Passes over the heads: four at temperature 1 with both weights positive, where the cross-entropy shares
    the divergence's gradient; otherwise four for the JSD, and one and three for the cross-entropy. A term
    with weight 0 that is not returned costs nothing; a frozen head saves its gradient.

    Different from Liger, on purpose:

    * Logits and softmax are fp32 for bf16 and fp16 inputs, or a difference that 16 bits hold. Liger's softmax
      is bf16: a loss up to 36 % too low at beta 0.5.
    * A token outside a smaller student vocabulary has probability zero on both sides. Liger gives it the
      *logit* 0, that is, probability.
    * Hidden states (B, T, H) with labels (B, T) are chunked over tokens; Liger chunks over their first
      dimension.
    * A frozen head costs no gradient. Liger computes and drops it.
    * Masked tokens enter no GEMM and may hold inf or NaN; a teacher bias of -inf removes its token.

    The constructor raises ValueError for a beta outside [0, 1] or a temperature that is not positive.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        _divergence("beta", beta)
        self.weight_hard_loss = check_number("weight_hard_loss", weight_hard_loss)
        self.weight_soft_loss = check_number("weight_soft_loss", weight_soft_loss)
        self.temperature = check_number("temperature", temperature, positive=True)
        self.beta, self.ignore_index = beta, ignore_index
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V_s, H_s)
        teacher_input: Tensor,  # (..., H_t)
        teacher_weight: Tensor,  # (V_t, H_t)
        true_labels: Tensor,  # (...) int64
        student_bias: Tensor | None = None,  # (V_s,)
        teacher_bias: Tensor | None = None,  # (V_t,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the loss, 0-dim; or (loss, soft loss, hard loss)."""
        heads = (student_input, student_weight, teacher_input, teacher_weight)
        shape: dict[str, Any] = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        shape["vocab_size"] = _vocab_size(student_weight, teacher_weight)
        both = self.temperature == 1 and min(self.weight_hard_loss, self.weight_soft_loss) > 0
        loss, soft, hard = (self._in_one_pass if both else self._one_by_one)(heads, shape, true_labels)
        if soft is None or hard is None or not self.return_soft_hard_loss:
            return loss
        return loss, soft.detach(), hard.detach()

    def _in_one_pass(
        self, heads: Heads, shape: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute both terms in one call: cross-entropy is the policy gradient with advantages of 1."""
        total = self.weight_hard_loss + self.weight_soft_loss
        options = {
            **shape,
            **_divergence("beta", self.beta),
            "labels": labels,
            "ignore_index": self.ignore_index,
        }
        options |= {"policy": PolicyGradient(torch.ones(())), "policy_weight": self.weight_hard_loss / total}
        result: Any = linear_policy_divergence(*heads, **options, return_stats=self.return_soft_hard_loss)
        if not self.return_soft_hard_loss:
            return total * result, None, None
        loss, stats = result
        return total * loss, self._mean(stats.divergence, labels), self._mean(-stats.student_logprob, labels)

    def _one_by_one(
        self, heads: Heads, shape: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        soft: Any = None
        hard: Any = None
        gradient, weights = torch.is_grad_enabled(), (self.weight_soft_loss, self.weight_hard_loss)
        if weights[0] or self.return_soft_hard_loss or not weights[1]:
            with torch.set_grad_enabled(gradient and (weights[0] != 0 or weights[1] == 0)):
                options = {**shape, **_divergence("beta", self.beta), "temperature": self.temperature}
                soft = linear_divergence(*heads, **options, mask=labels != self.ignore_index)
        if weights[1] or self.return_soft_hard_loss:
            with torch.set_grad_enabled(gradient and weights[1] != 0):
                bias, ignored = shape["student_bias"], self.ignore_index
                logprobs: Any = linear_logprobs(*heads[:2], labels, bias=bias, ignore_index=ignored)
                hard = self._mean(-logprobs, labels)
        weighted = [w * term for w, term in zip(weights, (soft, hard), strict=True) if term is not None]
        return sum(weighted), soft, hard

    def _mean(self, per_token: Tensor, labels: Tensor) -> Tensor:
        """Average over the counted labels. `per_token` is 0 at the others."""
        return per_token.sum() / (labels != self.ignore_index).sum().clamp(min=1)

    def extra_repr(self) -> str:
        shown = ("weight_hard_loss", "weight_soft_loss", "beta", "ignore_index", "temperature")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


class LigerFusedLinearJSD(nn.Module):
    """The JSD alone, in nats, of `liger_kernel.transformers`.

    The mean is over labels that are not `ignore_index` or, without labels, over all rows. `accum_dtype` is an
    attribute without effect: the gradient of a head is always accumulated in fp32 and rounded once.

    Different from Liger's Triton kernel, on purpose: a teacher entry of -inf gives no NaN; a second backward
    gives the same gradients (Liger scales the saved ones in place, so that an upstream gradient other than 1
    counts twice); `OPSD_WORKSPACE_BYTES` bounds the rows per chunk instead of V / H; no host sync counts the
    tokens without labels. It also runs on CPU, takes any leading shape, and a teacher head with padded rows
    (see LigerFusedLinearJSDLoss).
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _divergence("jsd_beta", jsd_beta)
        self.temperature = check_number("temperature", temperature, positive=True)
        self.jsd_beta, self.ignore_index, self.accum_dtype = jsd_beta, ignore_index, accum_dtype

    def forward(
        self,
        student_input: Tensor,  # (..., H_s)
        student_weight: Tensor,  # (V_s, H_s)
        teacher_input: Tensor,  # (..., H_t)
        teacher_weight: Tensor,  # (V_t, H_t)
        shift_labels: Tensor | None = None,  # (...), read for `ignore_index` alone
    ) -> Tensor:
        heads = (student_input, student_weight, teacher_input, teacher_weight)
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        vocab_size = _vocab_size(student_weight, teacher_weight)
        options = {**_divergence("jsd_beta", self.jsd_beta), "temperature": self.temperature, "mask": mask}
        loss: Any = linear_divergence(*heads, **options, vocab_size=vocab_size)
        return loss

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)}" for name in ("jsd_beta", "ignore_index", "temperature")
        )


def fused_linear_jsd_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute LigerFusedLinearJSDLoss. Arguments as in `liger_kernel.chunked_loss.functional`."""
    weights = (weight_hard_loss, weight_soft_loss)
    loss = LigerFusedLinearJSDLoss(
        *weights, beta, ignore_index, temperature, compiled, chunk_size, return_soft_hard_loss
    )
    return loss(
        student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias
    )


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute LigerFusedLinearJSD. Arguments as in `liger_kernel.transformers.functional`."""
    loss = LigerFusedLinearJSD(jsd_beta, ignore_index, temperature, accum_dtype)
    return loss(student_input, student_weight, teacher_input, teacher_weight, shift_labels)
