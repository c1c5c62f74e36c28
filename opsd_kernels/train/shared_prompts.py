"""Run a prompt through the trunk once for all answers to it.

The answers of a group share their prompt, and often the teacher's too. A packed row holds the prompt and,
behind it, several answers. An answer sees the prompt and itself, at the positions that it has alone, so that
hidden states and gradients are those of separate rows up to rounding. 16 answers of 48 tokens to two prompts
of 100 make rows of 952 tokens in place of 2352.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

# A packed row grows to this many tokens, since attention takes the square of them, or to one longer answer.
LONGEST = 1024
# Packing must save this share of the tokens.
LEAST_SAVED = 0.2
_serves: WeakKeyDictionary[Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packed:
    """Prompts with their answers, padded on the right, and where the rows of the answers went."""

    tokens_GL: Tensor  # int64
    positions_GL: Tensor  # int64
    segments_GL: Tensor  # int64: 0 for the prompt and the padding, else the number of the answer in its row
    index_BT: Tensor  # int64: places in the flattened packed rows; 0 where masked

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Shape (G, 1, L, L): 0 where the token of a line sees that of a column, else the lowest number."""
        L = self.tokens_GL.shape[1]
        lines, columns = self.segments_GL[:, :, None], self.segments_GL[:, None, :]
        sees = (columns == 0) | (columns == lines)
        sees &= torch.ones(L, L, dtype=torch.bool, device=sees.device).tril()
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
            ~sees, torch.finfo(dtype).min
        )[:, None]


def hidden_states(model: PreTrainedModel, side: Sequences, share: bool = False) -> Tensor:
    """Shape (B, T, H): the trunk's last hidden states at the rows that predict the completion.

    With `share`, a prompt of several rows runs once, if the model can. No logits are computed. A sharded
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
    """Pack the rows that begin with the same prompt; None if that saves too little."""
    host = side.host or side
    tokens, places = host.tokens_BL.tolist(), host.rows_BT.tolist()
    prompts = [tuple(row[: place[0] + 1]) for row, place in zip(tokens, places, strict=True)]
    # The last token predicts nothing.
    answers = [row[place[0] + 1 : max(place) + 1] for row, place in zip(tokens, places, strict=True)]
    rows = _rows_of(prompts, answers)
    length = max(len(prompts[row[0]]) + sum(len(answers[b]) for b in row) for row in rows)
    if len(rows) * length > (1 - LEAST_SAVED) * side.tokens_BL.numel():
        return None
    shape = len(rows), length
    packed, positions, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    index_BT = torch.zeros(side.rows_BT.shape, dtype=torch.int64)
    for g, row in enumerate(rows):
        prompt = prompts[row[0]]
        packed[g, : len(prompt)] = torch.tensor(prompt)
        positions[g, : len(prompt)] = torch.arange(len(prompt))
        start = len(prompt)
        for number, b in enumerate(row, 1):
            stop = start + len(answers[b])
            packed[g, start:stop] = torch.tensor(answers[b], dtype=torch.int64)
            positions[g, start:stop] = torch.arange(len(prompt), len(prompt) + stop - start)
            segments[g, start:stop] = number
            # The prompt's last token predicts the answer's first.
            index_BT[b, 0] = g * length + len(prompt) - 1
            index_BT[b, 1 : 1 + stop - start] = g * length + torch.arange(start, stop)
            start = stop
    device = side.tokens_BL.device
    return Packed(*(x.to(device, non_blocking=True) for x in (packed, positions, segments, index_BT)))


def _rows_of(prompts: Sequence[tuple[int, ...]], answers: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the answers of each packed row: of one prompt, in their order."""
    open_rows: dict[tuple[int, ...], list[int]] = {}
    lengths: dict[tuple[int, ...], int] = {}
    rows: list[list[int]] = []
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if prompt not in open_rows or lengths[prompt] + len(answer) > LONGEST:
            open_rows[prompt], lengths[prompt] = [], len(prompt)
            rows.append(open_rows[prompt])
        open_rows[prompt].append(b)
        lengths[prompt] += len(answer)
    return rows


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
