"""Times of variants that are run in turn in one process: medians, quartiles, and whether the machine was quiet enough to believe them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

NOTCH = 1.57  # half-width of a median's 95 % interval in quartile ranges, times the root of the number of values (McGill, Tukey, Larsen 1978)
SETTLED = 0.02  # relative half-width at which no more rounds are run
NOISY = 0.05  # and above which a row says so: two runs that are each off by this much differ by 10 %
LONG = 2500.0  # milliseconds: a longer run loses less than a tenth to the pages it must have again, and is not run twice for each time
L2_FLUSH_BYTES = 256 << 20  # above the L2 of every GPU so far (H200: 50 MiB, B200: 126 MiB)


def _few(n: int) -> float:
    """Student's 97.5 % quantile at n - 1 degrees of freedom over the normal one, within 2 % from n = 3 on."""
    return 1 + 1.25 / (n - 1) + 1.9 / (n - 1) ** 2 if n > 1 else 1.0


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of `n` values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        quartiles = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(statistics.median(values), quartiles[0], quartiles[2], len(values))

    @property
    def uncertainty(self) -> float:
        """Relative half-width of the median's 95 % interval."""
        return NOTCH * _few(self.n) * (self.q3 - self.q1) / self.n**0.5 / self.median if self.median else 0.0


@dataclass
class Variant:
    """What is timed. `setup` runs before each run and is not timed. `failure` is why there is no time, once there is a reason."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None
    times: dict[int, float] = field(default_factory=dict)  # round -> milliseconds
    failure: str | None = None

    def sample(self) -> Sample:
        return Sample.of(list(self.times.values()))


def cpu_clock(variant: Variant) -> Callable[[], float]:
    start = time.perf_counter()
    variant.run()
    elapsed = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed


class CudaClock:
    """CUDA events around the run, behind a write that evicts L2. Read after the round, so that the host may run ahead of the device."""

    def __init__(self) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, variant: Variant) -> Callable[[], float]:
        self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant.run()
        stop.record()

        def read() -> float:
            stop.synchronize()
            return start.elapsed_time(stop)

        return read


def clock_for(device: str) -> Callable[[Variant], Callable[[], float]]:
    return CudaClock() if device == "cuda" else cpu_clock


def reason_of(error: Exception) -> str:
    """One line for a table."""
    text = str(error).strip().splitlines()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]


def _attempt(variant: Variant, action: Callable[[], object]) -> object:
    """The result, or None and a failure noted. Errors of any kind become rows: a peer may raise what it likes."""
    try:
        return action()
    except Exception as error:
        variant.failure = reason_of(error)
    gc.collect()  # the traceback held the tensors of the frames
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def _turn(variant: Variant, clock: Callable[[Variant], Callable[[], float]]) -> Callable[[], float] | None:
    """One timed run, right after one of its own that is not timed.

    Workspaces differ in size from variant to variant, and a virtual machine gives freed pages back: the first larger one pays up to 250 ms to have them again.
    """

    def both() -> Callable[[], float]:
        if not (variant.times and min(variant.times.values()) > LONG):
            if variant.setup is not None:
                variant.setup()
            variant.run()
        if variant.setup is not None:
            variant.setup()
        return clock(variant)

    return _attempt(variant, both)


def interleave(
    variants: dict[str, Variant], base: str, device: str, *, rounds: tuple[int, int], seconds: float
) -> None:
    """Fills in the times of `variants`, one of each in turn, after a round that is not counted.

    At least rounds[0] rounds and at most rounds[1]; between them until every ratio to `base` is settled or `seconds` are over. A variant that is done, for
    its ratio is settled or it has had its share of the time, leaves the round; `base` stays to the end.
    """
    clock = clock_for(device)
    for variant in variants.values():
        _attempt(variant, variant.run) if variant.setup is None else _attempt(
            variant, lambda v=variant: (v.setup(), v.run())
        )
    began, spent = time.monotonic(), dict.fromkeys(variants, 0.0)
    share = seconds / len(variants)
    for turn in range(rounds[1]):
        enough = turn >= rounds[0]
        active = [
            name
            for name, v in variants.items()
            if v.failure is None
            and not (enough and name != base and _done(v, variants[base], spent[name], share))
        ]
        if enough and (active in ([base], []) or time.monotonic() - began > seconds):
            return
        readings = {}
        for name in active:
            start = time.monotonic()
            readings[name] = _turn(variants[name], clock)
            spent[name] += time.monotonic() - start
        for name, read in readings.items():
            value = (
                None if read is None else _attempt(variants[name], read)
            )  # an asynchronous failure of CUDA shows here
            if value is not None:
                variants[name].times[turn] = value


def _done(variant: Variant, base: Variant, spent: float, share: float) -> bool:
    if not base.times:
        return spent > share
    return ratio(variant, base).uncertainty < SETTLED or spent > (
        share if noise(variant, base) is None else 3 * share
    )


def ratio(variant: Variant, base: Variant) -> Sample:
    """Of the times of the same round: what slows the machine slows both."""
    return Sample.of([time / base.times[turn] for turn, time in variant.times.items() if turn in base.times])


def noise(variant: Variant, base: Variant) -> str | None:
    """Why the ratio is not to be believed within 10 %, or None."""
    paired = [variant.times[turn] / base.times[turn] for turn in sorted(variant.times) if turn in base.times]
    off = Sample.of(paired).uncertainty
    half = len(paired) // 2
    drift = abs(statistics.median(paired[half:]) / statistics.median(paired[:half]) - 1) if half >= 2 else 0.0
    if len(paired) < 3:
        return "fewer than three rounds"
    if off > NOISY:
        return f"the machine was too noisy: the ratio is known within {off:.0%}"
    return (
        f"the machine was too noisy: the ratio moved by {drift:.0%} during the run"
        if drift > 2 * NOISY
        else None
    )
