"""Time against the bare GEMMs: the targets, a walk through sizes, divergences and modes, masked tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ...spec import KIND_NAMES
from ..measure.context import Context, Task, describe
from ..measure.rows import compare_providers
from ..providers import SLOW
from ..shapes import MODES, PEER_DIVERGENCES, Setting

# Upper limits of the ratio of forward and backward to the bare GEMMs: on a CPU by (dtype, head), on CUDA by
# hidden size, since the GEMMs grow with H and the sweeps do not.
TARGETS = {
    ("float32", "shared"): 1.10,
    ("float32", "two heads"): 1.10,
    ("bfloat16", "shared"): 1.22,
    ("bfloat16", "two heads"): 1.70,
}
CUDA_TARGETS = ((4096, 1.20), (0, 1.45))  # (at least this hidden size, ratio), bf16, shared head
RATIO_SECONDS = 3.0  # times the usual effort: these numbers are quoted


def target(setting: Setting) -> float | None:
    """Return the upper limit of the ratio at a setting, or None where none is stated."""
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
    """Return tasks with every provider at the shapes of the targets."""

    def task(setting: Setting) -> Task:
        ours_alone = setting.mode == "frozen" and setting.device == "cpu"
        providers = context.only("torch") if ours_alone else context.providers
        # Providers in SLOW compile anew for each setting.
        chosen = [p for p in providers if p.name not in SLOW or setting.divergence == "reverse_kl"]
        effort = context.effort(1.0 if context.quick else RATIO_SECONDS)
        return Task(
            describe(setting),
            partial(compare_providers, "ratios", setting, chosen, target=target(setting), **effort),
        )

    return [task(setting) for setting in _ratio_settings(context)]


def _walk(context: Context) -> Iterator[Setting]:
    """Yield settings around the centre, with one field changed at a time."""
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
    """Return tasks with this package and plain PyTorch, on CUDA also with libraries that do not compile."""
    providers = context.only(
        "torch", *(() if context.device == "cpu" else ("trl", "liger-triton", "liger-chunked"))
    )

    def task(setting: Setting) -> Task:
        return Task(
            describe(setting), partial(compare_providers, "latency", setting, providers, **context.effort())
        )

    return [task(setting) for setting in _walk(context)]


def masked(context: Context) -> list[Task]:
    """Return tasks by share of ignored tokens, against the GEMMs over all tokens."""
    shares = (0.0, 0.5) if context.quick else (0.0, 0.25, 0.5, 0.75, 0.9)
    providers = context.without(*SLOW, "cce")

    def task(setting: Setting) -> Task:
        variant = f"{setting.masked:.0%} masked"
        return Task(
            f"{variant}, {describe(setting)}",
            partial(compare_providers, "masked", setting, providers, variant=variant, **context.effort(0.6)),
        )

    dtypes = context.chosen_dtypes("bfloat16")
    return [
        task(context.setting(shape, dtype, masked=share))
        for shape in context.centre()
        for dtype in dtypes
        for share in shares
    ]
