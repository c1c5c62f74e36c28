"""Memory by N beside the planner's prediction, and time by N past the end of plain PyTorch.

The second suite goes on to four times the N at which plain PyTorch runs out of memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..measure import memory
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import check
from ..measure.rows import timed_row
from ..measure.timing import reason_of
from ..providers import PROVIDERS, SLOW, Provider
from ..report.results import Row
from ..shapes import SHAPES, Setting, Shape

# On a CPU a narrow head keeps the arithmetic short; memory is still dominated by N x V and V x H.
MEMORY_SHAPE = {True: Shape("memory", 512, 64, 32000), False: Shape("memory", 512, 64, 151936)}
SCALING_SHAPE = {True: Shape("scaling", 256, 64, 16000), False: Shape("scaling", 256, 128, 32000)}
LIMIT = {True: 256 << 20, False: 1 << 30}  # of the op's own memory in a child process on a CPU
BEYOND = STRIDE = 4
MOST_TOKENS = 1 << 21
# A peak is off plan above this share of the prediction, plus SLACK_BYTES, half of the math library's scratch,
# which the planner estimates.
PLANNED_WITHIN = 0.05
SLACK_BYTES = 8 << 20


def off_plan(row: Row) -> bool:
    """Return whether a peak lies above the planner's prediction by more than the target."""
    if row.peak_bytes is None or row.predicted_bytes is None:
        return False
    return row.peak_bytes > row.predicted_bytes * (1 + PLANNED_WITHIN) + SLACK_BYTES


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, memory.OutOfMemory) else reason_of(error)


def peak_row(setting: Setting, provider: Provider, limit: int | None) -> Row:
    """Return the row of one peak, with the planner's prediction."""
    row = blank("memory", provider.name, setting)
    reason = provider.unsupported(setting) or check(provider, setting).failure
    if reason:
        return replace(row, reason=reason)
    free()
    if provider.name in memory.PLANNED:
        planned = setting.plan()
        row = replace(row, predicted_bytes=planned.peak_bytes, rows=planned.rows)
    try:
        return replace(row, peak_bytes=memory.peak_of(setting, provider.name, limit))
    except Exception as error:
        free()
        return replace(row, reason=_reason(error))


def _peak_rows(setting: Setting, provider: Provider, limit: int | None) -> list[Row]:
    return [peak_row(setting, provider, limit)]


def memory_suite(context: Context) -> list[Task]:
    """Return a task for each shape, dtype, N and provider."""
    factors: tuple[float, ...]
    limit: int | None
    if context.device == "cpu":
        shapes = context.shapes or (MEMORY_SHAPE[context.quick],)
        dtypes = ("bfloat16",) if context.quick else ("bfloat16", "float32")
        factors, limit = (1, 4) if context.quick else (1, 4, 16), LIMIT[False] * (1 if context.quick else 3)
    else:
        shapes, dtypes = context.headline(), ("bfloat16",)
        factors, limit = (0.25, 1, 4) if context.quick else (0.25, 1, 4, 16), None
    tasks = []
    for shape in shapes:
        for dtype in context.chosen_dtypes(*dtypes):
            for factor in factors:
                setting = context.setting(replace(shape, N=max(1, int(shape.N * factor))), dtype)
                for p in context.without(*SLOW, "cce"):
                    label = f"{p.label}, {describe(setting)}"
                    tasks.append(Task(label, partial(_peak_rows, setting, p, limit)))
    return tasks


# ---------------------------------------------------------------- scaling


def scale_row(setting: Setting, provider: Provider, limit: int | None, effort: Effort) -> Row:
    """Return the row of one time under a memory limit."""
    row = blank("scaling", provider.name, setting, rows=setting.plan().rows if provider.exact else None)
    reason = provider.unsupported(setting) or check(provider, setting).failure
    if reason:
        return replace(row, reason=reason)
    free()
    try:
        return timed_row(row, memory.time_under_limit(setting, provider.name, limit, **effort), setting)
    except Exception as error:
        free()
        return replace(row, reason=_reason(error))


def walk_up(
    first: Setting, provider: Provider, limit: int | None, effort: Effort, last: int | None = None
) -> list[Row]:
    """Return rows at N, N * STRIDE, ... up to `last`, or until the provider runs out of memory."""
    rows, N = [], first.N
    while N <= (last or MOST_TOKENS):
        rows.append(scale_row(first.at(N=N), provider, limit, effort))
        if rows[-1].reason:
            break
        N *= STRIDE
    return rows


class _Walk:
    """The walks of all providers from one setting."""

    def __init__(self, first: Setting, limit: int | None, effort: Effort) -> None:
        self.first, self.limit, self.effort = first, limit, effort
        self.last = first.N

    def plain_first(self) -> list[Row]:
        """Walk plain PyTorch to its end, and set `last` to BEYOND times that."""
        rows = walk_up(self.first, PROVIDERS["torch"], self.limit, self.effort)
        died = [row.N for row in rows if "out of memory" in (row.reason or "")]
        self.last = BEYOND * died[0] if died else rows[-1].N
        return rows

    def up(self, provider: Provider) -> list[Row]:
        """Walk another provider to `last`."""
        return walk_up(self.first, provider, self.limit, self.effort, self.last)


def scaling(context: Context) -> list[Task]:
    """Return a task for each provider, plain PyTorch first: its end determines how far the others go."""
    on_cpu = context.device == "cpu"
    limit = LIMIT[context.quick] if on_cpu else None
    effort: Effort = {"rounds": (3, 5), "seconds": 8.0}
    if context.quick or not on_cpu:
        effort = {"rounds": (2, 3), "seconds": 4.0}
    narrow = context.quick and on_cpu
    providers = context.only() if narrow else context.without(*SLOW, "torch", "cce")
    default = SCALING_SHAPE[context.quick] if on_cpu else replace(SHAPES["qwen3-0.6b"], N=4096)
    tasks = []
    for shape in context.shapes or (default,):
        first = context.setting(shape, context.chosen_dtypes("float32" if on_cpu else "bfloat16")[0])
        walk = _Walk(first, limit, effort)
        tasks.append(Task(f"plain PyTorch from {describe(first)}", walk.plain_first))
        for p in providers:
            tasks.append(Task(f"{p.label} from {describe(first)}", partial(walk.up, p)))
    return tasks
