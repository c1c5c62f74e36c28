"""Rows as tables: the columns of each suite, and each value as text. Shared by the terminal and the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..measure.timing import Sample
from ..providers import LABELS
from .results import Row

NOISY_MARK = "~"
# A ratio whose half-width is above HIDES is printed as HIDDEN.
HIDES, HIDDEN = 0.15, "too noisy"


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        lines = [f"| {' | '.join(self.columns)} |", f"|{' --- |' * len(self.columns)}"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows)])


def milliseconds(sample: Sample | None) -> str:
    """Return the median in milliseconds, to three digits; empty without a sample."""
    return "" if sample is None else f"{sample.median:.3g}" if sample.median < 100 else f"{sample.median:.0f}"


def times(row: Row) -> str:
    """Return the ratio: after `~` if it is not known within 10 %, HIDDEN if not within HIDES."""
    if row.ratio is None:
        return ""
    return (
        HIDDEN
        if row.noise and row.ratio.uncertainty > HIDES
        else f"{NOISY_MARK if row.noise else ''}{row.ratio.median:.2f}"
    )


def mebibytes(nbytes: int | None) -> str:
    """Return MiB without decimals; empty for None."""
    return (
        "" if nbytes is None else f"{nbytes / 2**20:.0f}" if nbytes < 10 << 30 else f"{nbytes / 2**20:,.0f}"
    )


def percent(value: float | None) -> str:
    """Return a share in percent; empty for None."""
    return "" if value is None else f"{value:.2%}" if abs(value) < 0.1 else f"{value:.0%}"


def size(row: Row) -> str:
    """Return the sizes of a row's head."""
    return f"N={row.N} H={row.H} V={row.V}"


def planned_off(row: Row) -> str:
    """Return the relative distance of the predicted peak from the measured one."""
    return (
        ""
        if not row.predicted_bytes or not row.peak_bytes
        else f"{row.predicted_bytes / row.peak_bytes - 1:+.1%}"
    )


def number(value: float | None, digits: str = ".3g") -> str:
    """Return a number to three digits; empty for None."""
    return "" if value is None else format(value, digits)


Column = tuple[str, Callable[[Row], str]]
WHO: list[Column] = [("provider", lambda r: LABELS.get(r.provider, r.provider))]
SETTING: list[Column] = [
    ("size", size),
    ("dtype", lambda r: r.dtype),
    ("head", lambda r: r.head),
    ("mode", lambda r: r.mode),
    ("divergence", lambda r: r.divergence),
]
TIME: list[Column] = [("ms", lambda r: milliseconds(r.ms)), ("ratio", times)]
RATES: list[Column] = [
    ("TFLOP/s", lambda r: number(r.tflops)),
    ("GB/s", lambda r: number(r.gbs)),
    ("of ceiling", lambda r: percent(r.ceiling)),
]
ERRORS: list[Column] = [("gradient error", lambda r: percent(r.gradient_error))]
VERDICT: list[Column] = [("target", lambda r: f"{r.target:.2f} {r.verdict}" if r.verdict else "")]
PEAK: list[Column] = [
    ("peak MiB", lambda r: mebibytes(r.peak_bytes)),
    ("predicted MiB", lambda r: mebibytes(r.predicted_bytes)),
    ("off", planned_off),
]
NOTE: list[Column] = [("note", lambda r: r.reason or r.noise or "")]


def variant(name: str) -> Column:
    """Return the column of the row's variant, under a heading of the suite's own."""
    return name, lambda r: r.variant


COLUMNS: dict[str, tuple[str, list[Column]]] = {
    "ratios": (
        "Forward and backward against the bare GEMMs",
        [*SETTING, *WHO, *TIME, *RATES, *ERRORS, *PEAK, *VERDICT, *NOTE],
    ),
    "latency": ("Time by size, mode and divergence", [*SETTING, *WHO, *TIME, *RATES, *NOTE]),
    "memory": ("Peak memory above the inputs, gradients included", [*SETTING[:2], *WHO, *PEAK, *NOTE]),
    "accuracy": (
        "Error against float64 as the teacher comes nearer",
        [
            variant("case"),
            *SETTING[1:3],
            SETTING[4],
            *WHO,
            *ERRORS,
            ("loss error", lambda r: percent(r.loss_error)),
            *NOTE,
        ],
    ),
    "masked": (
        "Ignored tokens, against the bare GEMMs over all tokens",
        [variant("tokens"), *SETTING[:2], *WHO, *TIME, *NOTE],
    ),
    "weights": (
        "Dialects against a plain tensor of weights",
        [variant("dialect"), *SETTING[:2], SETTING[4], *TIME, *VERDICT, *NOTE],
    ),
    "sweeps": (
        "Row sweeps against the copy bandwidth",
        [
            variant("sweep"),
            *WHO,
            ("rows", lambda r: f"{r.rows} x {r.V}"),
            *SETTING[1:3],
            SETTING[4],
            TIME[0],
            *RATES[1:],
            *NOTE,
        ],
    ),
    "scaling": ("Time by N under a memory limit", [*SETTING[:2], *WHO, *TIME, *NOTE]),
    "sparse": (
        "`gradient_tolerance` on rows of a model, against the bare GEMMs and the exact call",
        [
            SETTING[0],
            SETTING[1],
            SETTING[3],
            *WHO,
            variant("tolerance"),
            ("kept columns", lambda r: percent(r.kept)),
            ("left out", lambda r: number(r.dropped, ".1e")),
            ("error of dh", lambda r: percent(r.gradient_error)),
            ("error of dW", lambda r: percent(r.head_error)),
            *TIME,
            ("of the exact call", lambda r: number(r.exact, ".2f")),
            *VERDICT,
            *NOTE,
        ],
    ),
    "logprobs": (
        "Log-probs of labels, against the bare GEMMs",
        [*SETTING[:2], SETTING[3], *WHO, *TIME, *ERRORS, *NOTE],
    ),
    "forms": (
        "Lists, teachers as rows and cached teachers, against the bare GEMMs",
        [*SETTING[:2], SETTING[3], *WHO, variant("form"), *TIME, *ERRORS, *VERDICT, *NOTE],
    ),
    "heads": (
        "Adapters, several teachers, parts of the vocabulary and quantised heads, against plain heads",
        [*SETTING[:4], variant("heads"), *TIME, *ERRORS, *VERDICT, *NOTE],
    ),
    "step": (
        "Where a training step goes",
        [variant("part"), *SETTING[:2], ("loss head by", WHO[0][1]), TIME[0], ("of the step", times), *NOTE],
    ),
}


def table(suite: str, rows: Iterable[Row]) -> Table:
    """Return the table of a suite, without the columns that are empty throughout."""
    title, columns = COLUMNS[suite]
    chosen = [row for row in rows if row.suite == suite]
    cells = [[show(row) for _, show in columns] for row in chosen]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return Table(title, [columns[i][0] for i in kept], [[line[i] for i in kept] for line in cells])
