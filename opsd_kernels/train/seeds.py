"""Random numbers that belong to a place (step, prompt, sample, ...), not to a moment: no order of work can change them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit key for a tuple of non-negative integers; arrays broadcast. SplitMix64 after each part."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            key = _finalise(key + np.asarray(part, dtype=np.uint64) + GOLDEN)
    return np.asarray(key, dtype=np.uint64)


def uniforms(*parts: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) per key. 32 bits, so that u * total stays below total in any rounding."""
    return (mix(*parts) >> np.uint64(32)).astype(np.float64) / 2.0**32


def pick(count: int, *parts: int) -> int:
    """An index below `count`."""
    return int(mix(*parts) % np.uint64(count))


def shuffled(items: Sequence[int], *parts: int) -> list[int]:
    """The items in an order that the key decides."""
    # A stable sort of 64-bit keys: the same order on every platform, which numpy's generators promise only per version.
    order = np.argsort(mix(*parts, np.arange(len(items))), kind="stable")
    return [items[i] for i in order]


# The constants of SplitMix64 (Steele, Lea and Flood, 2014).
def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
