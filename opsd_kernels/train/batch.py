"""Turn rollouts into padded tensors.

Prompts of student and teacher differ in length; row (b, t) of either side predicts the same token.

Simplification: padding is on the right, where a causal model's valid rows cannot see it; no attention mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opsd_kernels.objectives import group_advantages
from opsd_kernels.train.types import Batch, Rollout, Sequences

IGNORE = -100


def make_batch(
    rollouts: Sequence[Rollout],
    teacher_prompts: Sequence[tuple[int, ...] | None],
    pad: int,
    device: torch.device | str = "cpu",
    advantages: Sequence[float] | None = None,
    separators: frozenset[int] = frozenset(),
) -> Batch:
    """Build a batch from rollouts and the teacher's prompt of each, None for a rollout that is not distilled.

    Raises ValueError without rollouts, or if the two differ in number.
    """
    if not rollouts or len(rollouts) != len(teacher_prompts):
        raise ValueError(
            "rollouts: expected at least one, and a teacher prompt for each, "
            f"got {len(rollouts)} and {len(teacher_prompts)} prompts"
        )
    completions = [rollout.tokens for rollout in rollouts]
    labels_BT = completion_labels(completions)
    student = align([rollout.prompt_tokens for rollout in rollouts], completions, pad)
    # A rollout that is not distilled puts the student's prompt in the teacher's row, whose weight is zero.
    views = [
        rollout.prompt_tokens if view is None else view
        for rollout, view in zip(rollouts, teacher_prompts, strict=True)
    ]
    distilled_B = torch.tensor([view is not None for view in teacher_prompts])
    advantages_B = (
        torch.zeros(len(rollouts)) if advantages is None else torch.tensor(advantages, dtype=torch.float32)
    )
    # A segment starts after a separator.
    boundaries_BT = torch.nn.functional.pad(
        torch.isin(labels_BT, torch.tensor(sorted(separators), dtype=torch.int64))[:, :-1], (1, 0)
    )
    return Batch(
        student.to(device),
        align(views, completions, pad).to(device),
        labels_BT.to(device),
        (labels_BT != IGNORE).to(device),
        tuple(rollouts),
        distilled_B.to(device),
        advantages_B.to(device),
        boundaries_BT.to(device),
    )


def advantages(rollouts: Sequence[Rollout], normalize_std: bool) -> list[float]:
    """Return GRPO's advantages, one per rollout in their order. A group answers one prompt of the step."""
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.group, []).append(rollout.verdict.reward)
    of_group = {
        group: iter(group_advantages(torch.tensor(values, dtype=torch.float64), normalize_std=normalize_std))
        for group, values in rewards.items()
    }
    return [float(next(of_group[rollout.group])) for rollout in rollouts]


def completion_labels(completions: Sequence[tuple[int, ...]]) -> Tensor:
    """Shape (B, T): the completions' tokens, -100 after the end."""
    return _padded(completions, IGNORE)


def align(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], pad: int) -> Sequences:
    """Join prompt and completion into rows, with the positions whose hidden states predict the completion."""
    tokens_BL = _padded(
        [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], pad
    )
    first_B1 = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    mask_BT = completion_labels(completions) != IGNORE
    # The last prompt token predicts the first completion token, hence len - 1. Masked rows read position 0.
    rows_BT = (first_B1 + torch.arange(mask_BT.shape[1])) * mask_BT
    # The last token predicts nothing.
    return Sequences(tokens_BL[:, :-1].contiguous(), rows_BT)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield slices of at most `size` rollouts, padded to the widths of the whole batch."""
    for start in range(0, batch.size, size):
        part = slice(start, start + size)
        yield Batch(
            _slice(batch.student, part),
            _slice(batch.teacher, part),
            batch.labels_BT[part],
            batch.mask_BT[part],
            batch.rollouts[part],
            batch.distilled_B[part],
            batch.advantages_B[part],
            batch.boundaries_BT[part],
            None if batch.old_logprobs_BT is None else batch.old_logprobs_BT[part],
        )


def completion_hidden(
    hidden_BLH: Tensor,  # (B, L, H)
    rows_BT: Tensor,  # (B, T)
) -> Tensor:
    """Shape (B, T, H): the hidden states that predict the completion's tokens."""
    return hidden_BLH.gather(1, rows_BT[..., None].expand(-1, -1, hidden_BLH.shape[-1]))


def _padded(rows: Sequence[tuple[int, ...]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _slice(side: Sequences, part: slice) -> Sequences:
    host = None if side.host is None else _slice(side.host, part)
    return Sequences(side.tokens_BL[part], side.rows_BT[part], host)
