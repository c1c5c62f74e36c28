"""The first half of docs/scaling.md: what benchmarks/parallel.py measured on a CPU."""

from __future__ import annotations

from ...internals import CPU_SCRATCH_BYTES, CPU_SCRATCH_PER_THREAD
from ...measure.timing import NOISY, Sample
from ...parallel import LMHead, Machine, crossover_tokens, gathered_numbers, reduced_numbers
from ...report.tables import NOISY_MARK, Table, mebibytes, milliseconds, percent, planned_off, size, times
from .report import WAYS, Measured, figures, shard_key

SHARDS_HEAD = [
    "size",
    "dtype",
    "divergence",
    "R",
    "rows",
    "bare GEMMs, ms",
    "x R / whole",
    "op",
    "op with group",
    "group adds",
    "gradient error",
]
RUNS_HEAD = [
    "size",
    "two processes with",
    "one process, whole",
    "a share, alone",
    "both shares at once",
    "both, exchanging",
    "predicted",
    "of it exchange",
    "predicted / measured",
]


def message_bytes(nbytes: float) -> str:
    """Return a message size in MiB or KiB."""
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.0f} KiB"


def shards_table(measured: Measured) -> Table:
    """Return the table of one rank's shard, by setting and number of ranks."""
    rows = []
    for gemms in measured.of("gemms"):
        same = {
            r.provider: r
            for r in measured.of("op", "group", "added")
            if (shard_key(r), r.variant) == (shard_key(gemms), gemms.variant)
        }
        whole = measured.whole(gemms)
        assert gemms.ms is not None and whole.ms is not None
        rows.append(
            [
                f"N={gemms.N} H={gemms.H} V={whole.V}",
                gemms.dtype,
                gemms.divergence,
                gemms.variant,
                f"{gemms.V:,}",
                milliseconds(gemms.ms),
                f"{int(gemms.variant) * gemms.ms.median / whole.ms.median:.2f}",
                times(same["op"]),
                times(same["group"]),
                times(same["added"]),
                percent(same["group"].gradient_error),
            ]
        )
    return Table("", SHARDS_HEAD, rows)


def sent_table(measured: Measured) -> Table:
    """Return the table of the numbers that a rank sends per row."""
    rows = []
    for found in measured.data["exchanges"]:
        kinds = {
            kind: " + ".join(f"{numbers:g}" for at, numbers in found["per_row"] if at == kind)
            for kind in ("gather", "reduce")
        }
        reduced = kinds["reduce"].replace(str(found["H"]), "H")
        asked = " and ".join(name for name in ("labels", "statistics") if found[name]) or "the loss"
        rows.append([found["divergence"], asked, kinds["gather"], reduced, str(len(found["per_row"]))])
    return Table("", ["divergence", "asked for", "gathered", "summed", "collectives of a chunk"], rows)


def links_table(measured: Measured) -> Table:
    """Return the table of the lines fitted to the collectives."""
    what = {
        "gather": "all-gather, fp32: statistics",
        "reduce": "all-reduce, fp32: dh",
        "data": "all-reduce, bf16: dW",
    }
    found = measured.data["links"]
    cells = [
        [what[k], f"{1e6 * link['latency']:.0f}", f"{link['bandwidth'] / 1e9:.2f}", percent(link["off"])]
        for k, link in found.items()
    ]
    return Table("", ["collective", "latency, µs", "bandwidth, GB/s", "largest error of the line"], cells)


def peaks_table(measured: Measured) -> Table:
    """Return the table of planned and measured peaks of a rank."""
    cells = [
        [size(r), r.variant, mebibytes(r.predicted_bytes), mebibytes(r.peak_bytes), planned_off(r)]
        for r in measured.of("peak")
    ]
    return Table("", ["size of a rank", "R", "planned", "measured", "off"], cells)


def runs_table(measured: Measured) -> Table:
    """Return the table of runs of two processes beside their projections."""
    rows = []
    for run in measured.data["runs"]:
        ms = {name: Sample(**sample) for name, sample in run["ms"].items()}
        for way, text in WAYS.items():
            taken, alone, made = ms[way], ms[f"{way} alone"], measured.predicted(run, way)
            mark = NOISY_MARK if max(taken.uncertainty, alone.uncertainty) > NOISY else ""
            cells = [ms["whole"], alone, ms[f"{way} apart"], taken]
            predicted = [
                figures(1e3 * made.seconds),
                figures(1e3 * made.exchange),
                f"{mark}{1e3 * made.seconds / taken.median:.2f}",
            ]
            rows.append(
                [f"N={run['N']} H={run['H']} V={run['V']}", text, *map(milliseconds, cells), *predicted]
            )
    return Table("", RUNS_HEAD, rows)


def crossing(measured: Measured) -> str:
    """Return the crossover of the two ways to split on this machine, and the exchange that the runs show."""
    run = measured.data["runs"][0]
    links = measured.links
    at = crossover_tokens(
        LMHead("", run["H"], run["V"]),
        run["world"],
        Machine(1.0, links["gather"], links["reduce"], links["data"]),
        labels=False,
    )
    out = [
        f"By these lines both ways exchange equally long at {at:,.0f} tokens of this head (H={run['H']} "
        f"V={run['V']}); with more tokens, splitting the tokens is cheaper."
    ]
    for run in measured.data["runs"]:
        costs = {way: run["ms"][way]["median"] - run["ms"][f"{way} apart"]["median"] for way in WAYS}
        said = {way: 1e3 * measured.predicted(run, way).exchange for way in WAYS}
        parts = " and ".join(
            f"{costs[way]:.0f} ms with {WAYS[way]} ({said[way]:.0f} predicted)" for way in WAYS
        )
        out.append(f"At N = {run['N']} the exchange added {parts}.")
    return " ".join(out)


MEASURED = """# Scaling

Generated by `make docs` from `benchmarks/results/*/parallel.json`. The cost of one rank of the loss head,
with the vocabulary over R ranks and the tokens over D ([Parallel](parallel.md) explains how): measured on a
CPU, then projected onto heads and contexts that do not fit there.

**The first half of this page is measured, the second half is arithmetic.** No number under
[Projected](#projected) was ever timed. Nothing here has run on a GPU.

## Measured

One thread per rank. Ratios and noise marks are those of [Performance](performance.md): medians over rounds
that run all variants of a size in turn, over the bare GEMMs of the same shard in the same round; `{noisy}`
may move by more than 10 % in a rerun. Before a size is timed, losses and gradients of all R shards together
pass the gates of the unit tests against the whole vocabulary in float64; *gradient error* is the largest
error.

{where}

{warning}### One rank's shard

Forward and backward with a shared, trainable head.

* *rows*: rows of the head that a rank holds.
* *x R / whole*: R times the GEMMs of the shard over those of the whole head. Above 1, narrow GEMMs lose time.
* *op*: the op on the shard alone, as on a smaller vocabulary, over the bare GEMMs of the shard.
* *op with group*: the same with statistics merged over R ranks between the sweeps, and dh summed in fp32. The
  group is emulated in one process, so this is the whole computation of a rank, without the wire.
* *group adds*: *op with group* over *op*.

{shards}

### Traffic

fp32 numbers per row of a chunk, counted in the collectives of a rank; the same as `bench/parallel.py`
computes. A gathered number goes to R - 1 ranks; among the sums, dh dominates. Data ranks send nothing per
row: they sum the gradient of the head once per step.

{sent}

These calls have fp32 logits. 16-bit ones add two reductions of one number each, the constants of a row that
student and teacher logits are relative to, and with statistics two of two numbers each, the largest logit and
its column of both sides.

A chunk of 4096 rows on 8 ranks, with labels, at H = 8192: {gathered} x 4096 x 4 B x 7 = {gathered_mb:.1f} MB
gathered and {reduced:,} x 4096 x 4 B x 2 x 7/8 = {reduced_mb:.0f} MB summed, per rank and direction.

### Cost of a collective

Two gloo processes on the same machine. Each line, latency + bytes / bandwidth, is fitted to messages of
{smallest} to {largest} by relative errors.

{links}

### Memory of a rank

MiB above the inputs of a rank that holds 1/R of the vocabulary, in a process of its own, beside the planner's
prediction for a head of that many rows. The prediction counts {scratch} MiB of scratch for the math library
and the sweeps on two threads, a large part of a small shard.

{peaks}

### The projection against two processes

Milliseconds. *predicted* is the function behind the second half, with this machine's constants: the bare
GEMMs of a share in one process, the op's ratio to them, and the lines above. Where both shares at once take
longer than one alone, the cores share caches and memory bandwidth, which the projection does not model.

{runs}

{crossing}
"""


def measured_half(measured: Measured) -> str:
    """Return the first half of the page."""
    sizes = [point["bytes"] for point in measured.data["collectives"]]
    gathered, reduced = gathered_numbers(), reduced_numbers(8192)
    return MEASURED.format(
        noisy=NOISY_MARK,
        where=measured.where,
        warning=measured.warning,
        shards=shards_table(measured).markdown(),
        sent=sent_table(measured).markdown(),
        gathered=gathered,
        reduced=reduced,
        gathered_mb=gathered * 4096 * 4 * 7 / 1e6,
        reduced_mb=reduced * 4096 * 4 * 2 * 7 / 8 / 1e6,
        smallest=message_bytes(min(sizes)),
        largest=message_bytes(max(sizes)),
        links=links_table(measured).markdown(),
        scratch=CPU_SCRATCH_BYTES + 2 * CPU_SCRATCH_PER_THREAD >> 20,
        peaks=peaks_table(measured).markdown(),
        runs=runs_table(measured).markdown(),
        crossing=crossing(measured),
    )
