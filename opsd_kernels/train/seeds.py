"""Random numbers as a function of a place (step, prompt, sample, ...), in any order of computation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hash a tuple of non-negative integers into a 64-bit key; arrays broadcast.

    SplitMix64 after each part.
    """
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            key = _finalise(key + np.asarray(part, dtype=np.uint64) + GOLDEN)
    return np.asarray(key, dtype=np.uint64)


def uniforms(*parts: int | np.ndarray) -> np.ndarray:
    """Return a float64 in [0, 1) per key, of 32 bits, so that u * total rounds below total."""
    return (mix(*parts) >> np.uint64(32)).astype(np.float64) / 2.0**32


def pick(count: int, *parts: int) -> int:
    """Return an index below `count`."""
    return int(mix(*parts) % np.uint64(count))


def shuffled(items: Sequence[int], *parts: int) -> list[int]:
    """Return the items in a random order given by the key."""
    # A stable sort of 64-bit keys is the same on every platform; numpy's generators may change by version.
    order = np.argsort(mix(*parts, np.arange(len(items))), kind="stable")
    return [items[i] for i in order]


# The constants of SplitMix64 (Steele, Lea and Flood, 2014).
def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
