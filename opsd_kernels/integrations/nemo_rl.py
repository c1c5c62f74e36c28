"""NeMo-RL's distillation loss from hidden states and heads, in the shape of its `DistillationLossFn` (0.8).

The config is NeMo-RL's (`kl_type`, `mixed_kl_weight`, `zero_outside_topk`), the data its micro-batch. The
call takes the student's hidden states and head where NeMo-RL takes log-probs gathered from logits.
The teacher is a list (`teacher_topk_logits`, `teacher_topk_indices`), or whole: hidden states and head, of
several teachers too. NeMo-RL is not imported.

Different from NeMo-RL, on purpose: an empty micro-batch gives 0; the divisor is the number of valid tokens
without 1e-8; the metric `loss` is a detached tensor, without a sync; a list entry of -inf is padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..divergence import linear_divergence
from ..spec import check_choice, check_number, expect
from ..topk import linear_topk_divergence

KL_TYPES = ("forward", "reverse", "mixed")
# Arguments of the ops that the shim sets, each with the reason.
DECIDED = {
    "divergence": "kl_type of the config decides",
    "beta": "mixed_kl_weight of the config decides",
    "tail": "zero_outside_topk of the config decides",
    "mask": "token_mask and sample_mask of data decide",
    "normalizer": "global_valid_toks decides",
    "teacher_index": "teacher_index of data decides",
    "return_stats": "the result is (loss, metrics)",
}


class DistillationLossFn:
    """The loss of a micro-batch: `w * KL(teacher || student) + (1 - w) * KL(student || teacher)`, in nats.

    cfg: a mapping or object with `kl_type` ("forward": w = 1, "reverse": w = 0, "mixed", the default: w is
        `mixed_kl_weight`, .5) and `zero_outside_topk` (False). With False both sides are renormalised on the
        list; with True the list's probabilities sum to 1 and the student's are those of the whole vocabulary.
        A whole teacher reads neither a list nor `zero_outside_topk`.

    Raises ValueError for `zero_outside_topk` with a reverse or mixed KL: NeMo-RL counts each entry outside
    the list against a teacher's log-prob of -100, which makes the loss 100 times the student's mass there.
    """

    def __init__(self, cfg: Any) -> None:
        def read(name: str, default: Any) -> Any:
            return cfg.get(name, default) if isinstance(cfg, Mapping) else getattr(cfg, name, default)

        self.kl_type = read("kl_type", "mixed")
        check_choice("kl_type", self.kl_type, KL_TYPES)
        weight = check_number("mixed_kl_weight", read("mixed_kl_weight", 0.5))
        expect(0 <= weight <= 1, "mixed_kl_weight", "a number in [0, 1]", weight)
        self.mixed_kl_weight = {"forward": 1.0, "reverse": 0.0}.get(self.kl_type, weight)
        self.zero_outside_topk = bool(read("zero_outside_topk", False))
        outside = "False, or kl_type='forward': entries outside the list would count at a log-prob of -100"
        forward = self.mixed_kl_weight == 1
        expect(forward or not self.zero_outside_topk, "zero_outside_topk", outside, True)

    def __call__(
        self,
        student_hidden: Tensor,  # (B, S, H)
        student_weight: Tensor,  # (V, H)
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | float | None = None,
        global_valid_toks: Tensor | float | None = None,
        *,
        teacher_hidden: Tensor | Sequence[Tensor] | None = None,  # (B, S, H_t), or one of each teacher
        teacher_weight: Tensor | Sequence[Tensor] | None = None,  # (V, H_t), or one of each teacher
        **options: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return (loss, metrics).

        data: `input_ids` (B, S), `token_mask` (B, S) and `sample_mask` (B,), 0 or 1; the row at position s
            predicts the token at s + 1, whose mask counts. `teacher_topk_logits` and `teacher_topk_indices`
            (B, S, K), in rows as the hidden states. With several teachers `teacher_index`, (B,) or (B, S)
            int64, chooses each row's.
        global_valid_toks: the divisor, of all ranks; None: the valid tokens of this micro-batch.
        options: further arguments of linear_divergence or, for a list, of linear_topk_divergence; those of
            tokens are (B, S - 1). Raises ValueError for one of DECIDED, which config and data set.

        Unless data has both masks all rows but the last of each sequence count. `global_valid_seqs` is not
        read, as in NeMo-RL for a loss of tokens.
        """
        for name, reason in DECIDED.items():
            came = "a tensor" if isinstance(options.get(name), Tensor) else repr(options.get(name))
            expect(name not in options, name, f"no argument, since {reason}", came)
        alone = teacher_hidden is None and teacher_weight is not None
        expect(not alone, "teacher_hidden", "hidden states beside teacher_weight", None)
        mask = torch.ones(student_hidden.shape[:2], device=student_hidden.device)
        if "token_mask" in data and "sample_mask" in data:
            mask = data["token_mask"] * data["sample_mask"][:, None]
        mask = mask[:, 1:] != 0
        options |= {"mask": mask, "normalizer": global_valid_toks}
        options |= {"divergence": "mixed_kl", "beta": self.mixed_kl_weight}
        student = student_hidden[:, :-1], student_weight
        if teacher_hidden is None:
            loss = self._of_list(student, data, options)
        else:
            loss = _of_teachers(student, teacher_hidden, teacher_weight, data, options)
        return loss, {"loss": loss.detach(), "num_valid_samples": len(data["input_ids"])}

    def _of_list(self, student: tuple[Tensor, Tensor], data: Mapping[str, Any], options: Any) -> Any:
        logits, ids = data["teacher_topk_logits"][:, :-1], data["teacher_topk_indices"][:, :-1]
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        tail = "none" if self.zero_outside_topk else "renormalize"
        return linear_topk_divergence(*student, ids, logprobs, tail=tail, **options)


def _of_teachers(
    student: tuple[Tensor, Tensor],
    hidden: Tensor | Sequence[Tensor],
    weight: Any,
    data: Mapping[str, Any],
    options: Any,
) -> Any:
    """Return the loss of one whole teacher, or of several by `teacher_index`."""
    if isinstance(hidden, Tensor):
        return linear_divergence(*student, hidden[:, :-1], weight, **options)
    index = data.get("teacher_index")  # missing, it is an error of linear_divergence
    if index is not None:
        index = index[:, None].expand(-1, student[0].shape[1]) if index.dim() == 1 else index[:, :-1]
    rows = [states[:, :-1] for states in hidden]
    return linear_divergence(*student, rows, weight, teacher_index=index, **options)
