"""Cases of several teachers by index."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.testing import Case, hard_case


@dataclass(frozen=True)
class Several:
    """A case, and in place of its teacher K of them, with the options of the op that name them."""

    case: Case
    hidden: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    options: dict[str, Any]

    def double(self) -> Several:
        def wide(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(wide, x))
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        case = self.case.double()
        shared = all(weight is self.case.student_weight for weight in self.weight)
        weights = (case.student_weight,) * len(self.weight) if shared else wide(self.weight)
        return Several(case, wide(self.hidden), weights, {k: wide(v) for k, v in self.options.items()})


def several_case(
    N: int,
    V: int,
    H: int,
    dtype: torch.dtype,
    widths: tuple[int, ...] = (8, 16, 24),
    packed: bool = False,
    shared_head: bool = False,
    bias: bool = True,
    **made: Any,
) -> Several:
    """Make a hard case with a teacher of each width; rows of other teachers' tokens hold NaN."""
    case = hard_case(N, V, H, dtype, shared_head=shared_head, masked_entry=None, **made)
    gen, leading = torch.Generator().manual_seed(N), case.student_hidden.shape[:-1]
    index = torch.randint(len(widths), leading, generator=gen)
    hidden, weights = [], []
    for k, width in enumerate((H,) * len(widths) if shared_head else widths):
        states = 3 * torch.randn(*leading, width, generator=gen)
        if shared_head:
            states = torch.nan_to_num(case.student_hidden.float(), 0, 0, 0) + states / 10
        states = torch.where((index == k)[..., None], states, math.nan)
        hidden.append(states.reshape(-1, width)[index.reshape(-1) == k] if packed else states)
        head = torch.randn(case.student_weight.shape[0], width, generator=gen) / math.sqrt(width)
        weights.append(case.student_weight if shared_head else head.to(dtype))
    options: dict[str, Any] = {"teacher_index": index}
    if bias and not shared_head:
        rows = case.student_weight.shape[0]
        options["teacher_bias"] = [torch.randn(rows, generator=gen).to(dtype) / 2 for _ in widths[1:]] + [
            None
        ]
        options["teacher_logit_scale"] = [1.0, 0.5, 1.5][: len(widths)]
    # The index of an invalid token may be any number.
    valid = case.mask & (case.labels != -100)
    options["teacher_index"] = torch.where(valid | packed, index, -7)
    return Several(
        replace(case, teacher_bias=None), tuple(x.to(dtype) for x in hidden), tuple(weights), options
    )


def with_adapters(several: Several, student: bool = True, dtype: torch.dtype | None = None) -> Several:
    """Give all teachers but the first an adapter of its own rank, and the student one."""
    gen, V = torch.Generator().manual_seed(7), several.case.student_weight.shape[0]

    def adapter(H: int, rank: int, scaling: float) -> tuple[Tensor, Tensor, float]:
        A = torch.randn(rank, H, generator=gen) / math.sqrt(H)
        B = torch.randn(V, rank, generator=gen) / (2 * math.sqrt(rank))
        given = dtype or several.case.student_weight.dtype
        return A.to(given), B.to(given), scaling

    heads = several.weight
    theirs = [None, *(adapter(head.shape[1], k + 1, 1.5 / k) for k, head in enumerate(heads[1:], 1))]
    options = {**several.options, "teacher_lora": theirs}
    if student:
        options["student_lora"] = adapter(several.case.student_weight.shape[1], 3, 0.7)
    return replace(several, options=options)


def outcome(op, several: Several, **options) -> dict[str, Tensor]:
    """Return the loss, the gradients of all leaves by name, and the statistics."""
    live = several.case.leaves()
    leaves = {name: getattr(live, name) for name in live.trainable if getattr(live, name) is not None}
    shared = all(weight is several.case.student_weight for weight in several.weight)
    weights = (live.student_weight,) * len(several.weight) if shared else several.weight
    told = {**live.options(), **several.options, **options}
    if told.get("student_lora") is not None:
        A, B, scaling = told["student_lora"]
        leaves |= {"A": A.detach().requires_grad_(), "B": B.detach().requires_grad_()}
        told["student_lora"] = leaves["A"], leaves["B"], scaling
    result = op(live.student_hidden, live.student_weight, list(several.hidden), list(weights), **told)
    loss, stats = result if isinstance(result, tuple) else (result, {})
    upstream = live.upstream * torch.linspace(0.25, 1.0, max(loss.numel(), 1), dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream[: loss.numel()].view(loss.shape))
    if not isinstance(stats, dict):
        stats = {name: value for name, value in vars(stats).items() if value is not None}
    return {"loss": loss.detach(), **stats, **dict(zip(leaves, gradients, strict=True))}
