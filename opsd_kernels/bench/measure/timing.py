"""Times of variants run in turn in one process: medians, quartiles, and a verdict on the machine's noise."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

# Half-width of a median's 95 % interval in quartile ranges, times the root of the number of values
# (McGill, Tukey, Larsen 1978).
NOTCH = 1.57
# Relative half-width at which no more rounds are run.
SETTLED = 0.02
# Relative half-width above which a row is marked noisy: two runs that are each off by this much differ by 10
# %.
NOISY = 0.05
# Milliseconds. Page faults after an idle turn cost a longer run less than a tenth: it gets no warm-up run.
LONG = 2500.0
# Above the L2 of every GPU so far (H200: 50 MiB, B200: 126 MiB).
L2_FLUSH_BYTES = 256 << 20

T = TypeVar("T")
Reading = Callable[[], float]  # milliseconds of a run that has been issued


def _few(n: int) -> float:
    """Return Student's 97.5 % quantile (n - 1 degrees of freedom) over the normal one, to 2 % from n = 3."""
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
        """Summarise `values`."""
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
    """One of the calls that are timed in turn.

    `setup` is called before each run, outside the clock. `failure` is the reason for a missing time.
    """

    run: Callable[[], object]
    setup: Callable[[], object] | None = None
    times: dict[int, float] = field(default_factory=dict)  # round -> milliseconds
    failure: str | None = None

    def sample(self) -> Sample:
        """Summarise the times of all rounds."""
        return Sample.of(list(self.times.values()))

    def set_up_and_run(self) -> None:
        """Run once, untimed."""
        if self.setup is not None:
            self.setup()
        self.run()


Clock = Callable[[Variant], Reading]


def cpu_clock(variant: Variant) -> Reading:
    """Run `variant` and read the wall clock around it."""
    start = time.perf_counter()
    variant.run()
    elapsed = 1e3 * (time.perf_counter() - start)
    return lambda: elapsed


class CudaClock:
    """CUDA events around the run, after a write that evicts L2.

    Events are read after the round, so the host may run ahead of the device.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, variant: Variant) -> Reading:
        self._flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant.run()
        stop.record()

        def read() -> float:
            stop.synchronize()
            return start.elapsed_time(stop)

        return read


def clock_for(device: str) -> Clock:
    """Return the clock of a device type."""
    return CudaClock() if device == "cuda" else cpu_clock


def reason_of(error: Exception) -> str:
    """Return the error as one line of a table."""
    text = str(error).strip().splitlines()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]


def _attempt(variant: Variant, action: Callable[[], T]) -> T | None:
    """Return the result of `action`, or record its failure in `variant` and return None.

    Every exception is caught: other libraries raise many types, and each becomes a row of the table.
    """
    try:
        return action()
    except Exception as error:
        variant.failure = reason_of(error)
    gc.collect()  # the traceback held the tensors of the frames
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def _turn(variant: Variant, clock: Clock) -> Reading | None:
    """Time one run, directly after an untimed run of the same variant.

    Variants differ in the size of their workspaces, and a virtual machine takes freed pages back: the first
    run with a larger workspace pays up to 250 ms in page faults.
    """

    def both() -> Reading:
        if not (variant.times and min(variant.times.values()) > LONG):
            variant.set_up_and_run()
        if variant.setup is not None:
            variant.setup()
        return clock(variant)

    return _attempt(variant, both)


def interleave(
    variants: dict[str, Variant], base: str, device: str, *, rounds: tuple[int, int], seconds: float
) -> None:
    """Time `variants` round by round, each once per round, after one warm-up round.

    Runs at least rounds[0] and at most rounds[1] rounds; in between it stops once every ratio to `base` is
    settled or `seconds` have passed. A variant leaves the rounds when its ratio is settled or its share of
    the time is used up; `base` stays to the end.
    """
    clock = clock_for(device)
    for variant in variants.values():
        _attempt(variant, variant.set_up_and_run)
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
        readings: dict[str, Reading | None] = {}
        for name in active:
            start = time.monotonic()
            readings[name] = _turn(variants[name], clock)
            spent[name] += time.monotonic() - start
        for name, read in readings.items():
            # An asynchronous CUDA error surfaces here.
            value = None if read is None else _attempt(variants[name], read)
            if value is not None:
                variants[name].times[turn] = value


def _done(variant: Variant, base: Variant, spent: float, share: float) -> bool:
    """Return whether `variant` needs no more rounds; a noisy one gets up to three times its share."""
    if not base.times:
        return spent > share
    return ratio(variant, base).uncertainty < SETTLED or spent > (
        share if noise(variant, base) is None else 3 * share
    )


def ratio(variant: Variant, base: Variant) -> Sample:
    """Summarise the ratios of times of the same round: a slowdown of the machine affects both."""
    return Sample.of([time / base.times[turn] for turn, time in variant.times.items() if turn in base.times])


def noise(variant: Variant, base: Variant) -> str | None:
    """Return the reason why the ratio is not known within 10 %, or None."""
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
