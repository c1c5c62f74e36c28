"""The projection side of a chunk on a GPU: bytes and launches of its forms, in the planner's cost model.

The table of docs/design/projection.md. As there, a GEMM's operands cost no time beside its multiplications,
and what it adds to or writes does. The least is not counted: 16-bit logits written and read once, a 16-bit dW
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..internals import DEFAULT_WORKSPACE_BYTES, FLOPS_PER_BYTE, ChunkPlan, plan
from ..report.tables import Table

TOKENS, V, ITEMSIZE = 8192, 151936, 2
HEADS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {"H_student": 4096},
    "Qwen3-0.6B": {"H_student": 1024},
    "Qwen3-8B, frozen": {"H_student": 4096, "trainable_head": False},
}
# Operations of a GPU in the time of a launch that does little: 3 us at the planner's 730 TFLOP/s. Assumed.
LAUNCH_FLOPS = 2_200_000_000
# Launches of a chunk with labels: stacking the rows; a GEMM; filling the buffer with the constant; finding
# the constants, without the products at likely columns and labels; these, of each slice. A test counts them
# in the loop itself.
STACK, GEMM, FILL, FIND, FIND_SLICE = 4, 1, 2, 28, 4
# Of rows of the head gathered at once; columns per row, a likely one and the label
SLICE_ENTRIES, LABELLED = 1 << 22, 2
PARTS = 4  # of a chunk, where the teacher's buffer holds one part


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
        self.plan = self.planned()
        self.side_bytes = ITEMSIZE * V * TOKENS  # logits of one side, of all chunks

    def planned(self, room: float = 1.0) -> ChunkPlan:
        """Return the plan where the logits have `room` times the bytes of the default budget."""
        # Half of an fp32 dW is charged to the budget, but leaves the logits as many bytes.
        half = self.weight_bytes * self.trainable
        logits = int(room * max(DEFAULT_WORKSPACE_BYTES - half, min(DEFAULT_WORKSPACE_BYTES, half)))
        budget = logits if logits <= half else logits + half
        return plan(TOKENS, V, **self.sizes, device_type="cuda", workspace_bytes=budget)

    def find(self, made: ChunkPlan) -> int:
        """Return the launches that find the constants of all rows."""
        slices = -(-made.rows // (SLICE_ENTRIES // (LABELLED * self.H)))
        return made.chunks * (FIND + FIND_SLICE * slices)

    def share(self, cost: Cost) -> float:
        """Return the time of `cost` over that of the GEMMs."""
        return (cost.nbytes * FLOPS_PER_BYTE + cost.launches * LAUNCH_FLOPS) / self.plan.flops

    def filled(self) -> Cost:
        """Fill the student's buffer with the constant, which its GEMM reads; one GEMM per side."""
        launches = self.find(self.plan) + self.plan.chunks * (STACK + FILL + 2 * GEMM)
        return Cost(launches, 2 * self.side_bytes)

    def raw(self) -> Cost:
        """Write raw logits with one stacked GEMM."""
        return Cost(self.plan.chunks * (STACK + GEMM), 0)

    def both_filled(self) -> Cost:
        """Fill both buffers with constants, for one stacked GEMM."""
        return Cost(self.find(self.plan) + self.plan.chunks * (STACK + FILL + GEMM), 4 * self.side_bytes)

    def as_column(self) -> Cost:
        """Multiply a copy of the head with a column of ones: one stacked GEMM."""
        return Cost(self.find(self.plan) + self.plan.chunks * (STACK + FILL + GEMM), 2 * self.weight_bytes)

    def wide(self) -> Cost:
        """Keep the student's logits in fp32, three quarters of the rows per byte, without a constant."""
        made = self.planned(2 / 3)
        nbytes = 2 * self.side_bytes + made.head_bytes - self.plan.head_bytes
        return Cost(made.chunks * (STACK + 2 * GEMM), nbytes)

    def epilogue(self) -> Cost:
        """Subtract the constants in the epilogue of a GEMM of our own."""
        return Cost(self.find(self.plan) + self.plan.chunks * (STACK + GEMM), 0)

    def break_even(self) -> float:
        """Return the share of the library's rate at which `epilogue` is as fast as `filled`."""
        saved = self.share(self.filled()) - self.share(self.epilogue())
        return 1 / (1 + saved * self.plan.passes / 2)

    def accumulated(self, made: ChunkPlan | None = None) -> Cost:
        """Add to an fp32 dW in each chunk, and cast it in the end."""
        made = made or self.plan
        return Cost(made.chunks + 1, (made.head_bytes + 2 * self.weight_bytes) * self.trainable)

    def narrow(self) -> Cost:
        """Add to a 16-bit dW."""
        return Cost(self.plan.chunks, self.plan.head_bytes // 2)

    def cast_in_epilogue(self) -> Cost:
        """Write 16 bits in the last chunk's GEMM, in an epilogue of our own."""
        return Cost(self.plan.chunks, self.accumulated().nbytes - 4 * self.weight_bytes)

    def in_parts(self) -> Cost:
        """Keep the teacher's logits of a part of a chunk alone, for more rows of G in each GEMM of dW.

        Launches of the projections beyond today's are counted; constants are found once per chunk.
        """
        made = self.planned(2 * PARTS / (PARTS + 1))
        beside = self.find(made) + made.chunks * PARTS * (STACK + FILL + 2 * GEMM) - self.filled().launches
        cost = self.accumulated(made)
        return Cost(cost.launches + beside, cost.nbytes)


CONSTANT: list[tuple[str, Callable[[Head], Cost], str]] = [
    ("the buffer filled, one GEMM per side", Head.filled, "**today**"),
    ("none: raw logits, one stacked GEMM", Head.raw, "no: the gradient is off by 2 to 3 %"),
    ("both buffers filled, one stacked GEMM", Head.both_filled, "no: more bytes"),
    (
        "a column of ones in a copy of the head",
        Head.as_column,
        "no: the copy is as large as the head, beyond the budget",
    ),
    ("fp32 logits of the student, no constant", Head.wide, "no: fewer rows per chunk, more traffic of dW"),
    ("epilogue of a GEMM of our own", Head.epilogue, "not before it is measured: see below"),
]
ACCUMULATOR: list[tuple[str, Callable[[Head], Cost], str]] = [
    ("fp32 accumulator, cast in the end", Head.accumulated, "**today**"),
    ("16-bit accumulator", Head.narrow, "no: the error grows with the chunks"),
    ("the last GEMM writes 16 bits", Head.cast_in_epilogue, "not in cuBLAS: C and D have one type"),
    (f"teacher's buffer of 1/{PARTS} chunk, so longer chunks", Head.in_parts, "next: see below"),
]


def block() -> str:
    """Return both tables: per chunk of today, launches, GiB beyond the least, share of the GEMMs' time."""
    heads = {name: Head(name) for name in HEADS}
    shown = [f"{name}, {head.plan.chunks} x {head.plan.rows}" for name, head in heads.items()]
    tables = []
    for title, forms in (("row constant", CONSTANT), ("dW", ACCUMULATOR)):
        rows = [
            [
                what,
                *(
                    cell(head, form(head)) if head.trainable or title != "dW" else ""
                    for head in heads.values()
                ),
                verdict,
            ]
            for what, form, verdict in forms
        ]
        tables.append(Table("", [title, *shown, "taken"], rows).markdown())
    even = ", ".join(f"{name} {head.break_even():.0%}" for name, head in heads.items())
    return "\n\n".join(
        [*tables, f"The own GEMM is as fast as today's form at this share of cuBLAS's rate: {even}."]
    )


def cell(head: Head, cost: Cost) -> str:
    """Return launches and GiB per chunk, and the share of the GEMMs' time."""
    chunks = head.plan.chunks
    return f"{cost.launches / chunks:.0f}; {cost.nbytes / chunks / 2**30:.2f}; {head.share(cost):.1%}"
