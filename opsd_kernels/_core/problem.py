"""Define `Problem`, one call of the op. `Problem.of` checks it once and takes all decisions of the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._rows import backends
from .._rows.contract import stats_dtype
from ..spec import RowSpec, Support, expect
from . import checks
from .memory import same_storage
from .planner import is_16_bit, resolve_logits, workspace_budget
from .shard import VocabShard, local_head, shard_of


@dataclass(frozen=True)
class Side:
    """Hold hidden states and LM head of the student or of the teacher."""

    hidden: Tensor  # (..., H) in a public call, (N, H) in a Problem
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class RowSelection:
    """Hold the valid rows, and the per-row inputs known before the loop."""

    valid: Tensor | None = None  # (N,) bool; None: all rows are valid
    labels: Tensor | None = None  # (N,) int64
    topk_ids: Tensor | None = None  # (N, K) int64: the support listed by a teacher
    topk_logprobs: Tensor | None = None  # (N, K)
    factor: Tensor | None = None  # (N,) scale of the divergence's gradient
    policy_slope: Tensor | None = None  # (N,) scale of the gradient of -log q(label)


@dataclass(frozen=True)
class ComputedRows:
    """Hold the rows that enter the GEMMs."""

    count: int
    index: Tensor | None = None  # (count,) int64 positions; None: all rows
    valid: Tensor | None = None  # (N,) bool where invalid rows are computed too


@dataclass(frozen=True)
class Problem:
    """Describe one call of the op.

    Immutable. torch.compile traces it through `Function.apply` on torch 2.10 to 2.15.
    """

    student: Side
    teacher: Side | None  # None: all teacher logits are 0
    rows: RowSelection
    spec: RowSpec
    support: Support | None  # None: the whole vocabulary
    shared_head: bool
    vocab: int  # columns in use over all ranks; later columns have probability zero
    logits_dtype: torch.dtype  # of the logits buffers
    workspace_bytes: int | None
    backend: str | None
    shard: VocabShard | None  # None: whole heads
    wants: tuple[bool, bool, bool]  # gradients of the student's hidden, weight and bias

    @classmethod
    def of(
        cls,
        spec: RowSpec,
        student: Side,
        teacher: Side | None,
        *,
        labels: Tensor | None,
        ignore_index: int,
        mask: Tensor | None,
        vocab_size: int | None,
        logits_dtype: str | torch.dtype,
        workspace_bytes: int | None,
        backend: str | None,
        group: object | None,
        support: Support | None = None,
        listed: tuple[object, object, str] | None = None,
        exact_logprobs: bool = False,
        prefixes: tuple[str, str] = ("student_", "teacher_"),
    ) -> Problem:
        """Check the arguments of a public function, and flatten (..., H) to (N, H).

        `listed` is (ids, log-probs, tail) of a teacher of which only the top-k is known. With
        `exact_logprobs` a token weighting or a policy term reads the label's log-prob, so the logits must not
        be rounded to 16 bits. `prefixes` name the arguments in error texts. Raises ValueError or TypeError
        for a bad argument.
        """
        backends.check_name(backend)
        workspace_budget(workspace_bytes)
        given = [
            (prefix, side)
            for prefix, side in zip(prefixes, (student, teacher), strict=True)
            if side is not None
        ]
        shard = None if group is None else shard_of(group, student.weight)
        sides = [_of_rank(prefix, side, shard) for prefix, side in given]
        for prefix, side in zip(prefixes, sides, strict=False):
            checks.check_types(prefix, side.hidden, side.weight, side.bias)
        shared = len(sides) == 2 and _shares_head(sides[0].weight, sides[1].weight)
        sides = _autocast(sides, shared)
        for prefix, side in zip(prefixes, sides, strict=False):
            checks.check_side(
                prefix, side.hidden, side.weight, side.bias, sides[0].hidden, prefixes[0] + "hidden"
            )
        hidden = sides[0].hidden
        if len(sides) == 2:
            leading, other = hidden.shape[:-1], sides[1].hidden.shape[:-1]
            expect(
                leading == other,
                "teacher_hidden",
                f"leading shape {tuple(leading)}, as student_hidden",
                tuple(other),
            )
        valid, labels = checks.valid_tokens(hidden, labels, ignore_index, mask)
        heights = [side.weight.shape[0] if shard is None else shard.vocab_size for side in sides]
        vocab = checks.vocabulary(heights[0], heights[1] if len(heights) == 2 else None, vocab_size)
        ids = logprobs = None
        if listed is not None:
            ids, logprobs = checks.listed_support(*listed[:2], hidden.shape[:-1], valid)
            support = Support(ids.shape[1], None, listed[2])
        buffer, difference = resolve_logits(hidden.dtype, logits_dtype, shared, spec.digits_lost or exact_logprobs)
        flat = [
            Side(side.hidden.reshape(-1, side.hidden.shape[-1]), side.weight, side.bias) for side in sides
        ]
        return cls(
            student=flat[0],
            teacher=_detached(flat[1]) if len(flat) == 2 else None,
            rows=RowSelection(valid, labels, ids, logprobs),
            spec=replace(spec, difference=difference),
            support=support,
            shared_head=shared,
            vocab=vocab,
            logits_dtype=buffer,
            workspace_bytes=workspace_bytes,
            backend=backend,
            shard=None if shard is None else shard.cut(vocab),
            wants=(_wants(flat[0].hidden), _wants(flat[0].weight), _wants(flat[0].bias)),
        )

    @property
    def tokens(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def columns(self) -> int:
        """Return the number of columns in use that this rank's heads hold."""
        return self.vocab if self.shard is None else self.shard.stop - self.shard.start

    @property
    def centred(self) -> bool:
        """Return True if logits are held relative to a constant of their row, near its largest logit.

        16 bits then keep the digits of the entries that have probability, whatever is added to all logits. A
        softcap needs the logits themselves.
        """
        softcaps = self.spec.student.softcap, self.spec.teacher.softcap
        return is_16_bit(self.logits_dtype) and softcaps == (None, None)

    @property
    def trainable(self) -> bool:
        """Return True if the head gets a gradient."""
        return self.wants[1] or self.wants[2]

    @property
    def stats_dtype(self) -> torch.dtype:
        return stats_dtype(self.student.hidden.dtype)

    def with_factors(self, factor: Tensor | None, policy_slope: Tensor | None = None) -> Problem:
        return replace(self, rows=replace(self.rows, factor=factor, policy_slope=policy_slope))

    def for_gemms(self) -> Problem:
        """Cut the heads to the columns in use, make rows contiguous, cast biases to the statistics' dtype."""
        student = self._operands(self.student)
        if self.teacher is None:
            return replace(self, student=student)
        teacher = self._operands(self.teacher)
        if self.shared_head:
            teacher = replace(teacher, weight=student.weight)
        if same_storage(self.student.bias, self.teacher.bias):
            # One object: the sweeps take a common bias for a linear difference.
            teacher = replace(teacher, bias=student.bias)
        return replace(self, student=student, teacher=teacher)

    def _operands(self, side: Side) -> Side:
        bias = None if side.bias is None else side.bias[: self.columns].to(self.stats_dtype).contiguous()
        return Side(_contiguous_rows(side.hidden), _contiguous_rows(side.weight)[: self.columns], bias)


@dataclass
class Outputs:
    """Hold the results of all N rows, zeros at invalid ones, and the requested gradients."""

    loss: Tensor  # (N,) nats
    A: Tensor  # (N,) the row scalar of docs/mathematics.md
    stats: Tensor  # (N, len(Column))
    logprobs: Tensor | None  # (N, 2) nats: log-probs of the label under student and teacher
    dh: Tensor | None  # (N, H_s)
    dW: Tensor | None  # (rows of the student's whole head, H_s)
    dbias: Tensor | None  # (rows of that head,) float64 during the loop, then of the dtype of the statistics


def _wants(leaf: Tensor | None) -> bool:
    return torch.is_grad_enabled() and leaf is not None and leaf.requires_grad


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _detached(side: Side) -> Side:
    return Side(side.hidden.detach(), side.weight.detach(), None if side.bias is None else side.bias.detach())


def _of_rank(prefix: str, side: Side, shard: VocabShard | None) -> Side:
    """Return the side with the local tensors of this rank in place of DTensors."""
    return Side(side.hidden, *local_head(prefix, side.weight, side.bias, shard))


def _shares_head(student: Tensor, teacher: Tensor) -> bool:
    """Return True if both sides share one head: same storage, shape and strides.

    While torch.compile traces, tensors have no storage, and only one and the same object counts as shared.
    """
    return teacher is student or (not torch.compiler.is_compiling() and same_storage(student, teacher))


def _autocast(sides: list[Side], shared: bool) -> list[Side]:
    """Cast hidden states and weights to the autocast dtype. A shared head is cast once and stays shared."""
    device = sides[0].hidden.device.type
    if not torch.is_autocast_enabled(device):
        return sides
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    done = [Side(cast(side.hidden), cast(side.weight), side.bias) for side in sides]
    return [done[0], replace(done[1], weight=done[0].weight)] if shared else done
