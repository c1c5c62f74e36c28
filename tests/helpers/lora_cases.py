"""Cases of heads with low-rank adapters, and an op's values and gradients on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels.testing import LOGPROB_NATS, Case, assert_no_worse, assert_on_target, hard_case

WHICH = ("student", "teacher", "both", "one for both")
OPTIONS = {
    "chunks": {"workspace_bytes": 12000},
    "recompute": {"backward": "recompute"},
    "per token": {"reduction": "none"},
    "top 5": {"topk": 5},
    "jsd, softcap, temperatures": {
        "divergence": "jsd",
        "student_softcap": 9.0,
        "temperature": 0.7,
        "teacher_temperature": 1.3,
    },
    "scales": {"student_logit_scale": 0.5, "teacher_logit_scale": 1.4, "divergence": "tvd"},
    "mix, clips": {"teacher_mix": 0.3, "entry_clip": 0.05, "token_clip": 0.6},
    "no tolerance": {"gradient_tolerance": 0.0},
}
ALONE = ("workspace_bytes", "backward", "gradient_tolerance", "backend")  # options of no reference


@dataclass(frozen=True)
class Adapted:
    """A case, and adapters of its heads: (A, B, scaling) or None."""

    case: Case
    student: tuple[Tensor, Tensor, float] | None
    teacher: tuple[Tensor, Tensor, float] | None

    def double(self) -> Adapted:
        student, teacher = (
            lora and (lora[0].double(), lora[1].double(), lora[2]) for lora in (self.student, self.teacher)
        )
        if self.student is not None and self.student is self.teacher:
            teacher = student
        return Adapted(self.case.double(), student, teacher)


def adapted_case(
    N: int, V: int, H: int, dtype: torch.dtype, which: str, rank: int = 3, adapter_dtype=None, **made
) -> Adapted:
    """Make a hard case whose adapters move logits by about as much as the heads give."""
    case = hard_case(N, V, H, dtype, **made)
    gen = torch.Generator().manual_seed(N + V)

    def adapter(weight: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
        A, B = (
            torch.randn(rank, weight.shape[1], generator=gen),
            torch.randn(weight.shape[0], rank, generator=gen),
        )
        A, B = A / math.sqrt(weight.shape[1]), B / (2 * math.sqrt(rank))
        return A.to(adapter_dtype or dtype), B.to(adapter_dtype or dtype), scaling

    student = adapter(case.student_weight, 0.7) if which != "teacher" else None
    teacher = adapter(case.teacher_weight, 1.5) if which in ("teacher", "both") else None
    return Adapted(case, student, student if which == "one for both" else teacher)


def outcome(op, adapted: Adapted, **options) -> dict[str, Tensor]:
    """Return the loss, the gradients of all leaves by name, and the statistics."""
    live, student = adapted.case.leaves(), adapted.student
    leaves = {name: getattr(live, name) for name in live.trainable if getattr(live, name) is not None}
    if student is not None:
        A, B = (x.detach().requires_grad_() for x in student[:2])
        student = A, B, student[2]
        leaves |= {"A": A, "B": B}
    teacher = student if adapted.teacher is adapted.student else adapted.teacher
    adapters = {"student_lora": student, "teacher_lora": teacher}
    result = op(*live.inputs(), **live.options(), **adapters, **options)
    loss, stats = result if isinstance(result, tuple) else (result, {})
    upstream = live.upstream * torch.linspace(0.25, 1.0, max(loss.numel(), 1), dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream[: loss.numel()].view(loss.shape))
    stats = (
        stats
        if isinstance(stats, dict)
        else {name: value for name, value in vars(stats).items() if value is not None}
    )
    return {"loss": loss.detach(), **stats, **dict(zip(leaves, gradients, strict=True))}


def target_of(dtype: torch.dtype, shared: bool) -> str | None:
    """The gradient of 16-bit inputs is rounded to 16 bits in the logits, which plain PyTorch's is not."""
    return None if dtype.itemsize > 2 else "default" if shared else "fp32_logits"


def frozen(adapted: Adapted) -> Adapted:
    """Return the case with a frozen head: hidden states and the adapter are trained."""
    return replace(adapted, case=replace(adapted.case, trainable=("student_hidden",)))


def check(op, reference, adapted: Adapted, target: str | None = None, **options) -> None:
    """Compare value, statistics and every gradient with float64, beside plain PyTorch's error."""
    told = {name: value for name, value in options.items() if name not in ALONE}
    ours, truth = outcome(op, adapted, **options), outcome(reference, adapted.double(), **told)
    plain = outcome(reference, adapted, **told) if target is None else {}
    for name, exact in truth.items():
        if target is None:
            assert_no_worse(ours[name], plain[name], exact)
        elif name in ("loss", "A", "B", "student_hidden", "student_weight", "student_bias"):
            assert_on_target(ours[name], exact, target)
        elif name == "student_logprob":
            assert (ours[name] - exact).abs().max() <= LOGPROB_NATS, name
