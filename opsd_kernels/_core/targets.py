"""A teacher given as rows of logits, log-probs or probabilities, in place of hidden states and a head.

The sweeps read the rows where they lie if dtype and layout allow it. Else each chunk's rows are cast into one
buffer, which the planner counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._rows.torch_topk import rows_at_once
from ..spec import check_choice, check_tensor, expect

FORMS = ("logits", "logprobs", "probs")


@dataclass(frozen=True)
class Target:
    """Hold the teacher's rows: logits or log-probs, or probabilities of which the logarithm is taken."""

    values: Tensor  # (N, columns of these heads, or more)
    probs: bool

    def copied(self, logits_dtype: torch.dtype, packed: bool, ids: Tensor | None) -> bool:
        """Return True if rows must be copied: as some columns, in another dtype, through a logarithm."""
        x = self.values
        lies = x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or x.shape[0] == 1)
        return self.probs or packed or not lies or x.dtype != logits_dtype or ids is not None

    def rows(self, at: slice | Tensor, S: Tensor, buffer: Tensor | None, ids: Tensor | None) -> Tensor:
        """Return T for the logits S, (C, V), of the positions `at`; in `buffer` where it is given.

        `ids` (V,) are the columns to take, None for the first ones.
        """
        (C, V), x = S.shape, self.values
        if buffer is None:
            return x[at, :V]
        T, step = buffer[:C], rows_at_once(V, x.device)
        wide = torch.promote_types(T.dtype, torch.float32)
        for start in range(0, C, step):
            part = slice(start, min(start + step, C))
            # A slice of a slice is a view; an index gathers a few rows at a time.
            if ids is not None:
                rows = x[at][part, ids] if isinstance(at, slice) else x[at[part][:, None], ids]
            else:
                rows = x[at][part, :V] if isinstance(at, slice) else x[at[part], :V]
            T[part].copy_(rows.to(wide).log() if self.probs else rows)
        return T


def check_target(target: Any, form: object, leading: torch.Size, columns: int, exact: bool) -> Target:
    """Return the target (..., V) of tokens (...) as rows. `exact`: `columns` is their number, else the least.

    Raises ValueError or TypeError for a bad argument.
    """
    check_choice("target_is", form, FORMS)
    check_tensor("target", target)
    expect(target.is_floating_point(), "target", "a floating-point tensor", target.dtype, TypeError)
    width = target.shape[-1] if target.dim() == len(leading) + 1 else 0
    good = target.shape[:-1] == leading and (width == columns if exact else width >= columns)
    if not good:  # torch.compile does not trace the text
        more = ", or with vocab_size more columns" if exact else " or more columns"
        expect(False, "target", f"shape {(*leading, columns)}{more}", tuple(target.shape))
    return Target(target.detach().reshape(-1, target.shape[-1]), form == "probs")


def comparing(sweep: Callable[..., Any], target: Target, copied: bool) -> Callable[..., Any]:
    """Return the sweep with the target's rows as the teacher's logits, `copied` into the chunk's buffer."""

    def run(walk: Any, chunk: Any, at: slice | Tensor) -> Tensor | None:
        T = target.rows(at, chunk.S, chunk.T if copied else None, walk.problem.vocab_ids)
        label = chunk.at_label
        if label is not None:
            label = label[0], T.gather(1, walk.label_columns(at)[:, None].clamp(min=0)).to(label[0].dtype)
        return sweep(walk, chunk._replace(T=T, at_label=label), at)

    return run
