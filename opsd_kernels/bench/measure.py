"""From a setting and providers to rows: gate, time in turn, ratio to the bare GEMMs, share of the ceiling. Every timing suite goes through here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ..testing import Case
from . import ceilings
from .gate import check
from .memory import PLANNED, cuda_peak
from .providers import BASE, Op, Provider, bare_gemms, stepper
from .providers import WHOLE_ROWS as WHOLE
from .results import Row
from .shapes import DEFAULT_SHAPES, SHAPES, Setting, Shape, make_case
from .timing import Variant, interleave, noise, ratio

# (fewest, most) rounds and seconds of one comparison, by device and whether the run is quick.
EFFORT = {
    ("cpu", True): ((6, 15), 5.0),
    ("cpu", False): ((4, 30), 10.0),
    ("cuda", True): ((8, 30), 2.0),
    ("cuda", False): ((10, 50), 5.0),
}


@dataclass(frozen=True)
class Context:
    """What the user asked for. `shapes` and `dtypes` empty: each suite's own."""

    device: str
    quick: bool
    providers: tuple[Provider, ...]
    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()

    def centre(self) -> tuple[Shape, ...]:
        """The shapes that a suite varies around: on a CPU one whose step takes a fifth of a second."""
        return self.shapes or (
            SHAPES["cpu-quick" if self.device == "cpu" else DEFAULT_SHAPES[self.device, self.quick]],
        )

    def headline(self) -> tuple[Shape, ...]:
        """The shapes of the targets."""
        return self.shapes or (SHAPES[DEFAULT_SHAPES[self.device, self.quick]],)

    def setting(self, shape: Shape, dtype: str = "bfloat16", **rest: object) -> Setting:
        return Setting(shape.N, shape.H, shape.V, dtype, device=self.device, **rest)

    def chosen_dtypes(self, *default: str) -> tuple[str, ...]:
        return self.dtypes or default

    def only(self, *names: str) -> tuple[Provider, ...]:
        return tuple(p for p in self.providers if p.name in names or p.exact)

    def without(self, *names: str) -> tuple[Provider, ...]:
        return tuple(p for p in self.providers if p.name not in names)

    def effort(self, times: float = 1.0) -> dict[str, object]:
        rounds, seconds = EFFORT[self.device, self.quick]
        return {"rounds": rounds, "seconds": seconds * times}


@dataclass(frozen=True)
class Task:
    """One bar of progress: a comparison that yields rows."""

    label: str
    run: Callable[[], list[Row]]


def blank(suite: str, provider: str, setting: Setting, **fields: object) -> Row:
    s = setting
    return Row(suite, provider, s.N, s.H, s.V, s.dtype, s.head, s.mode, s.divergence, **fields)


def describe(setting: Setting) -> str:
    return f"N={setting.N} H={setting.H} V={setting.V} {setting.dtype}, {setting.head}, {setting.mode}, {setting.divergence}"


def free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def compare_providers(
    suite: str,
    setting: Setting,
    providers: Iterable[Provider],
    *,
    rounds: tuple[int, int],
    seconds: float,
    variant: str = "",
    target: float | None = None,
) -> list[Row]:
    """One row for each provider and for the bare GEMMs, timed in turn. `target` is what this package's ratio stands under."""
    refused: dict[str, Row] = {}
    admitted: dict[str, tuple[Provider, Row]] = {}
    for provider in providers:
        row = blank(
            suite, provider.name, setting, variant=variant, target=target if provider.name == "opsd" else None
        )
        reason = provider.unsupported(setting)
        verdict = None if reason else check(provider, setting)
        if reason or verdict.failure:
            refused[provider.name] = replace(row, reason=reason or verdict.failure, target=None)
            continue
        errors = {"gradient_error": verdict.gradient_error, "loss_error": verdict.loss_error}
        admitted[provider.name] = (
            provider,
            replace(row, **errors, rows=setting.plan().rows if provider.exact else None),
        )
    free()
    case = make_case(setting)
    variants = {
        BASE: Variant(bare_gemms(case, setting, setting.plan().rows)),
        "whole": Variant(bare_gemms(case, setting, WHOLE[setting.device])),
    }
    ops = {name: provider.make(setting) for name, (provider, _) in admitted.items()}
    variants |= {name: Variant(stepper(op, case, setting)) for name, op in ops.items()}
    interleave(variants, BASE, setting.device, rounds=rounds, seconds=seconds)
    if setting.device == "cuda":  # on a CPU it takes a process of its own: suite `memory`
        for name, op in ops.items():
            admitted[name] = (
                admitted[name][0],
                with_peak(admitted[name][1], variants[name], op, case, setting),
            )
    rows = [
        blank(suite, BASE, setting, variant=variant, rows=setting.plan().rows),
        blank(suite, "whole", setting, variant=variant),
    ]
    rows += [row for _, row in admitted.values()]
    done = [timed_row(row, variants, setting) for row in rows]
    del variants, case
    free()
    return done + list(refused.values())


def with_peak(row: Row, variant: Variant, op: Op, case: Case, setting: Setting) -> Row:
    """The row with the op's peak memory, over leaves whose gradients are not there yet."""
    if variant.failure is not None:
        return row
    try:
        peak = cuda_peak(stepper(op, case, setting))
    except torch.OutOfMemoryError:  # it has run, beside fewer gradients of others
        free()
        return row
    return replace(
        row, peak_bytes=peak, predicted_bytes=setting.plan().peak_bytes if row.provider in PLANNED else None
    )


def timed_row(row: Row, variants: dict[str, Variant], setting: Setting) -> Row:
    """The row with its times, or with the reason why it has none."""
    mine, base, whole = variants[row.provider], variants[BASE], variants.get("whole")
    if mine.failure or not mine.times:
        return replace(row, reason=mine.failure or "not measured", target=None)
    sample = mine.sample()
    seconds = sample.median / 1e3
    common = {"ms": sample, "tflops": setting.flops / seconds / 1e12, "gbs": setting.bytes / seconds / 1e9}
    if not base.times:
        return replace(row, **common, noise=f"no ratio: the bare GEMMs failed: {base.failure}", target=None)
    known = None if row.provider == BASE else noise(mine, base)
    share = ceilings.ceiling(setting).floor_seconds(setting.flops, setting.bytes) / seconds
    relative = ratio(mine, whole).median if whole and whole.times.keys() & mine.times.keys() else None
    return replace(
        row, **common, ratio=ratio(mine, base), base=BASE, whole=relative, noise=known, ceiling=share
    )


def part_row(row: Row, variants: dict[str, Variant], name: str, base: str) -> Row:
    """The row of a variant with its time and its ratio to that of `base`, or with the reason why it has none."""
    mine, whole = variants[name], variants[base]
    if mine.failure or not mine.times or not whole.times:
        return replace(row, reason=mine.failure or whole.failure or "not measured", target=None)
    return replace(
        row,
        ms=mine.sample(),
        ratio=ratio(mine, whole),
        base=base,
        noise=None if name == base else noise(mine, whole),
    )
