"""List the k largest logits of rows in plain torch, for any device. Contract: contract.py, `row_topk_`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LogitTransform
from .torch_math import transform

# Columns of a group. Of the largest maxima of groups one takes k groups, so that a list costs one read of the
# row, a selection among V / GROUP maxima, and one among k * GROUP entries.
GROUP = 32
# Of the copies made at once: of rows of logits, of hidden rows and rows of a head. On a GPU 8 MiB.
ENTRIES = {"cpu": 1 << 17, "cuda": 1 << 22}


def rows_at_once(width: int, device: torch.device) -> int:
    """Return how many rows of `width` entries are copied at once."""
    return max(1, ENTRIES["cpu" if device.type == "cpu" else "cuda"] // width)


def row_topk_(
    S: Tensor, of_side: LogitTransform, bias: Tensor | None, ids: Tensor, values: Tensor, tail: Tensor
) -> None:
    n, V = S.shape
    step = rows_at_once(V, S.device)
    for b in (slice(start, start + step) for start in range(0, n, step)):
        x = transform(S[b].to(values.dtype), of_side.at(b), bias)
        ids[b] = largest(torch.where(x.isnan(), -torch.inf, x), ids.shape[1])
        values[b] = x.gather(1, ids[b])
        rest = x.scatter(1, ids[b], -torch.inf)
        tail[b] = torch.where(rest == -torch.inf, rest, rest - values[b, :1]).logsumexp(1)


def largest(x: Tensor, k: int) -> Tensor:
    """Return the (n, k) columns of the largest entries of x, (n, V) without NaN, in the order of the list.

    Groups are neighbouring columns: of two groups with equal maxima the first one has the lower columns.
    """
    (n, V), groups = x.shape, x.shape[1] // GROUP
    if groups <= 2 * k:
        return ranked(x, k)
    whole = groups * GROUP
    found = ranked(x[:, :whole].unflatten(1, (groups, GROUP)).amax(2), k).sort(1).values
    members = torch.arange(GROUP, device=x.device)
    rest = torch.arange(whole, V, device=x.device).expand(n, -1)
    columns = torch.cat([(found[:, :, None] * GROUP + members).flatten(1), rest], 1)
    return columns.gather(1, ranked(x.gather(1, columns), k))


def ranked(values: Tensor, k: int) -> Tensor:
    """Return the (n, k) positions of the largest values, (n, m), in falling order, lower ones first on ties.

    fp32 values take torch.topk of integer keys, the value before the position: which of equal values
    torch.topk itself returns is not defined.
    """
    if values.dtype != torch.float32:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (values + 0.0).view(torch.int32)  # -0. becomes 0.
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ascending.long() << 32) - torch.arange(values.shape[1], device=values.device)
    return keys.topk(k, dim=1).indices
