"""Time of heads other than one dense matrix of the rows' dtype, over the same call with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...divergence import linear_divergence
from ...quantized import QuantizedHead
from ...testing import Case, assert_no_worse, assert_on_target, relative_error
from ...testing.heads import quantise, with_dense_heads, with_student_vocab
from ...testing.reference import linear_divergence_reference
from ...testing.reference_rows import linear_divergence_by_index_reference
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import CHECKED_ROWS, TOKENS, Verdict, verdict_of
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave
from ..report.results import Row
from ..shapes import SHAPES, Setting, make_case

RANK, SCALING = 16, 0.5
TEACHERS = 3
PART = 4  # the student has one token in PART
# The size that the limits are stated at, on a CPU.
STATED_AT = SHAPES["cpu"]
HEADS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
Arguments = dict[str, Any]  # of linear_divergence, by name
Op = Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """One call. `change(case)` are the arguments in which it differs from a call with plain heads."""

    name: str
    change: Callable[[Case], Arguments]
    reference: Op = with_dense_heads(linear_divergence_reference)
    limit: float | None = None  # of the ratio to the first form of its group

    def arguments(self, case: Case, setting: Setting) -> Arguments:
        """Return the arguments of the call, leaves among them."""
        plain = dict(zip(HEADS, case.leaves().inputs(), strict=True))
        return {**plain, "divergence": setting.divergence, **self.change(case)}


def _normal(case: Case, *size: int, seed: int) -> Tensor:
    """Return normal numbers in fp32, on the device of the case."""
    device = case.student_hidden.device
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device)


# ---------------------------------------------------------------- what differs from plain heads


def _plain(case: Case) -> Arguments:
    return {}


def _adapter(case: Case) -> Arguments:
    (V, H), dtype = case.student_weight.shape, case.student_weight.dtype
    A, B = _normal(case, RANK, H, seed=2) / H**0.5, _normal(case, V, RANK, seed=3) / RANK**0.5
    return {"student_lora": (A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), SCALING)}


def _several(case: Case) -> Arguments:
    """Return teachers as far from the student as that of the case, each with a head of its own."""
    states, heads = [case.teacher_hidden], [case.teacher_weight]
    for k in range(1, TEACHERS):
        for own, made, far in ((case.student_hidden, states, 0.1), (case.student_weight, heads, 0.05)):
            noise = _normal(case, *own.shape, seed=2 * k + len(made))
            made.append(noise.mul_(far).add_(own).to(own.dtype))
    index = _normal(case, len(case.student_hidden), seed=1).argsort() % TEACHERS
    return {"teacher_hidden": states, "teacher_weight": heads, "teacher_index": index}


def _ids(case: Case) -> Tensor:
    """Return the ids of the student's tokens, in no order."""
    V = len(case.student_weight)
    return _normal(case, V, seed=1).argsort()[: max(1, V // PART)]


def _gathered(case: Case) -> Arguments:
    ids = _ids(case)
    own = case.student_weight[ids].requires_grad_()
    return {"student_weight": own, "teacher_weight": case.teacher_weight[ids]}


def _by_ids(case: Case) -> Arguments:
    ids = _ids(case)
    return {"student_weight": case.student_weight[ids].requires_grad_(), "student_vocab_ids": ids}


def _quantised(case: Case, dtype: torch.dtype, block: tuple[int, int] | None, shared: bool) -> Arguments:
    values, scales, block = quantise(case.teacher_weight.float(), dtype, block)
    head = QuantizedHead(values, scales, None, block)
    return {"teacher_weight": head, **({"student_weight": head} if shared else {})}


def _other_dtype(case: Case) -> Arguments:
    other = torch.float32 if case.teacher_weight.dtype.itemsize == 2 else torch.bfloat16
    return {"teacher_weight": case.teacher_weight.to(other)}


def _quantised_forms(shared: bool) -> tuple[Form, ...]:
    what = "for both sides" if shared else "of the teacher"
    kinds = {
        "int8 by row": (torch.int8, None),
        "float8_e4m3fn by row": (torch.float8_e4m3fn, None),
        "float8_e4m3fn by block of 128 x 128": (torch.float8_e4m3fn, (128, 128)),
    }
    return tuple(
        Form(f"{name}, {what}", partial(_quantised, dtype=dtype, block=block, shared=shared))
        for name, (dtype, block) in kinds.items()
    )


# (head, mode) of the setting, and the calls that are timed in turn; the first is the base of the ratios.
GROUPS: tuple[tuple[str, str, tuple[Form, ...]], ...] = (
    (
        "shared",
        "frozen",
        (
            Form("plain heads", _plain),
            Form("adapter of rank 16", _adapter, limit=1.08),
            *_quantised_forms(True),
        ),
    ),
    (
        "two heads",
        "frozen",
        (
            Form("plain heads", _plain),
            Form("adapter of rank 16", _adapter, limit=1.08),
            *_quantised_forms(False),
            Form("another dtype of the teacher", _other_dtype),
        ),
    ),
    (
        "two heads",
        "trainable",
        (
            Form("plain heads", _plain),
            Form(
                "three teachers by index",
                _several,
                with_dense_heads(linear_divergence_by_index_reference),
                1.05,
            ),
        ),
    ),
    (
        "two heads",
        "trainable",
        (
            Form("a quarter of the tokens, gathered", _gathered),
            Form("a quarter of the tokens, by ids", _by_ids, with_student_vocab(linear_divergence_reference)),
        ),
    ),
)


# ---------------------------------------------------------------- the gate


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    """Return the tensors that get a gradient."""
    A, B, _ = arguments.get("student_lora") or (None, None, None)
    named = {name: arguments[name] for name in HEADS[:2]} | {"A": A, "B": B}
    return {name: x for name, x in named.items() if isinstance(x, Tensor) and x.requires_grad}


def _dense(value: Any, rows: torch.dtype, wide: torch.dtype | None = None) -> Any:
    """Return an argument with dense heads, as the GEMM of `rows` reads them, and floats in `wide`."""
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(part, rows, wide) for part in value)
    value = value.dequantize(rows) if isinstance(value, QuantizedHead) else value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(wide or value.dtype).requires_grad_(value.requires_grad)


def outcome(op: Op, arguments: Arguments) -> dict[str, Tensor]:
    """Return the loss and the gradients by name, of heads and B no more than CHECKED_ROWS rows."""
    leaves = _leaves(arguments)
    rest = {name: value for name, value in arguments.items() if name not in HEADS}
    loss = op(*(arguments[name] for name in HEADS), **rest)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    few = (gradient[:: max(1, len(gradient) // CHECKED_ROWS)].clone() for gradient in gradients)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, few, strict=True)}
    return {"loss": loss.detach(), **named}


def gate(form: Form, setting: Setting, op: Op = linear_divergence) -> Verdict:
    """Compare loss and all gradients of TOKENS tokens with dense float64; errors, or the failure."""

    def run() -> Verdict:
        given, rows = form.arguments(make_case(setting.at(N=TOKENS)), setting), setting.torch_dtype
        wide = {name: _dense(value, rows, torch.float64) for name, value in given.items()}
        ours, truth = outcome(op, given), outcome(form.reference, wide)
        del wide
        if rows.itemsize == 2:
            assert_on_target(ours, truth, "default")
        else:
            same = {name: _dense(value, rows) for name, value in given.items()}
            assert_no_worse(ours, outcome(form.reference, same), truth)
        errors = {name: relative_error(ours[name], exact) for name, exact in truth.items()}
        return Verdict(loss_error=errors.pop("loss"), gradient_error=max(errors.values()))

    return verdict_of(run)


# ---------------------------------------------------------------- the times


def _stepper(form: Form, case: Case, setting: Setting) -> Callable[[], Tensor]:
    """Return a step: forward and backward."""
    arguments = form.arguments(case, setting)
    leaves = list(_leaves(arguments).values())

    def step() -> Tensor:
        loss = linear_divergence(**arguments)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, leaves)[0]

    return step


def compare_heads(setting: Setting, forms: tuple[Form, ...], effort: Effort) -> list[Row]:
    """Return a row for each form, timed in turn; the first is the base, and timed whatever its gate says."""
    base = forms[0].name
    stated = (setting.N, setting.H, setting.V) == (STATED_AT.N, STATED_AT.H, STATED_AT.V)
    limits = stated and setting.device == "cpu"
    rows = []
    for form in forms:
        found = gate(form, setting)
        row = blank("heads", "opsd", setting, variant=form.name, reason=found.failure)
        row = replace(row, gradient_error=found.gradient_error, loss_error=found.loss_error)
        rows.append(replace(row, target=form.limit if limits and not found.failure else None))
    free()
    case = make_case(setting)
    variants = {
        form.name: Variant(_stepper(form, case, setting))
        for form, row in zip(forms, rows, strict=True)
        if row.reason is None or form.name == base
    }
    interleave(variants, base, setting.device, **effort)
    done = [row if row.reason else part_row(row, variants, row.variant, base) for row in rows]
    del variants, case
    free()
    return done


def heads(context: Context) -> list[Task]:
    """Return a task for each shape, dtype and group of forms."""
    dtypes = context.chosen_dtypes(*(("bfloat16",) if context.quick else ("float32", "bfloat16")))
    return [
        Task(
            f"{forms[-1].name}, {describe(setting)}",
            partial(compare_heads, setting, forms, context.effort(4.0)),
        )
        for shape in context.headline()
        for dtype in dtypes
        for head, mode, forms in GROUPS
        for setting in [context.setting(shape, dtype, head=head, mode=mode)]
    ]
