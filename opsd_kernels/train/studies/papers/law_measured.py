"""The measurements of the study of the law, of one size of model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsd_kernels.train.studies.compare import Trained
from opsd_kernels.train.studies.lab import Result
from opsd_kernels.train.studies.probe import Point
from opsd_kernels.train.studies.statistics import resamples


@dataclass(frozen=True)
class Measured:
    """One size of model: the runs by context, and each context's probe (JSON) for each run's base model."""

    hidden: int
    trained: dict[str, Trained]
    probes: dict[str, list[Result]]

    def points(self, gap: str = "gap") -> list[Point]:
        """Return a point per context, the mean over its runs."""
        return [
            Point(name, float(np.mean(self.probed(name, gap))), float(np.mean(runs.gains())), len(runs.runs))
            for name, runs in self.trained.items()
        ]

    def runs(self) -> list[Point]:
        return [
            Point(name, *pair)
            for name, runs in self.trained.items()
            for pair in zip(self.probed(name, "gap"), runs.gains(), strict=True)
        ]

    def probed(self, name: str, value: str) -> list[float]:
        return [probe[value]["value"] for probe in self.probes[name]]

    @property
    def bases(self) -> list[int]:
        return next(iter(self.trained.values())).bases

    def drawn(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return gaps and improvements by context, each (count, C), in bootstrap samples of base models."""
        weights = resamples(self.bases, count)
        gaps = np.transpose([self.probed(name, "gap") for name in self.trained])
        gains = np.transpose([runs.gains() for runs in self.trained.values()])
        return weights @ gaps, weights @ gains
