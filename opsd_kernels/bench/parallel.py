"""What one rank of a loss head costs whose vocabulary is spread over R ranks and whose tokens over D: what it sends, its time, its memory. Pure arithmetic.

The constants are arguments. benchmarks/parallel.py measures those that a machine without GPUs can tell; scaling.py writes docs/scaling.md from both.

    seconds = gemms * overhead + statistics gathered + sums of dh + sum of dW

Nothing overlaps, and all ranks work alike. A collective takes a fixed time, and its bytes over the bandwidth of one direction of a link, sent around a ring.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .._core.planner import DEFAULT_WORKSPACE_BYTES, FLOPS_PER_BYTE, ChunkPlan, plan
from .._rows.contract import Column
from ..spec import expect

FP32 = 4  # bytes of what vocabulary ranks exchange


@dataclass(frozen=True)
class Head:
    """An LM head of a model that people train: (V, H), as published in its config."""

    name: str
    H: int
    V: int


HEADS = (
    Head("Llama-3-70B", 8192, 128256),
    Head("Qwen2.5-72B", 8192, 152064),
    Head("Qwen3-235B-A22B", 4096, 151936),
    Head("Llama-3.1-405B", 16384, 128256),
)


@dataclass(frozen=True)
class Link:
    latency: float  # seconds of a collective that carries next to nothing
    bandwidth: float  # bytes per second that a rank sends while it receives as many

    def seconds(self, calls: int, nbytes: float) -> float:
        return calls * self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """A rank's device, and the links of its three collectives."""

    rate: float  # FLOP/s that its GEMMs reach
    gather: Link  # of statistics, between vocabulary ranks
    reduce: Link  # of dh, between vocabulary ranks
    data: Link  # of dW, between data ranks
    device_type: str = "cuda"


# ---------------------------------------------------------------- what is sent


def gathered_numbers(one_sweep: bool = True, statistics: bool = False) -> int:
    """fp32 numbers of a row that every vocabulary rank sends to all others (vocab_parallel.ShardedRows)."""
    return (Column.CLIPPED if statistics else Column.STUDENT_ENTROPY) + 3 * (not one_sweep)


def reduced_numbers(H: int, labels: bool = True) -> int:
    """fp32 numbers of a row that vocabulary ranks add up: dh, and both log-probs of the label."""
    return H + 2 * labels


def chunk_calls(one_sweep: bool = True, labels: bool = True) -> tuple[int, int]:
    """(gathers, sums) of a chunk, whatever its rows."""
    return 1 + (not one_sweep), 1 + labels


def ring_gather(ranks: int, nbytes: float) -> float:
    """Bytes that each rank sends until everyone has the `nbytes` of everyone."""
    return (ranks - 1) * nbytes


def ring_sum(ranks: int, nbytes: float) -> float:
    """Bytes that each rank sends until everyone has the sum of `nbytes`: the parts are scattered, then gathered."""
    return 2 * (ranks - 1) / ranks * nbytes


# ---------------------------------------------------------------- the projection


@dataclass(frozen=True)
class Projection:
    """A rank's share of one call, forward and backward. Times in seconds, sizes in bytes, sent ones in one direction."""

    head: Head
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
    rest: float  # of the op beside its GEMMs: sweeps, dW read and written, merging the ranks' statistics
    gather: float
    reduce: float
    data: float
    weight_bytes: int
    hidden_bytes: int
    wide_bytes: int  # of a chunk's dh, which ranks add up in fp32

    @property
    def seconds(self) -> float:
        return self.gemms + self.rest + self.exchange

    @property
    def exchange(self) -> float:
        return self.gather + self.reduce + self.data

    @property
    def memory(self) -> int:
        """Head, hidden states, and the call's peak above them, its gradients included."""
        return self.weight_bytes + self.hidden_bytes + self.plan.peak_bytes + self.wide_bytes

    @property
    def modelled_overhead(self) -> float:
        """In place of a measured one: the planner's model of a GPU, idle multiprocessors and the traffic of logits and dW on top of the operations."""
        made = self.plan
        return 1 / made.tile_share + FLOPS_PER_BYTE * (made.sweep_bytes + made.head_bytes) / made.flops


def project(
    head: Head,
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
    """`tokens` over `data_ranks`, the rows of a trainable head over `vocab_ranks`. `overhead`: time of the op over that of its GEMMs, on such a shard.

    The slowest rank counts: the one with the most tokens and the widest shard. dW is added up in `dtype`, once.
    """
    for name, value in (("tokens", tokens), ("vocab_ranks", vocab_ranks), ("data_ranks", data_ranks)):
        expect(value >= 1, name, "a number from 1 on", value)
    expect(overhead >= 1, "overhead", "at least 1, for the GEMMs cannot be avoided", overhead)
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
    gathers, reduces = (calls * made.chunks * split for calls in chunk_calls(one_sweep, labels))
    gather_bytes = ring_gather(vocab_ranks, FP32 * n * gathered_numbers(one_sweep))
    reduce_bytes = ring_sum(vocab_ranks, FP32 * n * reduced_numbers(head.H, labels))
    data_bytes = ring_sum(data_ranks, V * head.H * size)
    gemms = made.flops / machine.rate
    return Projection(
        head, tokens, vocab_ranks, data_ranks, n, V, made,
        gathers, reduces, gather_bytes, reduce_bytes, data_bytes,
        gemms=gemms,
        rest=gemms * (overhead - 1),
        gather=machine.gather.seconds(gathers, gather_bytes),
        reduce=machine.reduce.seconds(reduces, reduce_bytes),
        data=machine.data.seconds(int(data_ranks > 1), data_bytes),
        weight_bytes=V * head.H * size * (1 if shared_head else 2),
        hidden_bytes=2 * n * head.H * size,
        wide_bytes=max(FP32 - made.gradient_dtype.itemsize, 0) * made.rows * head.H * split,
    )  # fmt: skip


def crossover_tokens(
    head: Head, ranks: int, machine: Machine, *, dtype: torch.dtype = torch.bfloat16, labels: bool = True
) -> float:
    """Tokens of a step at which splitting them over `ranks` and splitting the vocabulary over them cost the same exchange, by bandwidth alone.

    Vocabulary ranks send so much per token; data ranks send the gradient of the head, once. More tokens: split the tokens.
    """
    per_token = machine.gather.seconds(0, ring_gather(ranks, FP32 * gathered_numbers()))
    per_token += machine.reduce.seconds(0, ring_sum(ranks, FP32 * reduced_numbers(head.H, labels)))
    return machine.data.seconds(0, ring_sum(ranks, head.V * head.H * dtype.itemsize)) / per_token


# ---------------------------------------------------------------- a link, from measurements


def fit_link(points: Iterable[tuple[float, float]]) -> tuple[Link, float]:
    """Of (bytes, seconds): the line whose relative errors have the least squares, and the largest of these errors."""
    # With u = 1 / t and v = x / t, the sum of (latency u + v / bandwidth - 1)^2 is least where two linear equations hold.
    points = list(points)
    expect(len({nbytes for nbytes, _ in points}) >= 2, "points", "at least two sizes", points)
    u, v = [1 / t for _, t in points], [x / t for x, t in points]
    uu, uv, vv = (
        sum(a * b for a, b in zip(left, right, strict=True)) for left, right in ((u, u), (u, v), (v, v))
    )
    determinant = uu * vv - uv * uv
    link = Link((sum(u) * vv - sum(v) * uv) / determinant, determinant / (sum(v) * uu - sum(u) * uv))
    return link, max(abs(link.seconds(1, x) / t - 1) for x, t in points)
