"""What `gradient_tolerance` saves and costs on rows of a model: kept columns, errors, time.

The rows are captured from SmolLM2-135M-Instruct, with its own head of 49152 tokens, and with one of 262144
that `captured.widened` makes of it. A quick run, and one with `--shape`, takes synthetic rows with peaked
distributions: their kept shares say nothing about models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...divergence import linear_divergence
from ...testing import Case, Outcome, evaluate, relative_error
from ...testing.reference import linear_divergence_reference
from ..measure import captured
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import Verdict, check, check_tolerance, part_of
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave, ratio, reason_of
from ..providers import BASE, PROVIDERS, Op, Provider, bare_gemms, stepper
from ..report.results import Row
from ..shapes import Setting, Shape, make_case

TOLERANCES: dict[str, float | None] = {"exact": None, "3e-4": 3e-4, "1e-3": 1e-3, "3e-3": 3e-3}
EXACT, STATED = "exact", "1e-3"  # the call that is compared with; the tolerance that LIMITS are stated at
N, H, VOCABULARY, WIDE = 1024, 576, 49152, 262144
CHUNK_ROWS = (256, 1024)
SYNTHETIC = Shape("peaked", 256, 64, 8000)
PEAKED = 3.0  # times the hidden states of `make_case`: at 1 no column of a chunk is small
# Upper limits of the ratio to the bare GEMMs on captured rows, in chunks of the planner's choice.
LIMITS = {
    ("float32", "trainable", VOCABULARY): 0.80,
    ("bfloat16", "trainable", VOCABULARY): 0.90,
    ("float32", "frozen", VOCABULARY): 0.85,
    ("bfloat16", "frozen", VOCABULARY): 0.95,
    ("float32", "trainable", WIDE): 0.65,
}
SLICE = 1 << 15  # rows of dW
TRUTH_BYTES = 64 << 20  # of float64 logits of one side at a time
AMPLE_BYTES = 1 << 36  # of workspace, for a call that is to be one chunk


@dataclass(frozen=True)
class Group:
    """One comparison: a setting in chunks of `rows`. `real`: on captured rows."""

    setting: Setting
    real: bool
    rows: int
    peers: tuple[Provider, ...]

    @property
    def trained(self) -> Setting:
        """The setting of the truth, which is shared by both dtypes and modes."""
        return self.setting.at(dtype="bfloat16", mode="trainable")

    def row(self, provider: str, name: str) -> Row:
        """Return a row without a measurement; its variant names a tolerance and the rows of a chunk."""
        variant = f"{name}, {self.rows} rows a chunk".removeprefix(", ")
        return blank("sparse", provider, self.setting, variant=variant, rows=self.rows)


@functools.lru_cache(maxsize=1)
def rows_of(setting: Setting, real: bool) -> Case:
    """Return hidden states and head in bf16, which wider dtypes hold as they are."""
    if not real:
        case = make_case(setting)
        hidden, teacher = PEAKED * case.student_hidden, PEAKED * case.teacher_hidden
        return replace(case, student_hidden=hidden, teacher_hidden=teacher)
    rows, head = captured.cached_rows(setting.N), captured.head()
    if setting.V > len(head):
        head = captured.widened(head, rows["student_hidden"], setting.V)
    case = Case(rows["student_hidden"], head, rows["teacher_hidden"], head, upstream=1.0)
    return replace(case.to(setting.device), trainable=("student_hidden", "student_weight"))


def case_of(group: Group) -> Case:
    """Return the inputs in the dtype of the group's setting."""
    case, dtype = rows_of(group.trained, group.real), group.setting.torch_dtype
    head = case.student_weight.to(dtype)
    return replace(
        case,
        student_hidden=case.student_hidden.to(dtype),
        teacher_hidden=case.teacher_hidden.to(dtype),
        student_weight=head,
        teacher_weight=head,
        trainable=case.trainable if group.setting.trainable else ("student_hidden",),
    )


@functools.lru_cache(maxsize=1)
def truth_of(setting: Setting, real: bool) -> Outcome:
    """Return mean loss, dh and dW in float64, summed over slices of the rows."""
    case = rows_of(setting, real).double()
    tokens, step = setting.N, max(1, TRUTH_BYTES // (8 * setting.V))
    op = functools.partial(linear_divergence_reference, divergence=setting.divergence, reduction="sum")
    dh, dW = torch.empty_like(case.student_hidden), torch.zeros_like(case.student_weight)
    loss = torch.zeros((), dtype=torch.float64, device=dh.device)
    for start in range(0, tokens, step):
        at = slice(start, start + step)
        found = evaluate(op, replace(part_of(case, at), upstream=1 / tokens))
        assert found.student_hidden is not None and found.student_weight is not None
        loss += found.loss / tokens
        dh[at] = found.student_hidden
        dW += found.student_weight
    return Outcome(loss, dh, dW)


@functools.cache
def tolerance_verdict(setting: Setting, real: bool, tolerance: float) -> Verdict:
    """Return the verdict of the gate, which is that of a trainable head."""
    return check_tolerance(setting, case_of(Group(setting, real, setting.N, ())), tolerance)


def budget_of(setting: Setting, rows: int, tolerance: float | None) -> int | None:
    """Return the smallest workspace in which chunks hold `rows` rows, or None if there is none."""

    def planned(budget: int) -> int:
        try:
            return setting.plan(workspace_bytes=budget, gradient_tolerance=tolerance).rows
        except ValueError:  # the budget does not hold a row
            return 0

    low, high = 1, AMPLE_BYTES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if planned(middle) >= rows else (middle + 1, high)
    return low if planned(low) == rows else None


def kept_share(group: Group, case: Case, tolerance: float) -> float:
    """Return the share of the columns that enter the backward GEMMs, the mean over the chunks.

    Each chunk is a call of its own with a trainable head. The rows of dW that are zero were left out, and the
    choice depends on the chunk's gradient alone.
    """
    options: dict[str, Any] = {"divergence": group.setting.divergence, "workspace_bytes": AMPLE_BYTES}
    shares = []
    for start in range(0, group.setting.N, group.rows):
        chunk = replace(part_of(case, slice(start, start + group.rows)), trainable=("student_weight",))
        found = evaluate(linear_divergence, chunk, gradient_tolerance=tolerance, **options)
        assert found.student_weight is not None
        shares.append(found.student_weight.ne(0).any(1).double().mean().item())
    return sum(shares) / len(shares)


def head_error(actual: Tensor, truth: Tensor) -> float:
    """Return `relative_error` of (V, H) tensors, in slices: float64 copies would take gigabytes."""
    pairs = zip(actual.split(SLICE), truth.split(SLICE), strict=True)
    off = sum((a.double() - t).square().sum().item() for a, t in pairs)
    return (off / sum(t.square().sum().item() for t in truth.split(SLICE))) ** 0.5


def with_errors(row: Row, found: Outcome, truth: Outcome) -> Row:
    """Return the row with its errors against float64."""
    assert found.student_hidden is not None and truth.student_hidden is not None
    row = replace(
        row,
        gradient_error=relative_error(found.student_hidden, truth.student_hidden),
        loss_error=relative_error(found.loss, truth.loss),
    )
    if found.student_weight is None or truth.student_weight is None:
        return row
    return replace(row, head_error=head_error(found.student_weight, truth.student_weight))


def own_row(group: Group, case: Case, name: str, budget: int) -> Row:
    """Return the row of this package at a tolerance, all but its time; with a reason if a gate fails."""
    setting, tolerance = group.setting, TOLERANCES[name]
    row = group.row("opsd", name)
    reason = check(PROVIDERS["opsd"], setting).failure
    if reason is None and tolerance is not None:
        reason = tolerance_verdict(setting.at(mode="trainable"), group.real, tolerance).failure
    if reason is not None:
        return replace(row, reason=reason)
    options: dict[str, Any] = {"divergence": setting.divergence, "workspace_bytes": budget}
    found = evaluate(linear_divergence, case, gradient_tolerance=tolerance, return_stats=True, **options)
    stats: Any = found.stats
    row = with_errors(row, found, truth_of(group.trained, group.real))
    if tolerance is None:
        return replace(row, kept=1.0)
    planned = group.real and group.rows == setting.plan(gradient_tolerance=tolerance).rows and name == STATED
    return replace(
        row,
        dropped=stats.gradient_dropped.item(),
        kept=kept_share(group, case, tolerance),
        target=LIMITS.get((setting.dtype, setting.mode, setting.V)) if planned else None,
    )


def peer_row(group: Group, case: Case, provider: Provider) -> Row:
    """Return the row of another implementation, all but its time."""
    row = blank("sparse", provider.name, group.setting, variant=EXACT)
    reason = provider.unsupported(group.setting) or check(provider, group.setting).failure
    if reason is not None:
        return replace(row, reason=reason)
    try:
        found = evaluate(provider.make(group.setting), case)
    except Exception as error:
        return replace(row, reason=reason_of(error))
    return with_errors(row, found, truth_of(group.trained, group.real))


def call(setting: Setting, tolerance: float | None, budget: int) -> Op:
    """Return this package's op at a tolerance."""

    def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"divergence": setting.divergence, "workspace_bytes": budget}
        loss = linear_divergence(h, W, t, Wt, gradient_tolerance=tolerance, **options)
        assert isinstance(loss, Tensor)
        return loss

    return op


def compare_tolerances(group: Group, effort: Effort) -> list[Row]:
    """Return rows of the bare GEMMs, of this package at each tolerance, and of peers, timed in turn."""
    setting = group.setting
    refused = group.row("opsd", EXACT)
    budgets = {name: budget_of(setting, group.rows, tolerance) for name, tolerance in TOLERANCES.items()}
    if group.real and captured.missing():
        return [replace(refused, reason=captured.missing())]
    known = {name: budget for name, budget in budgets.items() if budget is not None}
    if len(known) < len(TOLERANCES):
        most = setting.plan(workspace_bytes=AMPLE_BYTES).rows
        return [replace(refused, reason=f"no such chunks: the planner's hold {most} rows at most")]
    case = case_of(group)
    rows = {BASE: group.row(BASE, "")}
    rows |= {name: own_row(group, case, name, known[name]) for name in TOLERANCES}
    rows |= {p.name: peer_row(group, case, p) for p in group.peers}
    free()
    ops = {name: call(setting, tolerance, known[name]) for name, tolerance in TOLERANCES.items()}
    ops |= {p.name: p.make(setting) for p in group.peers if rows[p.name].reason is None}
    variants = {BASE: Variant(bare_gemms(case, setting, group.rows))}
    variants |= {
        name: Variant(stepper(op, case, setting)) for name, op in ops.items() if rows[name].reason is None
    }
    interleave(variants, BASE, setting.device, **effort)
    done = [timed(row, variants, name) if name in variants else row for name, row in rows.items()]
    del variants, case
    free()
    return done


def timed(row: Row, variants: dict[str, Variant], name: str) -> Row:
    """Return the row with its time, and the ratios to the bare GEMMs and to the exact call."""
    row, exact = part_row(row, variants, name, BASE), variants.get(EXACT)
    if row.ms is None or exact is None or not exact.times.keys() & variants[name].times.keys():
        return row
    return replace(row, exact=ratio(variants[name], exact).median)


def sparse(context: Context) -> list[Task]:
    """Return a task for each vocabulary, dtype, mode and number of chunk rows.

    Peers run in the planner's own chunk rows of a trainable head, at the smaller vocabulary.
    """
    real = not (context.quick or context.shapes)
    shapes = context.shapes or (SYNTHETIC,)
    if real:
        shapes = (Shape("captured", N, H, VOCABULARY), Shape("widened", N, H, WIDE))
    others = tuple(p for p in context.providers if not p.exact and p.same_loss)
    tasks = []
    for shape in shapes:
        for dtype in context.chosen_dtypes("float32", "bfloat16"):
            for mode in ("trainable", "frozen"):
                setting = context.setting(shape, dtype, mode=mode)
                sizes = CHUNK_ROWS if real else (shape.N,)
                for rows in sizes:
                    served = mode == "trainable" and rows == setting.plan().rows and shape.V != WIDE
                    group = Group(setting, real, rows, others if served else ())
                    label = f"{rows} rows a chunk, {describe(setting)}"
                    effort = context.effort(0.2 if context.quick else 3.0)
                    tasks.append(Task(label, functools.partial(compare_tolerances, group, effort)))
    return tasks
