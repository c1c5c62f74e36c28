"""Define `Problem`, one call of the op. `Problem.of` checks it once and takes all decisions of the loop.

Every error names the argument, the expected value and the actual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._rows import backends
from ..quantized import QuantizedHead, stored_head
from ..spec import (
    Divergence,
    LogitTransform,
    RowSpec,
    Support,
    check_choice,
    check_number,
    check_tensor,
    expect,
)
from .lora import Lora
from .planner import resolve_logits, workspace_budget
from .shard import VocabShard, local_head, shard_of
from .sides import autocast, mixed, same_head, same_storage
from .sizes import DTYPES
from .sliced_head import MovedRows, SlicedHead
from .student_vocab import check_alone, check_ids, own_entries, own_labels
from .targets import Target, check_target


@dataclass(frozen=True)
class Side:
    """Hold hidden states and LM head of the student or of the teacher."""

    hidden: Tensor  # (..., H) in a public call, (N, H) in a Problem
    weight: Any  # (V, H): a tensor, but an argument until `checked`, and in the loop perhaps a SlicedHead
    bias: Tensor | None  # (V,)
    # An argument until `checked` makes it a Lora
    lora: Any = None
    rows: Tensor | None = None  # (N,) int64: each token's row of a packed `hidden`; None: its own position
    quantised: QuantizedHead | None = None  # whose values are `weight`

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that may want a gradient."""
        lora = () if self.lora is None else (self.lora.A, self.lora.B)
        return (self.hidden, self.weight, self.bias, *lora)

    def with_leaves(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *lora: Tensor) -> Side:
        """Return the side with other leaves."""
        adapter = self.lora and replace(self.lora, A=lora[0], B=lora[1])
        return replace(self, hidden=hidden, weight=weight, bias=bias, lora=adapter)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the side's GEMMs: the wider one of hidden states and weight."""
        wide = self.hidden.dtype
        return wide if self.quantised is not None else torch.promote_types(wide, self.weight.dtype)

    def detach(self) -> Side:
        """Return the side outside autograd."""
        bias, lora = None if self.bias is None else self.bias.detach(), self.lora and self.lora.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias, lora=lora)


@dataclass(frozen=True)
class Teachers:
    """Hold several teachers of which each token has one (teachers.py)."""

    index: Tensor  # (N,) int64; of valid tokens in [0, K)
    sides: tuple[Side, ...]  # of hidden states (N, H_k), or packed (n_k, H_k)
    scales: tuple[float, ...]
    softcaps: tuple[float | None, ...]


@dataclass(frozen=True)
class RowSelection:
    """Hold the valid rows, and the per-row inputs known before the loop."""

    valid: Tensor | None = None  # (N,) bool; None: all rows are valid
    labels: Tensor | None = None  # (N,) int64
    topk_ids: Tensor | None = None  # (N, K) int64: the support listed by a teacher
    topk_logprobs: Tensor | None = None  # (N, K)
    factor: Tensor | None = None  # (N,) scale of the divergence's gradient
    policy_slope: Tensor | None = None  # (N,) scale of the gradient of -log q(label)
    target: Target | None = None  # the teacher's rows, where it has no hidden states


@dataclass(frozen=True)
class ComputedRows:
    """Hold the rows that enter the GEMMs."""

    count: int
    index: Tensor | None = None  # (count,) int64 positions; None: all rows
    valid: Tensor | None = None  # (N,) bool where invalid rows are computed too
    adapters: Any = None  # adapted.Adapters where a head has one
    # With several teachers the places (N,) of the tokens' rows in their hidden states, None where these are
    # not packed, and for each chunk its segments: (teacher, rows). The rows of a segment are neighbours.
    places: tuple[Tensor | None, ...] = ()
    segments: list[list[tuple[int, int]]] | None = None


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
    workspace_bytes: int
    gradient_tolerance: float | None  # share of a chunk's gradient that may be left out; None: nothing is
    backend: str | None
    shard: VocabShard | None  # None: whole heads
    wants: tuple[bool, ...]  # gradients of the student's leaves
    teachers: Teachers | None = None  # several by index; `teacher` is then the first
    vocab_ids: Tensor | None = None  # (V_s,) the columns in the teacher's vocabulary: student_vocab.py

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
        gradient_tolerance: object = None,
        support: Support | None = None,
        listed: tuple[object, object, str] | None = None,
        exact_logprobs: bool = False,
        prefixes: tuple[str, str] = ("student_", "teacher_"),
        vocab_ids: object = None,
    ) -> Problem:
        """Check the arguments of a public function, and flatten (..., H) to (N, H).

        `listed` is (ids, log-probs, tail) of a teacher of which only the top-k is known. With
        `exact_logprobs` a token weighting or a policy term reads the label's log-prob, so the logits must not
        be rounded to 16 bits. `prefixes` name the arguments in error texts. Raises ValueError or TypeError
        for a bad argument.
        """
        if backend is not None:
            check_choice("backend", backend, backends.NAMES)
        if vocab_ids is not None:
            check_alone(vocab_size, group)
        budget = workspace_budget(workspace_bytes)
        shard = None if group is None else shard_of(group, student.weight, f"{prefixes[0]}weight")
        sides = [student] if teacher is None else [student, teacher]
        sides = [checked(prefix, side, shard) for prefix, side in zip(prefixes, sides, strict=False)]
        compiling = torch.compiler.is_compiling()
        # While torch.compile traces, tensors have no storage: only one and the same object counts as shared.
        one = teacher is not None and student.weight is teacher.weight
        shared = one or (len(sides) == 2 and not compiling and same_head(*sides))
        device = sides[0].hidden.device.type  # torch 2.10 cannot trace `is_autocast_available`
        if (compiling or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
            sides = autocast(sides, shared)
        for prefix, side in zip(prefixes, sides, strict=False):
            check_side(prefix, side, sides[0].hidden, prefixes[0] + "hidden")
        widest = sides[0].hidden.dtype
        if any(x.dtype != widest for side in sides for x in (side.hidden, side.weight)):
            sides, widest = mixed(sides, shared)
        hidden = sides[0].hidden
        heights = [side.weight.shape[0] if shard is None else shard.vocab_size for side in sides]
        own = None if vocab_ids is None else check_ids(vocab_ids, heights[0], hidden.device, shared)
        valid, labels = valid_tokens(hidden, labels, ignore_index, mask, own, heights)
        vocab = vocabulary(heights[0], heights[1] if len(heights) == 2 and own is None else None, vocab_size)
        ids = logprobs = None
        if listed is not None:
            ids, logprobs = listed_support(*listed[:2], hidden.shape[:-1], valid, own)
            support = Support(ids.shape[1], None, listed[2])
        transforms, exact = (spec.student, spec.teacher), spec.kinked or exact_logprobs
        buffer, difference = resolve_logits(widest, logits_dtype, shared, exact, transforms)
        if difference and buffer.itemsize > 2 and any(side.lora is not None for side in sides):
            # Wide buffers hold the teacher's own logits unless the adapter is the student's too.
            difference = same_adapter(sides[0].lora, sides[1].lora)
        flat = [replace(side, hidden=side.hidden.reshape(-1, side.hidden.shape[-1])) for side in sides]
        leaves = flat[0].leaves if torch.is_grad_enabled() else [None] * len(flat[0].leaves)
        return cls(
            student=flat[0],
            teacher=flat[1].detach() if len(flat) == 2 else None,
            rows=RowSelection(valid, labels, ids, logprobs),
            spec=replace(spec.of_tokens(hidden, valid), difference=difference),
            support=support,
            shared_head=shared,
            vocab=vocab,
            logits_dtype=buffer,
            workspace_bytes=budget,
            gradient_tolerance=None if gradient_tolerance is None else check_tolerance(gradient_tolerance),
            backend=backend,
            shard=None if shard is None else shard.cut(vocab),
            wants=tuple(leaf is not None and leaf.requires_grad for leaf in leaves),
            vocab_ids=own,
        )

    @property
    def tokens(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def trainable(self) -> bool:
        """Return True if the head, its bias or its adapter gets a gradient."""
        return any(self.wants[1:])

    @property
    def stats_dtype(self) -> torch.dtype:
        """Return the dtype of statistics, losses and factors: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.student.hidden.dtype, torch.float32)

    def gemm_dtype(self, side: Side, teacher: bool) -> torch.dtype:
        """Return the dtype of a side's GEMMs; `sides.mixed` says which."""
        own = not teacher or self.shared_head or self.logits_dtype == torch.float64
        return self.student.hidden.dtype if own else side.dtype

    def with_factors(self, factor: Tensor | None, policy_slope: Tensor | None = None) -> Problem:
        return replace(self, rows=replace(self.rows, factor=factor, policy_slope=policy_slope))

    def with_target(self, target: object, form: object, leading: torch.Size, exact: bool) -> Problem:
        """Return the problem with a teacher given as rows (..., V): see `check_target`."""
        columns = self.vocab if self.shard is None else self.shard.stop - self.shard.start
        checked = check_target(target, form, leading, columns, exact and self.vocab_ids is None)
        hidden = self.student.hidden
        expected = f"a tensor on {hidden.device}, as student_hidden"
        expect(checked.values.device == hidden.device, "target", expected, checked.values.device)
        return replace(self, rows=replace(self.rows, target=checked))

    def for_gemms(self) -> Problem:
        """Cut the heads to the columns in use, make rows contiguous, cast biases to the statistics' dtype."""
        scratch: dict[str, Tensor] = {}
        student = self._operands(self.student, scratch)
        if self.teacher is None:
            return replace(self, student=student)
        done = replace(self, student=student, teacher=self._operands(self.teacher, scratch, student))
        if self.teachers is None:
            return done
        sides = tuple(self._operands(side, scratch, student) for side in self.teachers.sides)
        return replace(done, teachers=replace(self.teachers, sides=sides))

    def _operands(self, side: Side, scratch: dict[str, Tensor], student: Side | None = None) -> Side:
        """Return the operands of a side; `student` are those of the student, for a teacher's."""
        columns = self.vocab if self.shard is None else self.shard.stop - self.shard.start
        dtype, device = self.student.hidden.dtype, self.student.hidden.device
        if student is not None and not self.shared_head:
            dtype = self.gemm_dtype(side, True)
        ids = None if student is None else self.vocab_ids
        used: Any = slice(columns) if ids is None else ids
        sliced = side.quantised is not None or ids is not None
        sliced = sliced or (side.weight.dtype, side.weight.device) != (dtype, device)
        hidden, weight = side.hidden, side.weight
        lies = [x.stride(1) == 1 and x.stride(0) >= x.shape[1] for x in (hidden, weight)]
        rows: Any = hidden if lies[0] else hidden.contiguous()
        if (rows.dtype, rows.device) != (dtype, device):
            moved = MovedRows(rows, dtype, device)
            rows = moved if len(moved) else moved[:]
        head: Any = None if student is None or not self.shared_head else student.weight
        if head is None and sliced:
            head = SlicedHead(weight, side.quantised, 0, columns, dtype, device, ids, scratch)
        elif head is None:
            head = (weight if lies[1] else weight.contiguous())[:columns]
        bias = None if side.bias is None else side.bias.to(device)[used].to(self.stats_dtype).contiguous()
        twin = None if student is None or ids is not None else student.bias
        if twin is not None and side.bias is not None and same_storage(side.bias, self.student.bias):
            # One object: the sweeps take a common bias for a linear difference.
            bias = twin
        lora = side.lora
        if student is not None and lora is not None and ids is None and same_adapter(self.student.lora, lora):
            lora = student.lora
        elif lora is not None:
            lora = replace(lora, B=lora.B[used].contiguous())
        return Side(rows, head, bias, lora, side.rows)


@dataclass
class Outputs:
    """Hold the results of all N rows, zeros at invalid ones, and the requested gradients."""

    loss: Tensor  # (N,) nats
    A: Tensor  # (N,) sum of u over the vocabulary: docs/design/mathematics.md
    stats: Tensor  # (N, len(Column))
    # (N, 2) nats: log-probs of the label under student and teacher, 0 without labels; (N, 4) with the
    # log-sum-exps of their logits, for statistics and a z-loss
    logprobs: Tensor | None
    dh: Tensor | None  # (N, H_s)
    dW: Tensor | None  # (rows of the student's whole head, H_s)
    dbias: Tensor | None  # (rows of that head,) float64 during the loop, then of the dtype of the statistics
    dropped: Tensor  # 0-dim: the largest share of a chunk's gradient that was left out
    dA: Tensor | None = None  # (r, H_s), in the dtype of the statistics
    dB: Tensor | None = None  # (rows of that head, r), the same


# ---------------------------------------------------------------- checks


def of_one_side(side: Side, transform: LogitTransform, **arguments: Any) -> Problem:
    """Return the problem of one head: KL(side || uniform), with the options of `Problem.of`."""
    defaults = {"labels": None, "ignore_index": -100, "logits_dtype": "auto", "prefixes": ("", "")}
    spec = RowSpec(Divergence.parse("reverse_kl"), transform, LogitTransform())
    return Problem.of(spec, side, None, **{**defaults, **arguments})


def same_adapter(one: Lora | None, other: Lora | None) -> bool:
    """Return True if both sides have one adapter."""
    if one is None or other is None or one.scaling != other.scaling:
        return False
    if torch.compiler.is_compiling():
        return one.A is other.A and one.B is other.B
    return same_storage(one.A, other.A) and same_storage(one.B, other.B)


def check_tolerance(value: object) -> float:
    """Return `gradient_tolerance`. Raises TypeError or ValueError unless it is a share."""
    tolerance = check_number("gradient_tolerance", value)
    expect(0 <= tolerance < 1, "gradient_tolerance", "None or a share in [0, 1)", tolerance)
    return tolerance


def checked(prefix: str, side: Side, shard: VocabShard | None) -> Side:
    """Return the side with the head of this rank, and with its adapter as a Lora.

    Raises TypeError for an argument that is no dense tensor, ValueError for a DTensor head without a group.
    `prefix` ("student_") starts its name.
    """
    if type(side.weight) is not Tensor:
        held = stored_head(f"{prefix}weight", side.weight)
        if isinstance(held, QuantizedHead):
            side = replace(side, weight=held.values, quantised=held)
    if shard is not None or side.lora is not None:
        head = side.weight, side.bias
        weight, bias = head if shard is None else local_head(prefix, *head, shard)
        side = replace(side, weight=weight, bias=bias, lora=Lora.parse(f"{prefix}lora", side.lora))
    plain = "a plain tensor, or a DTensor with `group`, whose rows are a shard"
    for name, tensor in (("weight", side.weight), ("bias", side.bias)):
        expect(not hasattr(tensor, "placements"), prefix + name, plain, "a DTensor")
    check_tensor(prefix + "hidden", side.hidden)
    check_tensor(prefix + "weight", side.weight)
    if side.bias is not None:
        check_tensor(prefix + "bias", side.bias, "a tensor or None")
    return side


def check_side(prefix: str, side: Side, first: Tensor, name: str) -> None:
    """Check shapes, and dtype, device and leading shape against hidden states `first`, argument `name`."""
    hidden, weight, bias = side.hidden, side.weight, side.bias
    expect(hidden.dim() >= 1, f"{prefix}hidden", "shape (..., H)", tuple(hidden.shape))
    good = weight.dim() == 2 and min(weight.shape) >= 1
    expect(good, f"{prefix}weight", "shape (V, H) with V, H >= 1", tuple(weight.shape))
    expected = f"(..., {weight.shape[1]}), the hidden size of {prefix}weight"
    expect(hidden.shape[-1] == weight.shape[1], f"{prefix}hidden", expected, tuple(hidden.shape))
    leading, other = first.shape[:-1], hidden.shape[:-1]
    expected = f"leading shape {tuple(leading)}, as {name}"
    expect(leading == other, f"{prefix}hidden", expected, tuple(other))
    if bias is not None:
        expect(
            bias.shape == weight.shape[:1], f"{prefix}bias", f"shape ({weight.shape[0]},)", tuple(bias.shape)
        )
    floats = "float64, float32, bfloat16 or float16"
    for part, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None or (part == "weight" and side.quantised is not None):
            continue
        argument = prefix + part
        known = tensor.dtype in DTYPES
        also = ", or a QuantizedHead" if part == "weight" else ""
        expect(known, argument, f"dtype {floats}{also}", tensor.dtype, TypeError)
        # Slices of a frozen head and rows of a teacher are moved.
        moved = prefix == "teacher_" or (part == "weight" and not tensor.requires_grad)
        here = tensor.device == first.device or (moved and not tensor.is_meta)
        expect(here, argument, f"a tensor on {first.device}, as {name}", tensor.device)
    if side.lora is not None:
        side.lora.check(f"{prefix}lora", weight.shape, first.device)


def per_token(name: str, value: Any, leading: torch.Size, device: torch.device) -> Tensor:
    """Return a tensor of one entry per token, flat, contiguous and detached."""
    check_tensor(name, value, "a tensor or None")
    expect(value.shape == leading, name, f"shape {tuple(leading)}, one entry per token", tuple(value.shape))
    expect(value.device == device, name, f"a tensor on {device}, as the hidden states", value.device)
    return value.detach().reshape(-1).contiguous()


def valid_tokens(
    hidden: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    ids: Tensor | None,
    heights: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Return valid, (N,) bool or None for all, and labels, (N,) or None, for hidden states (..., H).

    `ids` are those of the student's head, in a teacher's vocabulary of `heights[1]` tokens where it is known.
    """
    expect(isinstance(ignore_index, int), "ignore_index", "an int", type(ignore_index).__name__, TypeError)
    valid = None
    if labels is not None:
        labels = per_token("labels", labels, hidden.shape[:-1], hidden.device)
        expect(labels.dtype == torch.int64, "labels", "dtype int64", labels.dtype, TypeError)
        valid = labels != ignore_index
        if ids is not None:
            valid, labels = own_labels(ids, labels, valid, heights[1] if len(heights) == 2 else None)
    if mask is not None:
        mask = per_token("mask", mask, hidden.shape[:-1], hidden.device).bool()
        valid = mask if valid is None else valid & mask
    return valid, labels


def check_list(name: str, value: Any, leading: torch.Size) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor (..., K) of tokens (...)."""
    check_tensor(name, value)
    shaped = value.dim() == len(leading) + 1 and value.shape[:-1] == leading and value.shape[-1] >= 1
    if not shaped:  # torch.compile does not trace the text
        expected = f"shape ({', '.join(map(str, leading))}, K) with K >= 1"
        expect(False, name, expected, tuple(value.shape))


def listed_support(
    ids: Any, logprobs: Any, leading: torch.Size, valid: Tensor | None, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ids and log-probs of a teacher's top-k entries, (N, K) each; as columns of the `own` ids.

    Padding, which has log-prob -inf, all entries of invalid tokens, and an id that occurred before in its
    list get id 0 and log-prob -inf.
    """
    for name, value in (("teacher_topk_ids", ids), ("teacher_topk_logprobs", logprobs)):
        check_list(name, value, leading)
    expect(ids.dtype == torch.int64, "teacher_topk_ids", "dtype int64", ids.dtype, TypeError)
    expect(
        logprobs.is_floating_point(),
        "teacher_topk_logprobs",
        "a floating-point tensor",
        logprobs.dtype,
        TypeError,
    )
    expect(
        ids.shape == logprobs.shape,
        "teacher_topk_logprobs",
        f"shape {tuple(ids.shape)}, as teacher_topk_ids",
        tuple(logprobs.shape),
    )
    ids, logprobs = ids.detach().reshape(-1, ids.shape[-1]), logprobs.detach().reshape(-1, ids.shape[-1])
    counted = (logprobs > -torch.inf) if valid is None else (logprobs > -torch.inf) & valid[:, None]
    counted &= ~repeated(torch.where(counted, ids, -1))
    ids, logprobs = torch.where(counted, ids, 0), torch.where(counted, logprobs, -torch.inf)
    return (ids, logprobs) if own is None else own_entries(own, ids, logprobs)


def repeated(ids: Tensor) -> Tensor:
    """Shape (N, K) bool: True where an id occurred before in its row of `ids` (N, K)."""
    in_order, order = ids.sort(dim=1, stable=True)
    again = in_order[:, 1:] == in_order[:, :-1]
    return torch.zeros_like(ids, dtype=torch.bool).scatter(1, order[:, 1:], again)


def vocabulary(V_s: int, V_t: int | None, vocab_size: int | None) -> int:
    """Return the number of columns in use. `V_t` is None for a single head."""
    if vocab_size is None:
        expect(
            V_t in (V_s, None),
            "vocab_size",
            f"a size <= {min(V_s, V_t or V_s)}, since student_weight has {V_s} rows and teacher_weight {V_t}",
            None,
        )
        return V_s
    least = min(V_s, V_t or V_s)
    expect(
        isinstance(vocab_size, int) and not isinstance(vocab_size, bool),
        "vocab_size",
        "an int or None",
        type(vocab_size).__name__,
        TypeError,
    )
    expect(
        1 <= vocab_size <= least,
        "vocab_size",
        f"a size in [1, {least}], the rows of the smaller head",
        vocab_size,
    )
    return vocab_size
