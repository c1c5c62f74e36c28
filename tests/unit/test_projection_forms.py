"""The projection side on a GPU: launches and bytes are those of the table in docs/design/projection.md.

They are counted in the loop itself, over tensors without data (device "meta"): each operator but views and
allocations is one launch.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd_kernels._core import centre, loop
from opsd_kernels._core.problem import Problem, RowSelection, Side
from opsd_kernels._rows import torch_topk
from opsd_kernels.bench.pages import projection, write
from opsd_kernels.spec import Divergence, RowSpec
from opsd_kernels.testing import assert_one_rounding

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
ALLOCATIONS = (aten.empty.memory_format, aten.new_empty.default, aten.empty_strided.default)


class Launches(TorchDispatchMode):
    """Count launches, and the reads and writes of row-major tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.names, self.reads, self.writes = shape, [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.is_view or function in ALLOCATIONS:
            return result
        self.names.append(function.overloadpacket.__name__)
        overwritten = function == aten.copy_.default
        self.reads += sum(map(self.counts, tree_leaves(args[overwritten:])))
        self.writes += self.counts(result)
        return result

    def counts(self, x):
        """Return whether `x` is of the shape, neither transposed nor expanded."""
        return isinstance(x, torch.Tensor) and x.shape == self.shape and x.stride(1) == 1


def problem_of(head, labels=True):
    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    weight = make(projection.V, head.H)
    return Problem(
        student=Side(make(projection.TOKENS, head.H), weight, None),
        teacher=Side(make(projection.TOKENS, head.H), weight, None),
        rows=RowSelection(labels=make(projection.TOKENS, dtype=torch.int64) if labels else None),
        spec=RowSpec(Divergence.parse("reverse_kl"), difference=True),
        support=None,
        shared_head=True,
        vocab=projection.V,
        logits_dtype=torch.bfloat16,
        workspace_bytes=1 << 30,
        gradient_tolerance=None,
        backend=None,
        shard=None,
        wants=(True, head.trainable, False),
    )


@pytest.mark.parametrize("name", projection.HEADS)
def test_the_table_counts_what_the_loop_does(name):
    head = projection.Head(name)
    problem, made = problem_of(head), head.plan
    student, teacher = (side.hidden[: made.rows] for side in (problem.student, problem.teacher))
    buffers = loop.Buffers(problem, made, None)
    walk = loop.Walk(problem, None, None, False, False, True, None, None, None)
    with Launches((made.rows, projection.V)) as found:
        centre = buffers.centre(walk, slice(0, made.rows), student, teacher, 0)
    part = slice(0, made.part_rows)
    if made.part_rows < made.rows:
        centre = centre.part(part)
    with Launches((made.part_rows, projection.V)) as filled:
        buffers.fill(problem, student[part], teacher[part], centre, 0)
    cost = head.filled()
    assert made.chunks * len(found.names) + made.parts * len(filled.names) == cost.launches, found.names
    assert len(found.names) == head.find(made.rows)
    assert filled.names.count("mm") == filled.names.count("addmm") == 1  # difference and student
    # Both sides written once are the least.
    assert (filled.reads + filled.writes - 2) * head.side_bytes == cost.nbytes


def test_the_head_gradient_moves_what_the_table_says():
    head = projection.Head("Qwen3-8B")
    G = torch.empty(head.plan.rows, projection.V, dtype=torch.bfloat16, device="meta")
    hidden, dW = G.new_empty(head.plan.rows, head.H), G.new_empty(projection.V, head.H, dtype=torch.float32)
    with Launches(dW.shape) as counted:
        for chunk in range(head.plan.chunks):
            loop.accumulate_weight_grad(G, hidden, dW, first=chunk == 0)
        G.new_empty(dW.shape).copy_(dW)
    read, written = counted.reads, counted.writes
    assert (read, written) == (head.plan.chunks, head.plan.chunks + 1)
    assert (read + written - 1) * 4 * dW.numel() == head.plan.head_bytes + 2 * head.weight_bytes
    # Of the last write in 16 bits, nothing is beyond the least.
    cost = head.accumulated()
    assert cost.nbytes == head.plan.head_bytes + 2 * head.weight_bytes
    assert cost.launches - head.filled().launches == len(counted.names)


@pytest.mark.parametrize("n, H, K", [(1, 3, 1), (7, 16, 2), (33, 24, 10)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_at_columns_are_those_of_the_sums(monkeypatch, n, H, K, dtype):
    """The GPU's path on a CPU, where torch's batched product has no fp32 result: that one is replaced."""

    def bmm(a, b, out_dtype, out):
        assert out_dtype == torch.float32
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setitem(torch_topk.ENTRIES, "cpu", 5 * H * K)  # slices of five rows
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, H, generator=gen).to(dtype) for size in (n, 50))
    columns = torch.randint(50, (n, K), generator=gen)
    out = torch.full((n, K), torch.nan)
    centre._products_at(hidden, weight, columns, out)
    truth, size = (
        a @ b.t()
        for a, b in ((hidden.double(), weight.double()), (hidden.double().abs(), weight.double().abs()))
    )
    assert_one_rounding(out, truth.gather(1, columns), torch.float32, magnitude=size.gather(1, columns))


def test_the_page_is_current():
    text = (ROOT / write.PROJECTION).read_text()
    assert text == write.with_block(text, projection.block(), write.PROJECTION), "run `make docs`"
