"""The second half of docs/scaling.md: projections of bench/parallel.py onto large heads and GPUs."""

from __future__ import annotations

import torch

from ...internals import DEFAULT_WORKSPACE_BYTES
from ...parallel import (
    LM_HEADS,
    Machine,
    Projection,
    crossover_tokens,
    gathered_numbers,
    reduced_numbers,
)
from ...report.tables import Table, times
from .assumptions import GIVEN, MEMORY, NODE, gpus
from .report import Measured, figures

CONTEXTS = (8 << 10, 32 << 10, 128 << 10, 1 << 20)
LAYOUTS = {8: ((1, 8), (2, 4), (4, 2), (8, 1)), 64: ((1, 64), (2, 32), (4, 16), (8, 8))}
ALIKE = 0.05  # relative difference below which two cells count as equal
CELL = (LM_HEADS[0], 128 << 10, 8, 8)  # worked step by step

CROSSINGS_HEAD = [
    "head",
    "2 GPUs of a node",
    "8 GPUs of a node",
    "8 GPUs, as data ranks one to a node",
    "whole head, dW and its fp32 sum, GiB",
    "hidden states and dh, KiB a token",
    "tokens of the same size",
]
DOUBT_HEAD = [
    "head",
    "R",
    "rows",
    "used here",
    "planner's model",
    "of GEMM waves filled",
    "ms, as above",
    "ms, by the model",
]


def gibibytes(nbytes: float) -> str:
    """Return GiB to three digits."""
    return f"{nbytes / 2**30:.3g}"


def context(tokens: int) -> str:
    """Return a number of tokens as 8k or 1M."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def cell(made: Projection) -> str:
    """Return milliseconds and GiB of a rank, or that it does not fit."""
    return (
        f"{figures(1e3 * made.seconds)} ms, {gibibytes(made.memory)} GiB"
        if made.memory <= MEMORY.value
        else f"{gibibytes(made.memory)} GiB: too much"
    )


def layouts_table(measured: Measured, count: int) -> Table:
    """Return heads and contexts by layout of `count` GPUs; the fastest that fit in bold."""
    rows = []
    for head in LM_HEADS:
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
    """Return the inputs of the projection with their sources."""
    rows = [[g.what, g.text, f"{g.source}; not measured"] for g in GIVEN]
    for ranks, what in ((1, "the op over its bare GEMMs, one rank"), (2, "the same with a group, any R")):
        used = measured.headline(ranks > 1)
        source = (
            f"measured above on a CPU, N={used[0].N} H={used[0].H}: {', '.join(times(row) for row in used)}"
            + ("; their median, at least the number above" if ranks > 1 else "; at least 1")
        )
        rows.append([what, f"{measured.overhead(ranks):.3f}", source])
    sent = f"{gathered_numbers()} gathered, H + {reduced_numbers(0, narrow=True)} summed"
    planner = f"the planner, CUDA, {DEFAULT_WORKSPACE_BYTES >> 20} MiB of workspace"
    rows.append(["numbers sent per row", sent, "counted above, with labels and bf16 logits"])
    rows.append(["chunks, buffers, peak of a call", "`opsd plan`", planner])
    return Table("", ["input", "value", "source"], rows)


def steps(made: Projection, machine: Machine, overhead: float) -> list[str]:
    """Return the arithmetic of a projection, for a reader to repeat."""
    R, D, n, V, H = made.vocab_ranks, made.data_ranks, made.own_tokens, made.own_vocab, made.head.H
    return [
        f"The rank's share: {made.tokens:,} / {D} = {n:,} tokens and {made.head.V:,} / {R} = {V:,} rows of "
        "the head.",
        f"`opsd plan -N {made.tokens} -V {made.head.V} --hidden {H} --vocab-ranks {R} --data-ranks {D} "
        f"--device cuda`: {made.plan.chunks} chunks of {made.plan.rows} rows, {made.plan.passes} passes, "
        f"peak {made.plan.peak_bytes / 2**30:.3f} GiB above the inputs.",
        f"GEMMs: {made.plan.passes} x 2 x {n:,} x {H} x {V:,} = {made.plan.flops / 1e12:.2f} TFLOP, over "
        f"{machine.rate / 1e12:.1f} TFLOP/s: {1e3 * made.gemms:.3f} ms.",
        f"The rest of the op: {overhead:.3f} - 1 of that: {1e3 * made.rest:.3f} ms.",
        *exchange_steps(made, machine),
        memory_step(made),
    ]


def exchange_steps(made: Projection, machine: Machine) -> list[str]:
    """Return the arithmetic of the collectives, and the sum of all times."""
    R, D, n, V, H = made.vocab_ranks, made.data_ranks, made.own_tokens, made.own_vocab, made.head.H
    parts = (made.gemms, made.rest, made.gather, made.reduce, made.data)
    return [
        f"Statistics: {gathered_numbers()} x 4 B x {n:,} x {R - 1} = {made.gather_bytes / 1e6:.2f} MB at "
        f"{machine.gather.bandwidth / 1e9:.1f} GB/s, and {made.gathers} x {1e6 * machine.gather.latency:.0f} "
        f"µs: {1e3 * made.gather:.3f} ms.",
        f"dh, the labels' log-probs and the logits' constants: ({H} + "
        f"{reduced_numbers(0, narrow=made.plan.centred)}) x 4 B x {n:,} x 2 x {R - 1}/{R} = "
        f"{made.reduce_bytes / 1e6:.1f} MB at {machine.reduce.bandwidth / 1e9:.1f} GB/s, and {made.reduces} "
        f"x {1e6 * machine.reduce.latency:.0f} µs: {1e3 * made.reduce:.3f} ms.",
        f"dW over the data ranks: {V:,} x {H} x 2 B x 2 x {D - 1}/{D} = {made.data_bytes / 1e6:.1f} MB at "
        f"{machine.data.bandwidth / 1e9:.1f} GB/s, and {1e6 * machine.data.latency:.0f} µs: "
        f"{1e3 * made.data:.3f} ms.",
        f"Together {' + '.join(f'{1e3 * part:.3f}' for part in parts)} = **{1e3 * made.seconds:.2f} ms**, "
        f"{made.exchange / made.seconds:.0%} of it exchange.",
    ]


def memory_step(made: Projection) -> str:
    """Return the arithmetic of a rank's memory."""
    n, V, H = made.own_tokens, made.own_vocab, made.head.H
    parts = (made.weight_bytes, made.hidden_bytes, made.plan.peak_bytes, made.wide_bytes)
    weight, hidden, peak, wide = (f"{part / 2**30:.3f} GiB" for part in parts)
    return (
        f"Memory: the shard of the head {V:,} x {H} x 2 B = {weight}; hidden states of both sides 2 x {n:,} "
        f"x {H} x 2 B = {hidden}; the planner's peak, gradients and fp32 dW included, {peak}; a chunk's dh "
        f"in fp32 rather than bf16 {wide}: **{made.memory / 2**30:.2f} GiB**."
    )


def crossings_table() -> Table:
    """Return the tokens of a step at which both ways to split cost the same, and the tensors left whole."""
    rows = []
    for head in LM_HEADS:
        near, far = gpus(1, 8), gpus(8, 8)
        at = [crossover_tokens(head, ranks, machine) for ranks, machine in ((2, near), (8, near), (8, far))]
        weight = head.V * head.H * torch.bfloat16.itemsize
        whole_head = weight + weight + 4 * head.V * head.H
        per_token = (2 + 1) * torch.bfloat16.itemsize * head.H
        cells = [gibibytes(whole_head), f"{per_token / 2**10:.0f}", f"{whole_head / per_token:,.0f}"]
        rows.append([head.name, *(f"{tokens:,.0f}" for tokens in at), *cells])
    return Table("", CROSSINGS_HEAD, rows)


def doubt_table(measured: Measured) -> Table:
    """Return the measured overhead beside that of the planner's model, and the times of a cell by either."""
    rows = []
    for head in LM_HEADS:
        for ranks in sorted({r for layouts in LAYOUTS.values() for r, _ in layouts}):
            made = measured.on_gpus(head, CONTEXTS[1], ranks, 1)
            ms = 1e3 * made.seconds, 1e3 * (made.gemms * made.modelled_overhead + made.exchange)
            ratios = f"{measured.overhead(ranks):.2f}", f"{made.modelled_overhead:.2f}"
            filled = f"{made.plan.tile_share:.0%}"
            cells = [f"{made.own_vocab:,}", *ratios, filled, *(f"{value:.0f}" for value in ms)]
            rows.append([head.name, str(ranks), *cells])
    return Table("", DOUBT_HEAD, rows)


PROJECTED = """## Projected

    seconds = GEMMs x overhead + statistics gathered + dh summed + dW summed

By `project` in `bench/parallel.py`, for the slowest rank, without overlap. The head is trainable, in bf16,
and shared by student and teacher; reverse KL with labels. Tokens are those of one step over all ranks, in one
context or many. Layouts are R x D, vocabulary x data ranks. Collectives use a ring.

### Inputs

{inputs}

### One cell, step by step

{name}, {tokens} tokens on {R} x {D} = {count} GPUs.

{steps}

A teacher with a head of its own needs a second shard, and logits in fp32: {two_gib} GiB in the same place.

### 8 GPUs of one node

Milliseconds of one loss call, forward and backward, and GiB of a rank: its shard of the head, hidden states,
the call with its gradients. No trunk, no optimiser. **Bold**: fits in {memory} and is within {alike:.0%} of
the fastest layout that does; the inputs are not known more precisely.

{node}

### 64 GPUs, 8 to a node

Vocabulary ranks share a node; dW is summed across nodes, by the adapters of all 8 / R GPUs of a node that
hold the same shard. That sum takes about equally long in every column.

{cluster}

### When to split the vocabulary, and when the tokens

The GEMMs are the same either way; the traffic and the tensors that each rank holds whole differ. Vocabulary
ranks send about 4 H bytes per token, data ranks 2 V H bytes once per step: on equal links the two cost the
same near V / 2 tokens, whatever H. The first three columns are the tokens of a step at which they do.

{crossings}

* **Fewer tokens per step: split the vocabulary.** Micro-batches count together if the head's gradient is
  summed after the last of them.
* **More tokens: split the tokens**, as long as each rank has room for the whole head, its gradient and the
  fp32 sum of it. A frozen head has neither gradient nor sum, and data ranks then send nothing.
* **Both, where neither fits.** Splitting the vocabulary does not shrink hidden states: each rank holds those
  of all its tokens. With more tokens than in the last column they are larger than the head, and only data (or
  context) ranks divide them.
* Vocabulary ranks need the fast link: they exchange in every chunk, data ranks once per step.

### Limits of the projection

**The overhead is a CPU's.** A CPU hides the sweeps behind slow GEMMs; on a GPU they are bound by memory. The
planner has a model of a GPU for its own choices: idle multiprocessors and the traffic of logits and dW, with
the assumptions stated in `waves.py`. For {doubt_tokens} tokens on R x 1 it gives:

{doubt}

Take the two as the ends of a range.

* **Merging statistics costs launches.** Each chunk runs a series of small kernels over R x rows numbers. On
  the CPU they are part of *op with group*; on a GPU their launches may delay the sweeps of a narrow shard.
* **Links and latencies are assumed**: one latency for any number of ranks, no other traffic, and no overlap.
  In practice dW is summed during the trunk's backward, and then costs less than here.
* **All ranks are equal here.** With ignored tokens or ragged sequences the rank with the most work sets the
  pace.
* **Only the loss head is counted.** A trunk of this size adds parameters, activations and an optimiser: *too
  much* is certain, a cell that fits here may not fit in training.
* Two processes on one CPU check the arithmetic, not a network of GPUs.
"""


def projected_half(measured: Measured) -> str:
    """Return the second half of the page."""
    head, tokens, R, D = CELL
    made, two = measured.on_gpus(*CELL), measured.on_gpus(*CELL, shared_head=False)
    worked = steps(made, gpus(R, D), measured.overhead(R))
    return PROJECTED.format(
        inputs=inputs_table(measured).markdown(),
        name=head.name,
        tokens=f"{tokens:,}",
        R=R,
        D=D,
        count=R * D,
        steps="\n".join(f"{i}. {text}" for i, text in enumerate(worked, 1)),
        two_gib=gibibytes(two.memory),
        memory=MEMORY.text,
        alike=ALIKE,
        node=layouts_table(measured, 8).markdown(),
        cluster=layouts_table(measured, 64).markdown(),
        crossings=crossings_table().markdown(),
        doubt_tokens=f"{CONTEXTS[1]:,}",
        doubt=doubt_table(measured).markdown(),
    )
