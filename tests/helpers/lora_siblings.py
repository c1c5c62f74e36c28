"""The ops beside `linear_divergence` in its signature, and their references on dense heads."""

import torch

from opsd_kernels import (
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence_to,
    linear_logprobs_at,
)
from opsd_kernels.objectives import PPOClip, linear_policy_divergence
from opsd_kernels.testing.heads import with_dense_heads
from opsd_kernels.testing.reference import linear_divergence_reference
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference


def rows_of_ids(N: int, V: int) -> torch.Tensor:
    """Return ids (N, 6) with repetitions and one of -1."""
    ids = (31 * torch.arange(N)[:, None] + 17 * torch.arange(6)) % V
    ids[:, 2], ids[:, 4] = -1, ids[:, 0]
    return ids


def at_ids(op):
    def run(h, W, t, Wt, *, labels, mask, student_bias=None, teacher_bias=None, student_lora=None,
            teacher_lora=None, **options):  # fmt: skip
        V = options.pop("V", W.shape[0])
        ids = rows_of_ids(labels.numel(), V).view(*labels.shape, 6)
        mask = mask & (labels != -100)
        if student_lora is not None:
            options["lora"] = student_lora
        return op(h, W, ids, bias=student_bias, mask=mask, **options)

    return run


def to_rows(op):
    """The teacher's rows are its dense logits."""

    def run(h, W, t, Wt, *, teacher_bias=None, teacher_lora=None, **options):
        wide = torch.promote_types(t.dtype, torch.float32)
        rows = t.to(wide) @ Wt.to(wide).T
        rows = rows if teacher_bias is None else rows + teacher_bias.to(wide)
        return op(h, W, rows, **options)

    return run


def with_a_policy(h, W, t, Wt, **options):
    advantages = torch.linspace(-1, 1, t.shape[-2], dtype=torch.float64).to(t.dtype)
    told = {"policy": PPOClip(advantages), "policy_weight": 0.3}
    return linear_policy_divergence(h, W, t, Wt, **told, **options)


def through_cache(h, W, t, Wt, *, labels, mask, student_bias=None, teacher_bias=None, student_lora=None,
                  teacher_lora=None, divergence="forward_kl", **options):  # fmt: skip
    mask = mask & (labels != -100)
    shared = {"student_bias": student_bias, "mask": mask, "student_lora": student_lora}
    kept = {name: options[name] for name in ("backend", "workspace_bytes", "group") if name in options}
    cache = cache_forward_kl(t, Wt, W, teacher_bias=teacher_bias, teacher_lora=teacher_lora, **shared, **kept)
    return linear_cached_forward_kl(h, W, cache, **shared, **options)


# name: (op, reference)
SIBLINGS = {
    "at ids": (
        at_ids(linear_logprobs_at),
        with_dense_heads(at_ids(linear_logprobs_at_reference)),
    ),
    "to rows": (to_rows(linear_divergence_to), with_dense_heads(linear_divergence_reference)),
    "policy": (with_a_policy, with_dense_heads(with_a_policy)),
}
