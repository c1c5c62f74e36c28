"""Rollouts -> padded tensors. The student's and the teacher's prompts differ in length; row (b, t) of either side predicts the same token.

Simplification: padding lies on the right and no attention mask is passed, since a causal model's valid rows cannot see what follows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opsd_kernels.train.types import Batch, Rollout, Sequences

IGNORE = -100


def make_batch(rollouts: Sequence[Rollout], teacher_prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device | str = "cpu") -> Batch:
    """The rollouts of the loss and the teacher's prompt of each. Raises ValueError without any."""
    if not rollouts or len(rollouts) != len(teacher_prompts):
        raise ValueError(f"rollouts: expected at least one, and a teacher prompt for each, got {len(rollouts)} and {len(teacher_prompts)} prompts")
    completions = [rollout.tokens for rollout in rollouts]
    labels_BT = completion_labels(completions)
    student = align([rollout.prompt_tokens for rollout in rollouts], completions, pad)
    teacher = align(teacher_prompts, completions, pad)
    return Batch(_to(student, device), _to(teacher, device), labels_BT.to(device), (labels_BT != IGNORE).to(device), tuple(rollouts))


def completion_labels(completions: Sequence[tuple[int, ...]]) -> Tensor:  # -> (B, T)
    """The completions' tokens, -100 after the end."""
    return _padded(completions, IGNORE)


def align(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], pad: int) -> Sequences:
    """Prompt + completion in one row each, and the positions whose hidden states predict the completion."""
    tokens_BL = _padded([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], pad)
    first_B1 = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    mask_BT = completion_labels(completions) != IGNORE
    # The last prompt token predicts the first completion token, hence len - 1. Masked rows point at 0, a row that exists.
    rows_BT = (first_B1 + torch.arange(mask_BT.shape[1])) * mask_BT
    return Sequences(tokens_BL[:, :-1].contiguous(), rows_BT)  # nothing follows the last token


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Slices of at most `size` rollouts, at the widths of the whole batch."""
    for start in range(0, batch.size, size):
        part = slice(start, start + size)
        yield Batch(_slice(batch.student, part), _slice(batch.teacher, part), batch.labels_BT[part], batch.mask_BT[part], batch.rollouts[part])


def completion_hidden(hidden_BLH: Tensor, rows_BT: Tensor) -> Tensor:  # (B, L, H), (B, T) -> (B, T, H)
    """The hidden states that predict the completion's tokens."""
    return hidden_BLH.gather(1, rows_BT[..., None].expand(-1, -1, hidden_BLH.shape[-1]))


def _padded(rows: Sequence[tuple[int, ...]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _to(side: Sequences, device: torch.device | str) -> Sequences:
    return Sequences(side.tokens_BL.to(device), side.rows_BT.to(device))


def _slice(side: Sequences, part: slice) -> Sequences:
    return Sequences(side.tokens_BL[part], side.rows_BT[part])
