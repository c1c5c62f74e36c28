"""Constants of the projection that were not measured: datasheets and assumptions about GPUs and links."""

from __future__ import annotations

from typing import NamedTuple

from ....spec import expect
from ...parallel import Link, Machine


class Given(NamedTuple):
    """A constant of the projection that is not measured, with its source."""

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
    "assumed: the 730 TFLOP/s of the planner's model (`_core/waves.py`)",
)
NVLINK = Given("NVLink, one direction", 450e9, "450 GB/s", "datasheet: 900 GB/s in both")
NETWORK = Given(
    "network adapter of a GPU, one direction",
    50e9,
    "50 GB/s",
    "datasheet of a 400 Gb/s adapter, one for each GPU",
)
REACHED = Given("of a link reached by large collectives", 0.75, "75 %", "assumed")
NEAR = Given("latency of a collective within a node", 20e-6, "20 µs", "assumed")
FAR = Given("latency of a collective across nodes", 50e-6, "50 µs", "assumed")
MEMORY = Given("memory of a GPU", 80 * 2**30, "80 GiB", "datasheet")
NODE = Given("GPUs on one NVLink", 8, "8", "assumed: an HGX board")
GIVEN = (PEAK, GEMMS, NVLINK, NETWORK, REACHED, NEAR, FAR, MEMORY, NODE)
INSIDE = Link(NEAR.value, REACHED.value * NVLINK.value)


def gpus(vocab_ranks: int, data_ranks: int) -> Machine:
    """Return the GPU and links of a layout. Raises ValueError if vocabulary ranks do not divide a node.

    Vocabulary ranks share a node; data ranks fill it, then further nodes. Across nodes their rings use the
    network adapters of all GPUs of a node that hold the same shard.
    """
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
