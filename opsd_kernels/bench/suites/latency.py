"""Time against the bare GEMMs: the table of targets, the walk through N, V, H, divergences and modes, and the share of masked tokens."""

from __future__ import annotations

from collections.abc import Iterator

from ...spec import KIND_NAMES
from ..measure import Context, Task, compare_providers, describe
from ..providers import SLOW
from ..shapes import MODES, PEER_DIVERGENCES, Setting

# Forward and backward against the bare GEMMs: (device, dtype, head) -> ratio. On CUDA by the hidden size, for the sweeps are paid for by GEMMs of H.
TARGETS = {
    ("float32", "shared"): 1.10,
    ("float32", "two heads"): 1.10,
    ("bfloat16", "shared"): 1.22,
    ("bfloat16", "two heads"): 1.70,
}
CUDA_TARGETS = ((4096, 1.20), (0, 1.45))  # (at least this hidden size, ratio), bf16, shared head
RATIO_SECONDS = 3.0  # times the usual effort: these are the numbers that are quoted


def target(setting: Setting) -> float | None:
    if setting.mode not in ("trainable", "frozen"):
        return None
    if setting.device == "cpu":
        return TARGETS.get((setting.dtype, setting.head))
    return (
        next(limit for least, limit in CUDA_TARGETS if setting.H >= least)
        if (setting.dtype, setting.head) == ("bfloat16", "shared")
        else None
    )


def _ratio_settings(context: Context) -> Iterator[Setting]:
    dtypes = context.chosen_dtypes(*(("float32", "bfloat16") if context.device == "cpu" else ("bfloat16",)))
    for shape in context.headline():
        for dtype in dtypes:
            for divergence in ("reverse_kl", "jsd") if context.quick else PEER_DIVERGENCES:
                yield context.setting(shape, dtype, divergence=divergence)
            if not context.quick:
                yield context.setting(shape, dtype, head="two heads")
                yield context.setting(shape, dtype, mode="frozen")


def ratios(context: Context) -> list[Task]:
    """Every provider at the shapes of the targets."""

    def task(setting: Setting) -> Task:
        providers = (
            context.only("torch")
            if setting.mode == "frozen" and setting.device == "cpu"
            else context.providers
        )
        providers = [
            p for p in providers if p.name not in SLOW or setting.divergence == "reverse_kl"
        ]  # compiled anew for each setting
        effort = context.effort(1.0 if context.quick else RATIO_SECONDS)
        return Task(
            describe(setting),
            lambda: compare_providers("ratios", setting, providers, target=target(setting), **effort),
        )

    return [task(setting) for setting in _ratio_settings(context)]


def _walk(context: Context) -> Iterator[Setting]:
    """One thing changed at a time."""
    factors = (0.25, 4) if not context.quick else (0.25,)
    for shape in context.centre():
        for dtype in context.chosen_dtypes(
            *(("bfloat16",) if context.quick or context.device == "cuda" else ("bfloat16", "float32"))
        ):
            middle = context.setting(shape, dtype)
            yield from (middle.at(mode=mode) for mode in MODES)
            yield from (
                middle.at(divergence=name)
                for name in (PEER_DIVERGENCES if context.quick else KIND_NAMES)
                if name != middle.divergence
            )
            for name in ("N",) if context.quick else ("N", "V", "H"):
                yield from (
                    middle.at(**{name: max(1, int(getattr(middle, name) * factor))}) for factor in factors
                )


def latency(context: Context) -> list[Task]:
    """This package and plain PyTorch; others in the suite `ratios`, or with --provider."""
    providers = context.only(
        "torch", *(() if context.device == "cpu" else ("trl", "liger-triton", "liger-chunked"))
    )

    def task(setting: Setting) -> Task:
        return Task(
            describe(setting), lambda: compare_providers("latency", setting, providers, **context.effort())
        )

    return [task(setting) for setting in _walk(context)]


def masked(context: Context) -> list[Task]:
    """Ignored tokens cost nothing: against the GEMMs over all tokens."""
    shares = (0.0, 0.5) if context.quick else (0.0, 0.25, 0.5, 0.75, 0.9)
    providers = context.without(*SLOW, "cce")

    def task(setting: Setting) -> Task:
        variant = f"{setting.masked:.0%} masked"
        return Task(
            f"{variant}, {describe(setting)}",
            lambda: compare_providers("masked", setting, providers, variant=variant, **context.effort(0.6)),
        )

    dtypes = context.chosen_dtypes("bfloat16")
    return [
        task(context.setting(shape, dtype, masked=share))
        for shape in context.centre()
        for dtype in dtypes
        for share in shares
    ]
