"""Memory by N beside the planner's prediction, and time by N up to where plain PyTorch runs out of memory and four times beyond."""

from __future__ import annotations

from dataclasses import replace

from .. import memory
from ..gate import check
from ..measure import Context, Task, blank, describe, free, timed_row
from ..providers import PROVIDERS, SLOW, Provider
from ..results import Row
from ..shapes import SHAPES, Setting, Shape
from ..timing import reason_of

# On a CPU a narrow head keeps the arithmetic short; memory goes by N x V and V x H all the same.
MEMORY_SHAPE = {True: Shape("memory", 512, 64, 32000), False: Shape("memory", 512, 64, 151936)}
SCALING_SHAPE = {True: Shape("scaling", 256, 64, 16000), False: Shape("scaling", 256, 128, 32000)}
LIMIT = {True: 256 << 20, False: 1 << 30}  # of the op's own memory in a child process on a CPU
BEYOND = STRIDE = 4
MOST_TOKENS = 1 << 21
PLANNED_WITHIN = (
    0.05  # of the peak; and half as much as the math library's scratch, which the planner estimates
)
SLACK_BYTES = 8 << 20


def off_plan(row: Row) -> bool:
    """Whether a peak lies above the planner's prediction by more than the target of docs/performance.md."""
    if row.peak_bytes is None or row.predicted_bytes is None:
        return False
    return row.peak_bytes > row.predicted_bytes * (1 + PLANNED_WITHIN) + SLACK_BYTES


def peak_row(setting: Setting, provider: Provider, limit: int | None) -> Row:
    row = blank("memory", provider.name, setting)
    reason = provider.unsupported(setting)
    if reason is None:
        reason = check(provider, setting).failure
    if reason:
        return replace(row, reason=reason)
    free()
    planned = setting.plan()
    expected = (
        {"predicted_bytes": planned.peak_bytes, "rows": planned.rows}
        if provider.name in memory.PLANNED
        else {}
    )
    try:
        return replace(row, peak_bytes=memory.peak_of(setting, provider.name, limit), **expected)
    except Exception as error:
        free()
        return replace(
            row, reason=str(error) if isinstance(error, memory.OutOfMemory) else reason_of(error), **expected
        )


def memory_suite(context: Context) -> list[Task]:
    if context.device == "cpu":
        shapes, dtypes = (
            context.shapes or (MEMORY_SHAPE[context.quick],),
            ("bfloat16",) if context.quick else ("bfloat16", "float32"),
        )
        factors, limit = (1, 4) if context.quick else (1, 4, 16), LIMIT[False] * (1 if context.quick else 3)
    else:
        shapes, dtypes, factors, limit = (
            context.headline(),
            ("bfloat16",),
            (0.25, 1, 4) if context.quick else (0.25, 1, 4, 16),
            None,
        )
    tasks = []
    for shape in shapes:
        for dtype in context.chosen_dtypes(*dtypes):
            for factor in factors:
                setting = context.setting(replace(shape, N=max(1, int(shape.N * factor))), dtype)
                for p in context.without(*SLOW, "cce"):
                    tasks.append(
                        Task(
                            f"{p.label}, {describe(setting)}", lambda p=p, s=setting: [peak_row(s, p, limit)]
                        )
                    )
    return tasks


# ---------------------------------------------------------------- scaling


def scale_row(setting: Setting, provider: Provider, limit: int | None, effort: dict[str, object]) -> Row:
    row = blank("scaling", provider.name, setting, rows=setting.plan().rows if provider.exact else None)
    reason = provider.unsupported(setting) or check(provider, setting).failure
    if reason:
        return replace(row, reason=reason)
    free()
    try:
        return timed_row(row, memory.time_under_limit(setting, provider.name, limit, **effort), setting)
    except Exception as error:
        free()
        return replace(row, reason=str(error) if isinstance(error, memory.OutOfMemory) else reason_of(error))


def out_of_memory(row: Row) -> bool:
    return "out of memory" in (row.reason or "")


def walk_up(
    first: Setting, provider: Provider, limit: int | None, effort: dict[str, object], last: int | None = None
) -> list[Row]:
    """Rows at N, N * STRIDE, ... until it runs out of memory or, with `last`, until there."""
    rows, N = [], first.N
    while N <= (last or MOST_TOKENS):
        rows.append(scale_row(first.at(N=N), provider, limit, effort))
        if rows[-1].reason:
            break
        N *= STRIDE
    return rows


def scaling(context: Context) -> list[Task]:
    """The end of plain PyTorch decides how far the others go. One task for each provider; plain PyTorch first."""
    on_cpu = context.device == "cpu"
    limit = LIMIT[context.quick] if on_cpu else None
    effort = (
        {"rounds": (2, 3), "seconds": 4.0}
        if context.quick or not on_cpu
        else {"rounds": (3, 5), "seconds": 8.0}
    )
    tasks = []
    for shape in context.shapes or (
        SCALING_SHAPE[context.quick] if on_cpu else replace(SHAPES["qwen3-0.6b"], N=4096),
    ):
        first = context.setting(shape, context.chosen_dtypes("float32" if on_cpu else "bfloat16")[0])
        end: dict[str, int] = {}

        def plain_first(first: Setting = first, end: dict[str, int] = end) -> list[Row]:
            rows = walk_up(first, PROVIDERS["torch"], limit, effort)
            died = [row.N for row in rows if out_of_memory(row)]
            end["N"] = BEYOND * died[0] if died else rows[-1].N
            return rows

        tasks.append(Task(f"plain PyTorch from {describe(first)}", plain_first))
        for p in context.only() if context.quick and on_cpu else context.without(*SLOW, "torch", "cce"):
            tasks.append(
                Task(
                    f"{p.label} from {describe(first)}",
                    lambda p=p, first=first, end=end: walk_up(first, p, limit, effort, end["N"]),
                )
            )
    return tasks
