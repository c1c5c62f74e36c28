"""Record the operators that the projections call for GPU tensors, without a GPU.

Each product is one library GEMM that writes into its buffer.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels._core import loop, planner

aten = torch.ops.aten
C, V, H = 8, 33, 16
VIEWS = (aten.t.default, aten.detach.default)


class Gemms(TorchDispatchMode):
    """Record operators other than views, without running them."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in VIEWS or function.namespace == "prim":
            return function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}))
        return kwargs["out"] if kwargs and "out" in kwargs else args[0]


def on_cuda(*shape, dtype, stride=None):
    return torch.empty_strided(shape, stride or (shape[1], 1), dtype=dtype, device="cuda")


def logits(dtype):
    return on_cuda(C, V, dtype=dtype, stride=(planner.row_stride(V, dtype, "cuda"), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["own dtype", "fp32"])
def test_logits(dtype, wide):
    with FakeTensorMode():
        hidden, weight, out = (
            on_cuda(C, H, dtype=dtype),
            on_cuda(V, H, dtype=dtype),
            logits(torch.float32 if wide else dtype),
        )
        with Gemms() as gemms:
            loop.project(hidden, weight, out)
    ((function, args, kwargs),) = gemms.noted
    assert function == (aten.mm.dtype_out if out.dtype != dtype else aten.mm.out)
    assert args[0] is hidden and kwargs["out"] is out
    assert function == aten.mm.out or args[2] == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_head_gradient_goes_into_its_accumulator(dtype, first):
    """An fp32 result of 16-bit inputs is accumulated in place, without a copy."""
    with FakeTensorMode():
        G, hidden, dW = logits(dtype), on_cuda(C, H, dtype=dtype), on_cuda(V, H, dtype=torch.float32)
        with Gemms() as gemms:
            loop.accumulate_weight_grad(G, hidden, dW, first)
    ((function, args, kwargs),) = gemms.noted
    narrow = dtype != torch.float32
    assert (
        function
        == {
            (True, True): aten.mm.dtype_out,
            (True, False): aten.mm.out,
            (False, True): aten.addmm.dtype_out,
            (False, False): aten.addmm_.default,
        }[first, narrow]
    )
    assert kwargs.get("out", args[0]) is dW
    assert first or args[0] is dW
