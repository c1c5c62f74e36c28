"""Cases of a student whose head has a part of the teacher's vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels.testing import Case, hard_case


@dataclass(frozen=True)
class Draft:
    """A case with the teacher's whole head and labels of its vocabulary, and the same on the student's."""

    case: Case
    ids: Tensor  # (V_s,) int64
    restricted: Case

    def double(self) -> Draft:
        return Draft(self.case.double(), self.ids, self.restricted.double())


def draft_case(N: int, V_s: int, V_t: int, H: int, dtype: torch.dtype, foreign: bool = True, **made) -> Draft:
    """Make a hard case in which the rows of the teacher that the student lacks would take all probability.

    With `foreign` every fifth label is a token that the student lacks, and the hidden states there are NaN.
    """
    restricted = hard_case(N, V_s, H, dtype, **made)
    gen = torch.Generator().manual_seed(V_t)
    ids = torch.randperm(V_t, generator=gen)[:V_s]
    lacking = torch.ones(V_t, dtype=torch.bool)
    lacking[ids] = False
    weight = restricted.teacher_weight.new_empty(V_t, restricted.teacher_weight.shape[1])
    weight.copy_(50 * torch.randn(weight.shape, generator=gen))
    weight[ids] = restricted.teacher_weight
    bias = restricted.teacher_bias
    if bias is not None:
        bias = bias.new_full((V_t,), 9.0)
        bias[ids] = restricted.teacher_bias
    labels, weights = restricted.labels, restricted.token_weights
    assert labels is not None and weights is not None
    named = torch.where(labels < 0, labels, ids[labels.clamp(min=0)])
    hidden = restricted.student_hidden.clone()
    if foreign and V_t > V_s:
        away = torch.zeros(labels.shape, dtype=torch.bool)
        away.view(-1)[3::5] = True
        named = torch.where(away & (labels >= 0), lacking.nonzero()[0, 0], named)
        labels = torch.where(away, -100, labels)
        hidden[away] = math.nan
        restricted = replace(restricted, labels=labels, student_hidden=hidden)
    whole = replace(restricted, teacher_weight=weight, teacher_bias=bias, labels=named, student_hidden=hidden)
    return Draft(whole, ids, restricted)
