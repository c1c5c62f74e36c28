"""Logits and calls of the reference, for its own tests."""

import math

import pytest
import torch
from torch import Tensor

from opsd_kernels.spec import KIND_NAMES
from opsd_kernels.testing import assert_one_rounding
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_topk_divergence_reference,
)

N, V, K = 5, 9, 4
DIVERGENCES = pytest.mark.parametrize("divergence", KIND_NAMES)
TAILS = pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
SIDES = pytest.mark.parametrize("side", ["student", "teacher"])
CLIPS = {
    "no clip": {},
    "entry": {"entry_clip": 0.05},
    "token": {"token_clip": 0.2},
    "both": {"entry_clip": 0.05, "token_clip": 0.15},
}
CLIPPED = pytest.mark.parametrize("clips", CLIPS.values(), ids=CLIPS)


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    S = 2 * torch.randn(N, V, generator=gen, dtype=torch.float64)
    return S, S + torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])[:, None] * torch.randn(
        N, V, generator=gen, dtype=torch.float64
    )


def judge(S: Tensor, T: Tensor, **options: object) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    head = torch.eye(S.shape[-1], dtype=S.dtype)
    return linear_divergence_reference(S, head, T, head, **{"reduction": "none", "beta": 0.3, **options})


def judge_listed(
    S: Tensor, ids: Tensor, logprobs: Tensor, **options: object
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    head = torch.eye(S.shape[-1], dtype=S.dtype)
    return linear_topk_divergence_reference(
        S, head, ids, logprobs, **{"reduction": "none", "beta": 0.3, **options}
    )


def value_and_gradient(loss_of: object, S: Tensor) -> tuple[Tensor, Tensor]:
    S = S.clone().requires_grad_()
    loss = loss_of(S)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, S, upstream)[0]


def assert_equal(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for name, actual, truth in zip(("value", "gradient"), ours, theirs, strict=True):
        assert truth.isfinite().all()
        assert_one_rounding(actual, truth, torch.float64, name=name)


def minus_infinity(*columns: int) -> Tensor:
    return torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor(columns), -math.inf)
