"""Cost of one rank of a loss head over R vocabulary ranks and D data ranks: bytes sent, time, memory.

    seconds = gemms * overhead + statistics gathered + sums of dh + sum of dW

Arithmetic only. Every constant is an argument. benchmarks/parallel.py measures those that a machine without
GPUs can provide; pages/scaling writes docs/scaling.md from both. The model has no overlap and equal ranks. A
collective takes a fixed latency plus its bytes over the bandwidth of one direction of a link, in a ring.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..spec import expect
from .internals import DEFAULT_WORKSPACE_BYTES, FLOPS_PER_BYTE, ChunkPlan, Column, plan

FP32 = 4  # bytes of a number that vocabulary ranks exchange


@dataclass(frozen=True)
class LMHead:
    """The LM head of a published model: hidden size and vocabulary of its config."""

    name: str
    H: int
    V: int


LM_HEADS = (
    LMHead("Llama-3-70B", 8192, 128256),
    LMHead("Qwen2.5-72B", 8192, 152064),
    LMHead("Qwen3-235B-A22B", 4096, 151936),
    LMHead("Llama-3.1-405B", 16384, 128256),
)


@dataclass(frozen=True)
class Link:
    """A collective's cost on one link."""

    latency: float  # seconds of a collective on an empty message
    bandwidth: float  # bytes per second in each direction, while both are busy

    def seconds(self, calls: int, nbytes: float) -> float:
        """Return the time of `calls` collectives that send `nbytes` in all."""
        return calls * self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """A rank's device, and the links of its three collectives."""

    rate: float  # FLOP/s that its GEMMs reach
    gather: Link  # of statistics, between vocabulary ranks
    reduce: Link  # of dh, between vocabulary ranks
    data: Link  # of dW, between data ranks
    device_type: str = "cuda"


# ---------------------------------------------------------------- traffic


def gathered_numbers(one_sweep: bool = True, statistics: bool = False) -> int:
    """Return the number of fp32 statistics of a row that each vocabulary rank sends to every other one."""
    return (Column.CLIPPED if statistics else Column.STUDENT_ENTROPY) + 3 * (not one_sweep)


def reduced_numbers(H: int, labels: bool = True, narrow: bool = False, statistics: bool = False) -> int:
    """Return the number of fp32 values per row that vocabulary ranks sum, or take the largest of.

    They are dh and the label's log-probs. With `narrow`, 16-bit logits, also the constants of both sides that
    these are relative to, and with `statistics` the largest logit and its column of both sides.
    """
    return H + 2 * labels + narrow * (2 + 4 * statistics)


def chunk_calls(
    one_sweep: bool = True, labels: bool = True, narrow: bool = False, statistics: bool = False
) -> tuple[int, int]:
    """Return (all-gathers, all-reduces) per chunk, whatever its rows."""
    return 1 + (not one_sweep), 1 + labels + narrow * (2 + 2 * statistics)


def ring_gather(ranks: int, nbytes: float) -> float:
    """Return the bytes that each rank sends in an all-gather of `nbytes` per rank."""
    return (ranks - 1) * nbytes


def ring_sum(ranks: int, nbytes: float) -> float:
    """Return the bytes that each rank sends in an all-reduce of `nbytes` (reduce-scatter, all-gather)."""
    return 2 * (ranks - 1) / ranks * nbytes


# ---------------------------------------------------------------- the projection


@dataclass(frozen=True)
class Projection:
    """One rank's share of a call, forward and backward. Seconds; bytes; traffic in one direction."""

    head: LMHead
    tokens: int  # of all ranks
    vocab_ranks: int
    data_ranks: int
    own_tokens: int
    own_vocab: int
    plan: ChunkPlan
    gathers: int
    reduces: int
    gather_bytes: float
    reduce_bytes: float
    data_bytes: float
    gemms: float
    # Of the op beside its GEMMs: sweeps, reads and writes of dW, merging the ranks' statistics.
    rest: float
    gather: float
    reduce: float
    data: float
    weight_bytes: int
    hidden_bytes: int
    wide_bytes: int  # of a chunk's dh in fp32, which the ranks sum, beyond its own dtype

    @property
    def seconds(self) -> float:
        """Time of the call."""
        return self.gemms + self.rest + self.exchange

    @property
    def exchange(self) -> float:
        """Time of all collectives."""
        return self.gather + self.reduce + self.data

    @property
    def memory(self) -> int:
        """Head, hidden states, and the call's peak above them, gradients included."""
        return self.weight_bytes + self.hidden_bytes + self.plan.peak_bytes + self.wide_bytes

    @property
    def modelled_overhead(self) -> float:
        """Overhead by the planner's model of a GPU: idle multiprocessors, traffic of logits and dW."""
        made = self.plan
        return 1 / made.tile_share + FLOPS_PER_BYTE * (made.sweep_bytes + made.head_bytes) / made.flops


def project(
    head: LMHead,
    tokens: int,
    vocab_ranks: int,
    data_ranks: int,
    machine: Machine,
    overhead: float,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shared_head: bool = True,
    one_sweep: bool = True,
    labels: bool = True,
) -> Projection:
    """Project a call with `tokens` over `data_ranks` and the rows of a trainable head over `vocab_ranks`.

    `overhead` is the op's time over that of its GEMMs, on such a shard. The projection is that of the slowest
    rank, with the most tokens and the widest shard. dW is summed once, in `dtype`. Raises ValueError for a
    number of tokens or ranks below 1, or an overhead below 1.
    """
    for name, value in (("tokens", tokens), ("vocab_ranks", vocab_ranks), ("data_ranks", data_ranks)):
        expect(value >= 1, name, "at least 1", value)
    expect(overhead >= 1, "overhead", "at least 1, the time of the GEMMs", overhead)
    n, V = -(-tokens // data_ranks), -(-head.V // vocab_ranks)
    made = plan(
        n,
        V,
        head.H,
        dtype=dtype,
        shared_head=shared_head,
        one_sweep=one_sweep,
        device_type=machine.device_type,
        workspace_bytes=DEFAULT_WORKSPACE_BYTES,
    )
    split, size = vocab_ranks > 1, dtype.itemsize
    gathers, reduces = chunk_calls(one_sweep, labels, made.centred)
    # Statistics and log-probs of labels are exchanged by each part of a chunk.
    gathers, reduces = (
        gathers * made.parts * split,
        (reduces * made.chunks + labels * (made.parts - made.chunks)) * split,
    )
    gather_bytes = ring_gather(vocab_ranks, FP32 * n * gathered_numbers(one_sweep))
    reduce_bytes = ring_sum(vocab_ranks, FP32 * n * reduced_numbers(head.H, labels, made.centred))
    data_bytes = ring_sum(data_ranks, V * head.H * size)
    gemms = made.flops / machine.rate
    return Projection(
        head=head,
        tokens=tokens,
        vocab_ranks=vocab_ranks,
        data_ranks=data_ranks,
        own_tokens=n,
        own_vocab=V,
        plan=made,
        gathers=gathers,
        reduces=reduces,
        gather_bytes=gather_bytes,
        reduce_bytes=reduce_bytes,
        data_bytes=data_bytes,
        gemms=gemms,
        rest=gemms * (overhead - 1),
        gather=machine.gather.seconds(gathers, gather_bytes),
        reduce=machine.reduce.seconds(reduces, reduce_bytes),
        data=machine.data.seconds(int(data_ranks > 1), data_bytes),
        weight_bytes=V * head.H * size * (1 if shared_head else 2),
        hidden_bytes=2 * n * head.H * size,
        wide_bytes=max(FP32 - made.gradient_dtype.itemsize, 0) * made.rows * head.H * split,
    )


def crossover_tokens(
    head: LMHead, ranks: int, machine: Machine, *, dtype: torch.dtype = torch.bfloat16, labels: bool = True
) -> float:
    """Return the tokens of a step at which both ways to split exchange equally long, by bandwidth alone.

    Vocabulary ranks send a fixed amount per token, data ranks the gradient of the head once per step. With
    more tokens, splitting the tokens is cheaper. One head serves both sides.
    """
    per_token = machine.gather.seconds(0, ring_gather(ranks, FP32 * gathered_numbers()))
    sums = FP32 * reduced_numbers(head.H, labels, narrow=dtype.itemsize == 2)
    per_token += machine.reduce.seconds(0, ring_sum(ranks, sums))
    return machine.data.seconds(0, ring_sum(ranks, head.V * head.H * dtype.itemsize)) / per_token


# ---------------------------------------------------------------- a link, from measurements


def fit_link(points: Iterable[tuple[float, float]]) -> tuple[Link, float]:
    """Fit a link to (bytes, seconds) by relative least squares; return it and the largest relative error.

    Raises ValueError for points of a single size.
    """
    # With u = 1 / t and v = x / t, the sum of (latency u + v / bandwidth - 1)^2 is minimal at the solution of
    # two linear equations.
    points = list(points)
    expect(len({nbytes for nbytes, _ in points}) >= 2, "points", "at least two sizes", points)
    u, v = [1 / t for _, t in points], [x / t for x, t in points]
    uu, uv, vv = (
        sum(a * b for a, b in zip(left, right, strict=True)) for left, right in ((u, u), (u, v), (v, v))
    )
    determinant = uu * vv - uv * uv
    link = Link((sum(u) * vv - sum(v) * uv) / determinant, determinant / (sum(v) * uu - sum(u) * uv))
    return link, max(abs(link.seconds(1, x) / t - 1) for x, t in points)
