"""Run a beginning that several rows share through the trunk once.

The answers of a group share their prompt; the teacher's prompts share the question, the answers their first
tokens. A packed row is the tree of the rows' tokens in depth-first order. A token sees those on its way to
the root, at the positions that its own row has alone, so that hidden states and gradients are those of
separate rows up to rounding. 16 answers of 48 tokens to two prompts of 100 make at most 952 tokens in place
of 2352.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from opsd_kernels.integrations.transformers import (
    Head,
    allowed_change,
    probe_tokens,
    range_change,
    scoring,
    without_adapter,
)
from opsd_kernels.train.batch import completion_hidden
from opsd_kernels.train.distributed.sharding import last_hidden, whole
from opsd_kernels.train.types import Sequences

# A packed row grows to this many tokens, or to one longer row: attention takes the square of them.
LONGEST = 1024
# A row of so many tokens costs about as much in attention as in the linear layers of a small model.
EVEN = 4096
# Packing must save this share of the cost.
LEAST_SAVED = 0.2
_serves: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packed:
    """Trees of tokens, padded on the right, and where the rows went."""

    tokens_GL: Tensor  # int64
    positions_GL: Tensor  # int64
    ends_GL: Tensor  # int64: a token is seen by those from its own place to the one before this
    index_BT: Tensor  # int64: places in the flattened packed rows; 0 where masked

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Shape (G, 1, L, L): 0 where the token of a line sees that of a column, else the lowest number."""
        place = torch.arange(self.tokens_GL.shape[1], device=self.tokens_GL.device)
        sees = (place <= place[:, None]) & (place[:, None] < self.ends_GL[:, None, :])
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
            ~sees, torch.finfo(dtype).min
        )[:, None]


def hidden_states(model: PreTrainedModel, side: Sequences, share: bool = False) -> Tensor:
    """Shape (B, T, H): the trunk's last hidden states at the rows that predict the completion.

    With `share`, what several rows begin with runs once, if the model can. No logits are computed. A sharded
    model's head is readable afterwards.
    """
    packed = pack(side) if share and can_share(model) and _reaches(model, side) else None
    if packed is None:
        return completion_hidden(last_hidden(model, side.tokens_BL)[0], side.rows_BT)
    return _packed_hidden(model, packed)


def _packed_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:
    mask = packed.mask(_dtype(model))
    hidden_GLH, _ = last_hidden(
        model, packed.tokens_GL, attention_mask=mask, position_ids=packed.positions_GL
    )
    return hidden_GLH.flatten(0, 1)[packed.index_BT]


def pack(side: Sequences) -> Packed | None:
    """Pack the rows of a batch; None if that saves too little."""
    host = side.host or side
    places = host.rows_BT.tolist()
    # The last token predicts nothing.
    rows = [row[: max(place) + 1] for row, place in zip(host.tokens_BL.tolist(), places, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    shared = [0, *(_common(rows[a], rows[b]) for a, b in pairwise(order))]
    trees, length = _trees([len(rows[b]) for b in order], shared)
    if _cost(len(trees), length) > (1 - LEAST_SAVED) * _cost(*side.tokens_BL.shape):
        return None
    shape = len(trees), length
    tokens, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    # Padding sees itself.
    ends = torch.arange(1, length + 1).repeat(len(trees), 1)
    index_BT = torch.zeros(side.rows_BT.shape, dtype=torch.int64)
    for g, tree in enumerate(trees):
        path: list[int] = []
        size = 0
        for number in tree:
            b, common = order[number], 0 if number == tree[0] else shared[number]
            ends[g, path[common:]] = size
            new = slice(size, size + len(rows[b]) - common)
            tokens[g, new] = torch.tensor(rows[b][common:], dtype=torch.int64)
            positions[g, new] = torch.arange(common, len(rows[b]))
            path[common:] = range(new.start, new.stop)
            size = new.stop
            predicting = path[places[b][0] :]
            index_BT[b, : len(predicting)] = g * length + torch.tensor(predicting)
        ends[g, path] = size
    device = side.tokens_BL.device
    return Packed(*(x.to(device, non_blocking=True) for x in (tokens, positions, ends, index_BT)))


def _common(one: list[int], other: list[int]) -> int:
    """Return the number of first tokens that two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _trees(lengths: list[int], shared: list[int]) -> tuple[list[list[int]], int]:
    """Divide sorted rows into trees at the least cost; return the rows of each and the largest size.

    `shared` counts the first tokens that a row has in common with the one before it.
    """
    tried = []
    for capacity in sorted({max(*lengths, LONGEST * part // 8) for part in range(1, 9)}):
        trees: list[list[int]] = []
        sizes: list[int] = []
        for number, (length, common) in enumerate(zip(lengths, shared, strict=True)):
            if not trees or sizes[-1] + length - common > capacity:
                trees.append([])
                sizes.append(0)
                common = 0
            trees[-1].append(number)
            sizes[-1] += length - common
        tried.append((_cost(len(trees), max(sizes)), max(sizes), trees))
    _, size, trees = min(tried, key=lambda each: each[0])
    return trees, size


def _cost(rows: int, length: int) -> float:
    """Return the cost of rows of this length, in tokens of short rows."""
    return rows * length * (1 + length / EVEN)


# ---------------------------------------------------------------- which models can


def can_share(model: PreTrainedModel) -> bool:
    """Return True if packed rows give the log-probs of separate ones, tried once per model.

    A collective call for a sharded model.
    """
    inner = without_adapter(model)
    if inner not in _serves:
        with whole(model), scoring(model):
            _serves[inner] = _agrees(model)
    return _serves[inner]


def _reaches(model: PreTrainedModel, side: Sequences) -> bool:
    """Return True if no layer's window is narrower than a row."""
    inner: Any = without_adapter(model)
    window = _window(inner.config.get_text_config())
    return window is None or side.tokens_BL.shape[1] <= window


def _window(settings: Any) -> int | None:
    """Return how far a layer of the model sees at least, None for all tokens."""
    names = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
    found = [getattr(settings, name, None) for name in names]
    return min((width for width in found if isinstance(width, int) and width > 0), default=None)


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Compare one small packed row with separate rows.

    A recurrent model carries one answer into the next, other models know no mask of this form.
    """
    one, other = probe_tokens(model)
    # Answers of three and five tokens to a prompt of three.
    tokens = torch.stack([one, torch.cat([one[:3], other.flip(0)[:5]])])
    rows = torch.tensor([[2, 3, 4, 0, 0, 0], [2, 3, 4, 5, 6, 7]], device=tokens.device)
    side = Sequences(tokens, rows)
    packed = pack(side)
    assert packed is not None
    try:
        apart = completion_hidden(last_hidden(model, tokens)[0], rows)
        together = _packed_hidden(model, packed)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any kind: these are the models' own checks of their arguments
        return False
    head, known = Head.of(model), rows > 0
    change = range_change(head.logprobs(together[known]), head.logprobs(apart[known]))
    return change <= allowed_change(apart.dtype)


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return without_adapter(model).get_input_embeddings().weight.dtype
