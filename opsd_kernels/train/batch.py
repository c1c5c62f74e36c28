"""Rollouts -> padded tensors. The student's and the teacher's prompts differ in length; row (b, t) of either side predicts the same token.

Simplification: padding lies on the right and no attention mask is passed, since a causal model's valid rows cannot see what follows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
    """The rollouts of the loss and the teacher's prompt of each, None where the teacher has no view. Raises ValueError without any."""
    if not rollouts or len(rollouts) != len(teacher_prompts):
        raise ValueError(
            f"rollouts: expected at least one, and a teacher prompt for each, got {len(rollouts)} and {len(teacher_prompts)} prompts"
        )
    completions = [rollout.tokens for rollout in rollouts]
    labels_BT = completion_labels(completions)
    student = align([rollout.prompt_tokens for rollout in rollouts], completions, pad)
    # Without a view the teacher's row is computed on the student's prompt and weighs nothing.
    views = [
        rollout.prompt_tokens if view is None else view
        for rollout, view in zip(rollouts, teacher_prompts, strict=True)
    ]
    distilled_B = torch.tensor([view is not None for view in teacher_prompts])
    advantages_B = (
        torch.zeros(len(rollouts)) if advantages is None else torch.tensor(advantages, dtype=torch.float32)
    )
    # A segment starts behind a separator.
    boundaries_BT = torch.nn.functional.pad(
        torch.isin(labels_BT, torch.tensor(sorted(separators), dtype=torch.int64))[:, :-1], (1, 0)
    )
    sides = [
        Sequences(side.tokens_BL.to(device), side.rows_BT.to(device))
        for side in (student, align(views, completions, pad))
    ]
    tensors = [t.to(device) for t in (labels_BT, labels_BT != IGNORE)]
    return Batch(
        *sides,
        *tensors,
        tuple(rollouts),
        distilled_B.to(device),
        advantages_B.to(device),
        boundaries_BT.to(device),
    )


def advantages(rollouts: Sequence[Rollout], normalize_std: bool) -> list[float]:
    """GRPO's, one per rollout in their order; a group is what answers the same prompt of the step."""
    rewards: dict[int, list[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.group, []).append(rollout.verdict.reward)
    of_group = {
        group: iter(group_advantages(torch.tensor(values, dtype=torch.float64), normalize_std=normalize_std))
        for group, values in rewards.items()
    }
    return [float(next(of_group[rollout.group])) for rollout in rollouts]


def completion_labels(completions: Sequence[tuple[int, ...]]) -> Tensor:  # -> (B, T)
    """The completions' tokens, -100 after the end."""
    return _padded(completions, IGNORE)


def align(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], pad: int) -> Sequences:
    """Prompt + completion in one row each, and the positions whose hidden states predict the completion."""
    tokens_BL = _padded(
        [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], pad
    )
    first_B1 = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    mask_BT = completion_labels(completions) != IGNORE
    # The last prompt token predicts the first completion token, hence len - 1. Masked rows point at 0, a row that exists.
    rows_BT = (first_B1 + torch.arange(mask_BT.shape[1])) * mask_BT
    return Sequences(tokens_BL[:, :-1].contiguous(), rows_BT)  # nothing follows the last token


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Slices of at most `size` rollouts, at the widths of the whole batch."""
    for start in range(0, batch.size, size):
        part = slice(start, start + size)
        sides = {"student": _slice(batch.student, part), "teacher": _slice(batch.teacher, part)}
        names = ("labels_BT", "mask_BT", "rollouts", "distilled_B", "advantages_B", "boundaries_BT")
        old = None if batch.old_logprobs_BT is None else batch.old_logprobs_BT[part]
        yield replace(
            batch, **sides, **{name: getattr(batch, name)[part] for name in names}, old_logprobs_BT=old
        )


def completion_hidden(hidden_BLH: Tensor, rows_BT: Tensor) -> Tensor:  # (B, L, H), (B, T) -> (B, T, H)
    """The hidden states that predict the completion's tokens."""
    return hidden_BLH.gather(1, rows_BT[..., None].expand(-1, -1, hidden_BLH.shape[-1]))


def _padded(rows: Sequence[tuple[int, ...]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def _slice(side: Sequences, part: slice) -> Sequences:
    return Sequences(side.tokens_BL[part], side.rows_BT[part])
