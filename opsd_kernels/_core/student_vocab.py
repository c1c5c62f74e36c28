"""Give the columns of a student's head by their ids in the teacher's vocabulary, as of a draft head.

Column j of both sides is the teacher's token ids[j]. The teacher's head stays as it is: the loop reads its
rows by slices of the ids (`for_gemms` of a Problem). Labels and listed ids are turned into columns before the
loop, which so meets one vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import check_tensor, expect

NAME = "student_vocab_ids"


def check_alone(vocab_size: object, group: object) -> None:
    """Raise ValueError for an option that cannot stand beside the ids."""
    columns = f"None beside {NAME}, which name the columns in use"
    expect(vocab_size is None, "vocab_size", columns, vocab_size)
    whole = f"None beside {NAME}: a rank lacks rows of teacher_weight; give it those of its own ids"
    expect(group is None, "group", whole, type(group).__name__)


def check_ids(ids: Any, rows: int, device: torch.device, shared: bool) -> Tensor:
    """Return the ids (V_s,) of the `rows` of a student's head. Their values are checked before the loop.

    Raises ValueError or TypeError for anything else, and where the head is `shared`.
    """
    check_tensor(NAME, ids, "a tensor or None")
    expect(ids.dtype == torch.int64, NAME, "dtype int64, the ids of tokens", ids.dtype, TypeError)
    expect(ids.shape == (rows,), NAME, f"shape ({rows},), the rows of student_weight", tuple(ids.shape))
    expect(ids.device == device, NAME, f"a tensor on {device}, as student_hidden", ids.device)
    one = "None where student_weight is teacher_weight (a student of teacher_weight[ids] has its own)"
    expect(not shared, NAME, one, "ids")
    return ids.detach()


def columns_of(ids: Tensor, tokens: Tensor) -> Tensor:
    """Return the columns of the teacher's `tokens` (...), -1 for one that is none of the `ids`."""
    in_order, order = ids.sort()
    place = torch.searchsorted(in_order, tokens.contiguous()).clamp(max=len(ids) - 1)
    return torch.where(in_order[place] == tokens, order[place], -1)


def own_labels(ids: Tensor, labels: Tensor, valid: Tensor, teacher_rows: int | None) -> tuple[Tensor, Tensor]:
    """Return valid (N,) without the tokens whose labels are none of the ids, and labels (N,) as columns.

    A label that is no token of the teacher either stays valid, and what it is: it is reported before the
    loop.
    """
    columns = columns_of(ids, labels)
    known = (columns >= 0) | (labels < 0)
    if teacher_rows is not None:
        known |= labels >= teacher_rows
    return valid & known, torch.where(columns < 0, labels, columns)


def own_entries(ids: Tensor, listed: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a teacher's list, (N, K) each, as columns; an entry that is none of the ids as padding.

    An id below 0 stays what it is.
    """
    columns = columns_of(ids, listed)
    foreign = (columns < 0) & (listed >= 0)
    return torch.where(columns < 0, listed.clamp(max=0), columns), logprobs.masked_fill(foreign, -torch.inf)
