"""The options of `opsd bench`, and the tasks and blank rows that suites make from them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from ..providers import Provider
from ..report.results import Row
from ..shapes import DEFAULT_SHAPES, SHAPES, Setting, Shape


class Effort(TypedDict):
    """Keyword arguments of `timing.interleave`: (fewest, most) rounds, and seconds of one comparison."""

    rounds: tuple[int, int]
    seconds: float


# By device and whether the run is quick.
EFFORT = {
    ("cpu", True): ((6, 15), 5.0),
    ("cpu", False): ((4, 30), 10.0),
    ("cuda", True): ((8, 30), 2.0),
    ("cuda", False): ((10, 50), 5.0),
}


@dataclass(frozen=True)
class Context:
    """The options of one run. Empty `shapes` or `dtypes` leave the choice to each suite."""

    device: str
    quick: bool
    providers: tuple[Provider, ...]
    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()

    def centre(self) -> tuple[Shape, ...]:
        """Return the shapes that a suite varies around: on a CPU one whose step takes a fifth of a second."""
        return self.shapes or (
            SHAPES["cpu-quick" if self.device == "cpu" else DEFAULT_SHAPES[self.device, self.quick]],
        )

    def headline(self) -> tuple[Shape, ...]:
        """Return the shapes that the targets are stated at."""
        return self.shapes or (SHAPES[DEFAULT_SHAPES[self.device, self.quick]],)

    def setting(self, shape: Shape, dtype: str = "bfloat16", **rest: Any) -> Setting:
        """Return the setting of `shape` on this device; `rest` are further fields of Setting."""
        return Setting(shape.N, shape.H, shape.V, dtype, device=self.device, **rest)

    def chosen_dtypes(self, *default: str) -> tuple[str, ...]:
        """Return the dtypes that the user named, else `default`."""
        return self.dtypes or default

    def only(self, *names: str) -> tuple[Provider, ...]:
        """Return this package's providers and those named."""
        return tuple(p for p in self.providers if p.name in names or p.exact)

    def without(self, *names: str) -> tuple[Provider, ...]:
        """Return all providers but those named."""
        return tuple(p for p in self.providers if p.name not in names)

    def effort(self, times: float = 1.0) -> Effort:
        """Return rounds and seconds of one comparison, the seconds multiplied by `times`."""
        rounds, seconds = EFFORT[self.device, self.quick]
        return {"rounds": rounds, "seconds": seconds * times}


@dataclass(frozen=True)
class Task:
    """One comparison, which returns rows; one step of the progress bar."""

    label: str
    run: Callable[[], list[Row]]


def blank(suite: str, provider: str, setting: Setting, **fields: Any) -> Row:
    """Return a row without a measurement; `fields` are further fields of Row."""
    s = setting
    return Row(suite, provider, s.N, s.H, s.V, s.dtype, s.head, s.mode, s.divergence, **fields)


def describe(setting: Setting) -> str:
    """Return the setting as one line of progress."""
    return (
        f"N={setting.N} H={setting.H} V={setting.V} {setting.dtype}, {setting.head}, {setting.mode}, "
        f"{setting.divergence}"
    )


def free() -> None:
    """Return memory of dropped tensors to the allocator."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
