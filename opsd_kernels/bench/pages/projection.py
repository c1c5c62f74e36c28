"""The projection side of a chunk on a GPU: bytes and launches of its forms, in the planner's cost model.

The table of docs/design/projection.md. As there, a GEMM's operands cost no time beside its multiplications,
and what it adds to or writes does. The least is not counted: 16-bit logits written and read once, a 16-bit dW
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..internals import (
    DEFAULT_WORKSPACE_BYTES,
    FLOPS_PER_BYTE,
    ChunkPlan,
    Products,
    plan,
    row_bytes,
    whole_waves,
)
from ..report.tables import Table

TOKENS, V, DTYPE = 8192, 151936, torch.bfloat16
ITEMSIZE = DTYPE.itemsize
HEADS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {"H_student": 4096},
    "Qwen3-0.6B": {"H_student": 1024},
    "Qwen3-8B, frozen": {"H_student": 4096, "trainable_head": False},
}
# Operations of a GPU in the time of a launch that does little: 3 us at the planner's 730 TFLOP/s. Assumed.
LAUNCH_FLOPS = 2_200_000_000
# Launches with labels, which a test counts: to stack the rows of a part, of a GEMM, to fill a part's buffer
# with constants; to find the constants of a chunk, without the products at likely columns and labels; of
# those, per slice.
STACK, GEMM, FILL, FIND, FIND_SLICE = 4, 1, 2, 28, 4
# Of rows of the head gathered at once; columns per row, a likely one and the label
SLICE_ENTRIES, LABELLED = 1 << 22, 2


class Cost(NamedTuple):
    """Launches of a call, and bytes beyond the least."""

    launches: int
    nbytes: int


class Head:
    """A head with its plan, and the sizes that the forms need."""

    def __init__(self, name: str) -> None:
        self.sizes = HEADS[name]
        self.H, self.trainable = self.sizes["H_student"], self.sizes.get("trainable_head", True)
        self.weight_bytes = ITEMSIZE * V * self.H
        self.side_bytes = ITEMSIZE * V * TOKENS  # logits of one side, of all chunks
        # Half of an fp32 dW is charged to the budget, but leaves the logits as many bytes.
        half = self.weight_bytes * self.trainable
        self.half, self.room = half, max(DEFAULT_WORKSPACE_BYTES - half, min(DEFAULT_WORKSPACE_BYTES, half))
        self.plan = self.planned()

    def planned(self, share: float = 1.0) -> ChunkPlan:
        """Return the plan where the logits have `share` times the bytes of the default budget."""
        room = int(share * self.room)
        budget = room if room <= self.half else room + self.half
        return plan(TOKENS, V, **self.sizes, device_type="cuda", workspace_bytes=budget)

    def whole_rows(self) -> int:
        """Return the rows of a chunk that is not projected in parts."""
        most = self.room // row_bytes(V, self.H, self.H, DTYPE, DTYPE, device_type="cuda")
        gemms = Products(V, self.H, self.H, True, True, self.trainable)
        return whole_waves(TOKENS, most, gemms, 4) if self.trainable else self.plan.rows

    def find(self, rows: int) -> int:
        """Return the launches that find the constants of `rows` rows."""
        return FIND + FIND_SLICE * -(-rows // (SLICE_ENTRIES // (LABELLED * self.H)))

    def share(self, cost: Cost) -> float:
        """Return the time of `cost` over that of the GEMMs."""
        return (cost.nbytes * FLOPS_PER_BYTE + cost.launches * LAUNCH_FLOPS) / self.plan.flops

    def project(self, beside: int, finds: bool = True) -> int:
        """Return the launches that stack rows and `beside` in each part, and find constants in each chunk."""
        found = self.plan.chunks * self.find(self.plan.rows) if finds else 0
        return found + self.plan.parts * (STACK + beside)

    def filled(self) -> Cost:
        """Fill the student's buffer with the constant, which its GEMM reads; one GEMM per side."""
        return Cost(self.project(FILL + 2 * GEMM), 2 * self.side_bytes)

    def raw(self) -> Cost:
        """Write raw logits with one stacked GEMM."""
        return Cost(self.project(GEMM, finds=False), 0)

    def both_filled(self) -> Cost:
        """Fill both buffers with constants, for one stacked GEMM."""
        return Cost(self.project(FILL + GEMM), 4 * self.side_bytes)

    def as_column(self) -> Cost:
        """Multiply a copy of the head with a column of ones: one stacked GEMM."""
        return Cost(self.project(FILL + GEMM), 2 * self.weight_bytes)

    def wide(self) -> Cost:
        """Keep the student's logits in fp32, in fewer rows of the same bytes, without a constant."""
        teacher = self.plan.part_rows / self.plan.rows
        more = self.planned((1 + teacher) / (2 + teacher)).head_bytes - self.plan.head_bytes
        return Cost(self.project(2 * GEMM, finds=False), 2 * self.side_bytes + more)

    def epilogue(self) -> Cost:
        """Subtract the constants in the epilogue of a GEMM of our own."""
        return Cost(self.project(GEMM), 0)

    def break_even(self) -> float:
        """Return the share of the library's rate at which `epilogue` is as fast as `filled`."""
        saved = self.share(self.filled()) - self.share(self.epilogue())
        return 1 / (1 + saved * self.plan.passes / 2)

    def accumulated(self) -> Cost:
        """Add to an fp32 dW in each chunk, and cast it in the end; with the projections' launches."""
        launches = self.filled().launches + self.plan.chunks + 1
        return Cost(launches, self.plan.head_bytes + 2 * self.weight_bytes)

    def whole_chunks(self) -> Cost:
        """Do the same for chunks that are projected at once, with buffers of equal length for both sides."""
        rows = self.whole_rows()
        chunks = -(-TOKENS // rows)
        launches = chunks * (STACK + FILL + 3 * GEMM + self.find(rows)) + 1
        return Cost(launches, 2 * self.weight_bytes * (2 * chunks - 1) + 2 * self.weight_bytes)

    def narrow(self) -> Cost:
        """Add to a 16-bit dW."""
        return Cost(self.accumulated().launches - 1, self.plan.head_bytes // 2 - self.weight_bytes)

    def cast_in_epilogue(self) -> Cost:
        """Write 16 bits in the last chunk's GEMM, in an epilogue of our own."""
        cost = self.accumulated()
        return Cost(cost.launches - 1, cost.nbytes - 4 * self.weight_bytes)


Form = tuple[str, Callable[[Head], Cost], str]
CONSTANT: list[Form] = [
    ("the buffer filled, one GEMM per side", Head.filled, "**yes**"),
    ("none: raw logits, one stacked GEMM", Head.raw, "no: the gradient is off by 2 to 3 %"),
    ("both buffers filled, one stacked GEMM", Head.both_filled, "no: more bytes"),
    ("a column of ones in a copy of the head", Head.as_column, "no: a copy as large as the head"),
    ("fp32 logits of the student, no constant", Head.wide, "no: fewer rows per chunk, more traffic of dW"),
    ("epilogue of a GEMM of our own", Head.epilogue, "not before it is measured"),
]
ACCUMULATOR: list[Form] = [
    ("fp32, chunks in parts", Head.accumulated, "**yes**"),
    ("fp32, whole chunks", Head.whole_chunks, "no: more chunks"),
    ("16 bits, chunks in parts", Head.narrow, "no: the error grows with the chunks"),
    ("fp32, the last GEMM writes 16 bits", Head.cast_in_epilogue, "not in cuBLAS: C and D have one type"),
]


def block() -> str:
    """Return both tables: per chunk, launches, GiB beyond the least, share of the GEMMs' time."""
    heads = {name: Head(name) for name in HEADS}
    tables = []
    for title, forms in (
        ("row constant", CONSTANT),
        ("dW, with the launches of the projections", ACCUMULATOR),
    ):
        shown = {name: head for name, head in heads.items() if head.trainable or forms is CONSTANT}
        plans = [
            f"{name}, {head.plan.chunks} x {head.plan.rows} in parts of {head.plan.part_rows}"
            for name, head in shown.items()
        ]
        rows = [
            [what, *(cell(head, form(head)) for head in shown.values()), verdict]
            for what, form, verdict in forms
        ]
        tables.append(Table("", [title, *plans, "taken"], rows).markdown())
    even = ", ".join(f"{name} {head.break_even():.0%}" for name, head in heads.items())
    last = f"A GEMM of our own is as fast as filling the buffer at this share of cuBLAS's rate: {even}."
    return "\n\n".join([*tables, last])


def cell(head: Head, cost: Cost) -> str:
    """Return launches and GiB per chunk, and the share of the GEMMs' time."""
    chunks = head.plan.chunks
    return f"{cost.launches / chunks:.0f}; {cost.nbytes / chunks / 2**30:.2f}; {head.share(cost):.1%}"
