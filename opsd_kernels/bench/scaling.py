"""docs/scaling.md from the report of benchmarks/parallel.py: what was measured, and what parallel.py projects from it onto heads and machines not at hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._core.planner import CPU_SCRATCH_BYTES, CPU_SCRATCH_PER_THREAD, DEFAULT_WORKSPACE_BYTES
from ..spec import expect
from .parallel import (
    HEADS,
    Head,
    Link,
    Machine,
    Projection,
    crossover_tokens,
    gathered_numbers,
    project,
    reduced_numbers,
)
from .results import Row, parse_row, where
from .shapes import Setting
from .tables import HIDES, NOISY_MARK, Table, mebibytes, milliseconds, percent, planned_off, size, times
from .timing import NOISY, Sample

REPORT = "parallel.json"
NOT_YET = "# Scaling\n\nNo report exists yet: `python benchmarks/parallel.py --json benchmarks/results/<machine>/parallel.json` writes it.\n"
WAYS = {"vocabulary": "half of the vocabulary each", "data": "half of the tokens each"}
CONTEXTS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)
LAYOUTS = {8: ((1, 8), (2, 4), (4, 2), (8, 1)), 64: ((1, 64), (2, 32), (4, 16), (8, 8))}
ALIKE = 0.05  # relative difference below which neither of two cells is the better
CELL = (HEADS[0], 128 << 10, 8, 8)  # worked step by step


class Given(NamedTuple):
    """A constant of the projection that nothing here has measured."""

    what: str
    value: float
    text: str
    source: str


PEAK = Given(
    "bf16 peak, dense",
    989.4e12,
    "989.4 TFLOP/s",
    "datasheet of the H100 SXM (half of its figure with sparsity)",
)
GEMMS = Given(
    "of it reached by large GEMMs",
    0.74,
    "74 %",
    "assumed: the 730 TFLOP/s of the planner's model (`planner.py`, at TILE)",
)
NVLINK = Given("NVLink, one direction", 450e9, "450 GB/s", "datasheet: 900 GB/s in both")
NETWORK = Given(
    "network adapter of a GPU, one direction",
    50e9,
    "50 GB/s",
    "datasheet of a 400 Gb/s adapter, one for each GPU",
)
REACHED = Given("of a link reached by large collectives", 0.75, "75 %", "assumed")
NEAR = Given("a collective within a node, besides its bytes", 20e-6, "20 µs", "assumed")
FAR = Given("the same across nodes", 50e-6, "50 µs", "assumed")
MEMORY = Given("memory of a GPU", 80 * 2**30, "80 GiB", "datasheet")
NODE = Given("GPUs on one NVLink", 8, "8", "assumed: an HGX board")
GIVEN = (PEAK, GEMMS, NVLINK, NETWORK, REACHED, NEAR, FAR, MEMORY, NODE)
INSIDE = Link(NEAR.value, REACHED.value * NVLINK.value)


def gpus(vocab_ranks: int, data_ranks: int) -> Machine:
    """Vocabulary ranks share a node; data ranks fill it, then others: across nodes their rings leave by the adapters of all GPUs that they have in one."""
    expect(
        NODE.value % vocab_ranks == 0,
        "vocab_ranks",
        f"a divisor of {NODE.value}, for ranks that share a node",
        vocab_ranks,
    )
    adapters = NODE.value // vocab_ranks
    across = Link(FAR.value, REACHED.value * min(adapters * NETWORK.value, NVLINK.value))
    return Machine(
        GEMMS.value * PEAK.value, INSIDE, INSIDE, INSIDE if vocab_ranks * data_ranks <= NODE.value else across
    )


class Measured:
    """A report of benchmarks/parallel.py."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = json.loads(path.read_text())
        self.rows: list[Row] = [parse_row(row) for row in self.data["rows"]]
        self.links = {
            kind: Link(link["latency"], link["bandwidth"]) for kind, link in self.data["links"].items()
        }

    @property
    def where(self) -> str:
        return f"{where(self.data)}. `{self.data['command']}`"

    def of(self, *providers: str) -> list[Row]:
        return [row for row in self.rows if row.provider in providers]

    def whole(self, row: Row) -> Row:
        """The bare GEMMs of one rank that has the whole vocabulary."""
        share = (*_key(row)[1:], row.V)
        return next(
            r
            for r in self.of("gemms")
            if r.variant == "1" and (*_key(r)[1:], -(-r.V // int(row.variant))) == share
        )

    def headline(self, group: bool) -> list[Row]:
        """The op on the whole head, or with the groups of several ranks, in the setting whose sums are the longest: that nearest to a large head."""
        rows = [
            r
            for r in self.of("group" if group else "op")
            if r.dtype == "bfloat16" and r.divergence == "reverse_kl" and (r.variant != "1") == group
        ]
        return [row for row in rows if row.H == max(row.H for row in rows)]

    def overhead(self, vocab_ranks: int) -> float:
        """One number for all groups, which differ by less than a rerun moves them; they do all that one rank does."""
        return max(
            1.0,
            *(
                statistics.median(row.ratio.median for row in self.headline(group))
                for group in (False, True)[: 1 + (vocab_ranks > 1)]
            ),
        )

    @property
    def warning(self) -> str:
        """Of a report that the machine was too busy for."""
        used = [*self.headline(False), *self.headline(True)]
        unknown = sum(bool(row.noise) and row.ratio.uncertainty > HIDES for row in used)
        if not unknown:
            return ""
        load = self.data["machine"]["load_before"]
        return (
            f"**The machine was too busy for its times to be relied on**: a load of {load:.1f} on {self.data['machine']['cores']} cores before the run, and "
            f"{unknown} of the {len(used)} ratios that the projection takes are not known within {2 * HIDES:.0%}.\n\n"
        )

    def on_gpus(self, head: Head, tokens: int, vocab_ranks: int, data_ranks: int, **how: bool) -> Projection:
        return project(
            head,
            tokens,
            vocab_ranks,
            data_ranks,
            gpus(vocab_ranks, data_ranks),
            self.overhead(vocab_ranks),
            **how,
        )

    def predicted(self, run: dict[str, Any], way: str) -> Projection:
        """What the projection says of a run of two processes, from the bare GEMMs of one rank, the op's ratio to them, and the links."""
        setting = Setting(**{name: run[name] for name in ("N", "H", "V", "dtype", "head", "divergence")})
        vocab_ranks, data_ranks = (run["world"], 1) if way == "vocabulary" else (1, run["world"])
        share = setting.at(V=-(-setting.V // vocab_ranks), N=setting.N // data_ranks)
        rate = share.flops / (run["ms"][f"{way} gemms"]["median"] / 1e3)
        machine = Machine(rate, self.links["gather"], self.links["reduce"], self.links["data"], "cpu")
        overhead = max(1.0, run["overheads"][way]["median"])
        return project(
            Head("", setting.H, setting.V), setting.N, vocab_ranks, data_ranks, machine, overhead, dtype=setting.torch_dtype, labels=False,
            shared_head=setting.head == "shared",
        )  # fmt: skip


# ---------------------------------------------------------------- what was measured


def shards_table(measured: Measured) -> Table:
    rows = []
    for gemms in measured.of("gemms"):
        same = {
            r.provider: r
            for r in measured.of("op", "group", "added")
            if (_key(r), r.variant) == (_key(gemms), gemms.variant)
        }
        whole = measured.whole(gemms)
        shrunk = f"{int(gemms.variant) * gemms.ms.median / whole.ms.median:.2f}"
        cells = [
            times(same["op"]),
            times(same["group"]),
            times(same["added"]),
            percent(same["group"].gradient_error),
        ]
        sizes = f"N={gemms.N} H={gemms.H} V={whole.V}"
        rows.append(
            [
                sizes,
                gemms.dtype,
                gemms.divergence,
                gemms.variant,
                f"{gemms.V:,}",
                milliseconds(gemms.ms),
                shrunk,
                *cells,
            ]
        )
    head = [
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
    return Table("", head, rows)


def _key(row: Row) -> tuple[object, ...]:
    """The columns of a shard, and its setting."""
    return row.V, row.N, row.H, row.dtype, row.divergence


def sent_table(measured: Measured) -> Table:
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
    return Table("", ["collective", "latency, µs", "bandwidth, GB/s", "largest miss of the line"], cells)


def peaks_table(measured: Measured) -> Table:
    cells = [
        [size(r), r.variant, mebibytes(r.predicted_bytes), mebibytes(r.peak_bytes), planned_off(r)]
        for r in measured.of("peak")
    ]
    return Table("", ["size of a rank", "R", "planned", "measured", "off"], cells)


def runs_table(measured: Measured) -> Table:
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
    head = [
        "size",
        "two processes with",
        "one process, whole",
        "a share, alone",
        "both shares at once",
        "both, exchanging",
        "predicted",
        "of it exchange",
    ]
    return Table("", [*head, "predicted / measured"], rows)


MEASURED = """# Scaling

Generated by `make docs` from `benchmarks/results/*/parallel.json`. What a rank of the loss head costs when the vocabulary is spread over R ranks and
the tokens over D ([Parallel](parallel.md) says how), measured on a CPU, then projected onto heads and contexts that do not fit there.

**The first half of this page is measured, the second half is arithmetic.** No number under [Projected](#projected) was ever timed. Nothing here has
run on a GPU.

## Measured

One thread per rank. Ratios and noise marks are those of [Performance](performance.md): medians over rounds that run all variants of a size in turn,
over the bare GEMMs of the same shard in the same round; `{noisy}` may move by more than 10 %. Before a size is timed, losses and gradients of all R
shards, put together, pass the gates of the unit tests against the whole vocabulary in float64; *gradient error* is what was left.

{where}

{warning}### One rank's shard

Forward and backward with a shared, trainable head. *rows*: of the head that a rank has. *x R / whole*: R times the GEMMs of the shard over those of
the whole head; above 1, narrow GEMMs lose time. *op*: on the shard as on a smaller vocabulary, over the bare GEMMs of the shard. *op with group*:
with statistics that are merged from R ranks between the sweeps, and dh summed in fp32; here all ranks but one are echoes, so this is all that a rank
computes, without the wire. *group adds*: the last over the one before.

{shards}

### What is sent

fp32 numbers per row of a chunk, counted in the calls of a rank, and the same as `bench/parallel.py` computes. A gathered number goes to R - 1 ranks;
of the sums, dh is the long one. Over data ranks nothing is sent per row: the gradient of the head is summed once a step.

{sent}

A chunk of 4096 rows on 8 ranks, with labels, at H = 8192: {gathered} x 4096 x 4 B x 7 = {gathered_mb:.1f} MB gathered and
{reduced:,} x 4096 x 4 B x 2 x 7/8 = {reduced_mb:.0f} MB summed, of each rank in each direction.

### What a collective costs here

Two gloo processes on the same machine. A line, latency + bytes / bandwidth, through messages of {smallest} to {largest}, fitted to relative errors.

{links}

### Memory of a rank

MiB above the inputs of a rank that has 1/R of the vocabulary, in a process of its own, beside what the planner says for a head of that many rows. It
counts {scratch} MiB of scratch for the math library and the sweeps on two threads, a large part of a small shard.

{peaks}

### The projection held against two processes

Milliseconds. *predicted* is the function that the second half uses, with this machine's constants: the bare GEMMs of a share in one process, the op's
ratio to them, and the lines above. Where the two shares at once take longer than one alone, the cores share caches and memory, which the projection
does not know.

{runs}

{crossing}
"""


def figures(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def message_bytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.0f} KiB"


def crossing(measured: Measured) -> str:
    """Where splitting tokens becomes cheaper than splitting the vocabulary here, and what the runs say."""
    run = measured.data["runs"][0]
    links = measured.links
    at = crossover_tokens(
        Head("", run["H"], run["V"]),
        run["world"],
        Machine(1.0, links["gather"], links["reduce"], links["data"]),
        labels=False,
    )
    sizes = f"H={run['H']} V={run['V']}"
    out = [
        f"By these lines both ways exchange for equally long at {at:,.0f} tokens of this head ({sizes}); with more, splitting tokens is cheaper."
    ]
    for run in measured.data["runs"]:
        costs = {way: run["ms"][way]["median"] - run["ms"][f"{way} apart"]["median"] for way in WAYS}
        said = {way: 1e3 * measured.predicted(run, way).exchange for way in WAYS}
        parts = " and ".join(
            f"{costs[way]:.0f} ms with {WAYS[way]} ({said[way]:.0f} predicted)" for way in WAYS
        )
        out.append(f"At N = {run['N']} exchanging added {parts}.")
    return " ".join(out)


def measured_half(measured: Measured) -> str:
    sizes = [point["bytes"] for point in measured.data["collectives"]]
    gathered, reduced = gathered_numbers(), reduced_numbers(8192)
    return MEASURED.format(
        noisy=NOISY_MARK, where=measured.where, warning=measured.warning, shards=shards_table(measured).markdown(), sent=sent_table(measured).markdown(),
        gathered=gathered, reduced=reduced, gathered_mb=gathered * 4096 * 4 * 7 / 1e6, reduced_mb=reduced * 4096 * 4 * 2 * 7 / 8 / 1e6,
        smallest=message_bytes(min(sizes)), largest=message_bytes(max(sizes)), links=links_table(measured).markdown(),
        scratch=CPU_SCRATCH_BYTES + 2 * CPU_SCRATCH_PER_THREAD >> 20,
        peaks=peaks_table(measured).markdown(), runs=runs_table(measured).markdown(), crossing=crossing(measured),
    )  # fmt: skip


# ---------------------------------------------------------------- what is projected


def gibibytes(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3g}"


def context(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def cell(made: Projection) -> str:
    """Milliseconds and GiB of a rank, or that it does not fit."""
    return (
        f"{figures(1e3 * made.seconds)} ms, {gibibytes(made.memory)} GiB"
        if made.memory <= MEMORY.value
        else f"{gibibytes(made.memory)} GiB: too much"
    )


def layouts_table(measured: Measured, count: int) -> Table:
    """Heads and contexts by (vocabulary ranks x data ranks) of `count` GPUs; the fastest that fit stand out."""
    rows = []
    for head in HEADS:
        for tokens in CONTEXTS:
            made = [measured.on_gpus(head, tokens, *layout) for layout in LAYOUTS[count]]
            best = min((p.seconds for p in made if p.memory <= MEMORY.value), default=0.0)
            cells = [
                f"**{cell(p)}**" if p.memory <= MEMORY.value and p.seconds <= best * (1 + ALIKE) else cell(p)
                for p in made
            ]
            alone = [cell(measured.on_gpus(head, tokens, 1, 1))] if count == NODE.value else []
            rows.append([head.name, context(tokens), *alone, *cells])
    names = [f"{r} x {d}" for r, d in LAYOUTS[count]]
    return Table("", ["head", "tokens", *["one GPU"] * (count == NODE.value), *names], rows)


def inputs_table(measured: Measured) -> Table:
    rows = [[g.what, g.text, f"{g.source}; not measured"] for g in GIVEN]
    for ranks, what in ((1, "the op over its bare GEMMs, one rank"), (2, "the same with a group, any R")):
        used = measured.headline(ranks > 1)
        source = (
            f"measured above on a CPU, N={used[0].N} H={used[0].H}: {', '.join(times(row) for row in used)}"
        )
        rows.append(
            [
                what,
                f"{measured.overhead(ranks):.3f}",
                source + ("; their median, at least the number above" if ranks > 1 else "; at least 1"),
            ]
        )
    rows.append(
        [
            "numbers sent per row",
            f"{gathered_numbers()} gathered, H + {reduced_numbers(0)} summed",
            "counted above, with labels",
        ]
    )
    rows.append(
        [
            "chunks, buffers, peak of a call",
            "`opsd plan`",
            f"the planner, CUDA, {DEFAULT_WORKSPACE_BYTES >> 20} MiB of workspace",
        ]
    )
    return Table("", ["input", "value", "source"], rows)


def steps(made: Projection, machine: Machine, overhead: float) -> list[str]:
    """The arithmetic of a projection, for a reader to redo."""
    R, D, n, V, H, plan = (
        made.vocab_ranks,
        made.data_ranks,
        made.own_tokens,
        made.own_vocab,
        made.head.H,
        made.plan,
    )
    parts = (made.gemms, made.rest, made.gather, made.reduce, made.data)
    memory = (made.weight_bytes, made.hidden_bytes, plan.peak_bytes, made.wide_bytes)
    return [
        f"Its share: {made.tokens:,} / {D} = {n:,} tokens and {made.head.V:,} / {R} = {V:,} rows of the head.",
        f"`opsd plan -N {made.tokens} -V {made.head.V} --hidden {H} --vocab-ranks {R} --data-ranks {D} --device cuda`: {plan.chunks} chunks of "
        f"{plan.rows} rows, {plan.passes} passes, peak {plan.peak_bytes / 2**30:.3f} GiB above the inputs.",
        f"GEMMs: {plan.passes} x 2 x {n:,} x {H} x {V:,} = {plan.flops / 1e12:.2f} TFLOP, over {machine.rate / 1e12:.1f} TFLOP/s: {1e3 * made.gemms:.3f} ms.",
        f"The rest of the op: {overhead:.3f} - 1 of that: {1e3 * made.rest:.3f} ms.",
        f"Statistics: {gathered_numbers()} x 4 B x {n:,} x {R - 1} = {made.gather_bytes / 1e6:.2f} MB at {machine.gather.bandwidth / 1e9:.1f} GB/s, and "
        f"{made.gathers} x {1e6 * machine.gather.latency:.0f} µs: {1e3 * made.gather:.3f} ms.",
        f"dh, and the labels' log-probs: ({H} + {reduced_numbers(0)}) x 4 B x {n:,} x 2 x {R - 1}/{R} = {made.reduce_bytes / 1e6:.1f} MB at "
        f"{machine.reduce.bandwidth / 1e9:.1f} GB/s, and {made.reduces} x {1e6 * machine.reduce.latency:.0f} µs: {1e3 * made.reduce:.3f} ms.",
        f"dW over the data ranks: {V:,} x {H} x 2 B x 2 x {D - 1}/{D} = {made.data_bytes / 1e6:.1f} MB at {machine.data.bandwidth / 1e9:.1f} GB/s, and "
        f"{1e6 * machine.data.latency:.0f} µs: {1e3 * made.data:.3f} ms.",
        f"Together {' + '.join(f'{1e3 * part:.3f}' for part in parts)} = **{1e3 * made.seconds:.2f} ms**, {made.exchange / made.seconds:.0%} of it exchange.",
        f"Memory: the slice {V:,} x {H} x 2 B = {memory[0] / 2**30:.3f} GiB; hidden states of both sides 2 x {n:,} x {H} x 2 B = "
        f"{memory[1] / 2**30:.3f} GiB; the planner's peak, gradients and fp32 dW included, {memory[2] / 2**30:.3f} GiB; a chunk's dh in fp32 rather than "
        f"bf16 {memory[3] / 2**30:.3f} GiB: **{made.memory / 2**30:.2f} GiB**.",
    ]


def crossings_table() -> Table:
    """Tokens of a step at which both ways to split exchange for equally long, and what either way leaves whole."""
    rows = []
    for head in HEADS:
        near, far = gpus(1, 8), gpus(8, 8)
        at = [crossover_tokens(head, ranks, machine) for ranks, machine in ((2, near), (8, near), (8, far))]
        weight = head.V * head.H * torch.bfloat16.itemsize
        held = (weight + weight + 4 * head.V * head.H, (2 + 1) * torch.bfloat16.itemsize * head.H)
        cells = [gibibytes(held[0]), f"{held[1] / 2**10:.0f}", f"{held[0] / held[1]:,.0f}"]
        rows.append([head.name, *(f"{tokens:,.0f}" for tokens in at), *cells])
    ways = ["2 GPUs of a node", "8 GPUs of a node", "8 GPUs, as data ranks one to a node"]
    return Table(
        "",
        [
            "head",
            *ways,
            "whole head, dW and its fp32 sum, GiB",
            "hidden states and dh, KiB a token",
            "tokens that weigh the same",
        ],
        rows,
    )


def doubt_table(measured: Measured) -> Table:
    """The op's ratio to its GEMMs as measured, beside that of the planner's model of a GPU, and what either makes of a cell."""
    rows = []
    for head in HEADS:
        for ranks in sorted({r for layouts in LAYOUTS.values() for r, _ in layouts}):
            made = measured.on_gpus(head, CONTEXTS[1], ranks, 1)
            ms = 1e3 * made.seconds, 1e3 * (made.gemms * made.modelled_overhead + made.exchange)
            ratios = f"{measured.overhead(ranks):.2f}", f"{made.modelled_overhead:.2f}"
            rows.append(
                [
                    head.name,
                    str(ranks),
                    f"{made.own_vocab:,}",
                    *ratios,
                    f"{made.plan.tile_share:.0%}",
                    *(f"{value:.0f}" for value in ms),
                ]
            )
    return Table(
        "",
        [
            "head",
            "R",
            "rows",
            "used here",
            "planner's model",
            "of GEMM waves filled",
            "ms, as above",
            "ms, by the model",
        ],
        rows,
    )


PROJECTED = """## Projected

    seconds = GEMMs x overhead + statistics gathered + dh summed + dW summed

`bench/parallel.py`, function `project`; for the slowest rank, with nothing overlapped. A trainable bf16 head that student and teacher share, reverse
KL, labels; tokens are those of one step over all ranks, be it one context or many; ranks are written R x D, vocabulary x data. Collectives go around
a ring.

### Inputs

{inputs}

### One cell, step by step

{name}, {tokens} tokens on {R} x {D} = {count} GPUs.

{steps}

A teacher with a head of its own takes another slice, and logits in fp32: {two_gib} GiB in the same place.

### 8 GPUs of one node

Milliseconds of one loss call, forward and backward, and GiB of a rank: its slice of the head, hidden states, the call with its gradients. No trunk,
no optimiser. **Bold**: what fits {memory} and is within {alike:.0%} of the fastest that does; the inputs are not known better.

{node}

### 64 GPUs, 8 to a node

Vocabulary ranks share a node; dW is summed across nodes, by the adapters of all 8 / R GPUs of a node that hold the same slice: it takes about as long
in every column.

{cluster}

### When to spread the vocabulary, and when the tokens

The GEMMs are the same either way. What differs is what is sent, and what stays whole in each rank. Vocabulary ranks send some 4 H bytes for each
token, data ranks 2 V H bytes once a step: on equal links the two cost the same near V / 2 tokens, whatever H. The first three columns are the tokens
of a step at which they do.

{crossings}

* **Fewer tokens a step than that: spread the vocabulary.** Micro-batches count together if the head's gradient is summed after the last of them.
* **More: spread the tokens**, as long as each rank has room for the whole head, its gradient and the fp32 sum of it. A frozen head has neither
  gradient nor sum, and data ranks then send nothing at all.
* **Both, where neither fits.** Spreading the vocabulary does not shrink hidden states: each rank has those of all its tokens. Past the last column
  they outweigh the head, and only data (or context) ranks divide them.
* Vocabulary ranks want the fast link: they exchange within every chunk, data ranks once a step.

### Where not to trust it

**The overhead is a CPU's.** Sweeps that a CPU hides behind slow GEMMs are bound by memory on a GPU. The planner has a model of a GPU for its own
choices: idle multiprocessors and the traffic of logits and dW, with assumptions that stand in `planner.py`. For {doubt_tokens} tokens on R x 1 it
says:

{doubt}

Take the two as the ends of a range.

* **Merging statistics costs launches.** For each chunk a row of small kernels runs over R x rows numbers. On the CPU they are in *op with group*; on
  a GPU their launches may stand between the sweeps of a narrow shard.
* **Links and latencies are assumed**, one latency for any number of ranks, no other traffic, and no overlap: dW is usually summed beside the trunk's
  backward, and then costs less than it does here.
* **All ranks are taken as equal.** With ignored tokens or ragged sequences the fullest rank sets the pace.
* **Only the loss head is here.** A trunk of this size has parameters, activations and an optimiser beside it; *too much* is certain, *fits* is not.
* Two processes on one CPU are a check of the arithmetic, not of a network of GPUs.
"""


def projected_half(measured: Measured) -> str:
    head, tokens, R, D = CELL
    made, two = measured.on_gpus(*CELL), measured.on_gpus(*CELL, shared_head=False)
    numbered = "\n".join(
        f"{i}. {text}" for i, text in enumerate(steps(made, gpus(R, D), measured.overhead(R)), 1)
    )
    return PROJECTED.format(
        inputs=inputs_table(measured).markdown(), name=head.name, tokens=f"{tokens:,}", R=R, D=D, count=R * D, steps=numbered,
        two_gib=gibibytes(two.memory), memory=MEMORY.text, alike=ALIKE, node=layouts_table(measured, 8).markdown(),
        cluster=layouts_table(measured, 64).markdown(), crossings=crossings_table().markdown(), doubt_tokens=f"{CONTEXTS[1]:,}",
        doubt=doubt_table(measured).markdown(),
    )  # fmt: skip


def page(results: Path) -> str:
    """docs/scaling.md, from the first machine that has a report."""
    found = sorted(results.glob(f"*/{REPORT}"))
    if not found:
        return NOT_YET
    measured = Measured(found[0])
    return measured_half(measured) + "\n" + projected_half(measured)
