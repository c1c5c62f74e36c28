"""Time of lists, teachers given as rows, and cached teachers, over the GEMMs that they cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cached import cache_forward_kl, linear_cached_forward_kl
from ...logprobs import linear_logprobs_at, linear_topk
from ...spec import Divergence
from ...testing import Case, assert_no_worse, assert_on_target, evaluate
from ...testing.reference import linear_divergence_reference, reference_divergence
from ...testing.reference_lists import linear_logprobs_at_reference, linear_topk_reference
from ...topk import linear_divergence_to
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import TOKENS, Verdict, errors_of, verdict_of
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave
from ..providers import BASE, WHOLE_ROWS, bare_gemms, stepper
from ..report.results import Row
from ..shapes import Setting, make_case

K = 64
# Upper limits of the ratio on a CPU.
TARGETS = {"list": 1.15, "target in place": 1.08, "cached": 1.08}
Op = Callable[..., Any]  # in the signature of linear_divergence, of tensors


@dataclass(frozen=True)
class Form:
    """One way to hold a teacher. `make(case)` prepares what the clock leaves out, and returns the op."""

    name: str
    mode: str
    make: Callable[[Case], Op]
    reference: Callable[[Case], Op]


def _rows(case: Case, dtype: torch.dtype, probs: bool = False) -> Tensor:
    """Return the teacher's rows, rounded once: rows of an fp32 product round like plain PyTorch's."""
    logits = case.teacher_hidden.double() @ case.teacher_weight.double().T
    return (logits.softmax(-1) if probs else logits).to(dtype)


def _to(case: Case, dtype: torch.dtype = torch.float32, probs: bool = False) -> Op:
    target, form = _rows(case, dtype, probs), "probs" if probs else "logits"
    return lambda h, W, *_, **options: linear_divergence_to(h, W, target, target_is=form)


def _by_ids(case: Case) -> Op:
    """Return the op on columns in another order, which must be gathered."""
    target, V = _rows(case, torch.float32), case.student_weight.shape[0]
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(0)).to(target.device)
    target = target[:, ids.argsort()]
    return lambda h, W, *_, **options: linear_divergence_to(h, W, target, student_vocab_ids=ids)


def _to_reference(case: Case, dtype: torch.dtype = torch.float32, probs: bool = False) -> Op:
    """Return the dense divergence from the rounded rows."""
    rows = _rows(case, dtype, probs).to(torch.promote_types(case.student_hidden.dtype, torch.float32))
    rows, kind = rows.log() if probs else rows, Divergence.parse("reverse_kl")
    return lambda h, W, *_, **options: reference_divergence(
        h.to(rows.dtype) @ W.to(rows.dtype).T, rows, kind
    ).mean()


def _cached(case: Case) -> Op:
    cache = cache_forward_kl(case.teacher_hidden, case.teacher_weight, case.student_weight)
    return lambda h, W, *_, **options: linear_cached_forward_kl(h, W, cache)


def _cached_reference(case: Case) -> Op:
    return lambda *heads, **options: linear_divergence_reference(*heads, divergence="forward_kl")


def _ids(case: Case) -> Tensor:
    N, V = case.student_hidden.shape[0], case.student_weight.shape[0]
    return (torch.arange(N * K, device=case.student_hidden.device) * 7919 % V).view(N, K)


FORMS = (
    Form(
        "list",
        "statistics",
        lambda case: lambda h, W, *_, **options: linear_topk(h, W, K).logprobs,
        lambda case: lambda h, W, *_, **options: linear_topk_reference(h, W, K)[1],
    ),
    Form(
        "at ids",
        "statistics",
        lambda case: lambda h, W, *_, **options: linear_logprobs_at(h, W, _ids(case)),
        lambda case: lambda h, W, *_, **options: linear_logprobs_at_reference(h, W, _ids(case)),
    ),
    Form("target in place", "trainable", _to, _to_reference),
    Form(
        "bf16 target",
        "trainable",
        partial(_to, dtype=torch.bfloat16),
        partial(_to_reference, dtype=torch.bfloat16),
    ),
    Form(
        "target of probabilities", "trainable", partial(_to, probs=True), partial(_to_reference, probs=True)
    ),
    Form("target by ids", "trainable", _by_ids, _to_reference),
    Form("target in place", "frozen", _to, _to_reference),
    Form("cached", "frozen", _cached, _cached_reference),
)


def gate(form: Form, setting: Setting) -> Verdict:
    """Compare loss and gradients of TOKENS tokens with dense float64; errors, or the failure."""

    def run() -> Verdict:
        case = make_case(setting.at(N=TOKENS))
        # The rows of the truth are those that the op reads, rounded alike.
        ours, truth = evaluate(form.make(case), case), evaluate(form.reference(case.double()), case.double())
        if form.name == "cached" and setting.torch_dtype.itemsize == 2:
            # Its gradient is less exact near the teacher (linear_cached_forward_kl): shown, not gated.
            assert_on_target(ours.value(), truth.value(), "default")
        elif form.name == "cached":
            assert_on_target(ours, truth, "fp32_logits")
        elif setting.dtype == "float32":
            assert_no_worse(ours, evaluate(form.reference(case), case), truth)
        else:
            assert_on_target(ours, truth, "default")
        return errors_of(ours, truth)

    return verdict_of(run)


def compare_forms(setting: Setting, effort: Effort) -> list[Row]:
    """Return a row for the bare GEMMs, and one for each form of the setting's mode, timed in turn."""
    case = make_case(setting)
    variants = {BASE: Variant(bare_gemms(case, setting, WHOLE_ROWS[setting.device], teacher=False))}
    rows = [blank("forms", BASE, setting)]
    for form in (form for form in FORMS if form.mode == setting.mode):
        target = TARGETS.get(form.name) if setting.device == "cpu" else None
        row, found = blank("forms", "opsd", setting, variant=form.name), gate(form, setting)
        if found.failure is not None:
            rows.append(replace(row, reason=found.failure))
            continue
        variants[form.name] = Variant(stepper(form.make(case), case, setting))
        row = replace(row, gradient_error=found.gradient_error, loss_error=found.loss_error)
        rows.append(replace(row, target=target))
    interleave(variants, BASE, setting.device, **effort)
    done = [row if row.reason else part_row(row, variants, row.variant or BASE, BASE) for row in rows]
    del variants, case
    free()
    return done


def _settings(context: Context) -> Iterator[Setting]:
    dtypes = context.chosen_dtypes(*(("bfloat16",) if context.quick else ("float32", "bfloat16")))
    for shape in context.headline():
        for dtype in dtypes:
            for mode in ("statistics", "trainable", "frozen"):
                yield context.setting(shape, dtype, mode=mode)


def forms(context: Context) -> list[Task]:
    """Return a task for each shape, dtype and mode."""
    return [
        Task(f"forms, {describe(s)}", partial(compare_forms, s, context.effort(3.0)))
        for s in _settings(context)
    ]
