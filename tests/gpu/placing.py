"""Run the CPU tests on a device: each call moves its tensors there and its results back.

A storage moves whole, so that offsets, strides, the gaps between rows and aliasing are the same on the
device. OPSD_GPU_TESTS=interpret makes the device the CPU and every move a copy: a dry run of the test code
without a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from torch import Tensor

from opsd_kernels import testing
from opsd_kernels._rows import backends
from opsd_kernels.testing.reference import linear_divergence_reference

TESTS = Path(__file__).resolve().parent.parent
DRY_RUN = os.environ.get("OPSD_GPU_TESTS") == "interpret"
SMOKE = os.environ.get("OPSD_GPU_TESTS") == "smoke"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
OPS = ("linear_divergence", "linear_logprobs", "linear_topk_divergence", "linear_policy_divergence")
FIXTURE = type(pytest.fixture(lambda: None))  # pytest < 8.4: a function


class Mover:
    """Move tensors to a device and keep their aliasing: shared storages, and one tensor given twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # by address: all bytes on the CPU, all bytes on the device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def view(self, x: Tensor) -> Tensor:
        here = x.detach().untyped_storage()
        if here.data_ptr() not in self.storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(here)
            self.storages[here.data_ptr()] = flat, flat.to(self.device, copy=True)
        there = self.storages[here.data_ptr()][1].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device=self.device).set_(
            there, x.storage_offset(), x.shape, x.stride()
        )

    def __call__(self, x: Tensor) -> Tensor:
        if id(x) not in self.tensors:
            self.tensors[id(x)] = x, Moved.apply(x, self) if x.requires_grad else self.view(x)
        return self.tensors[id(x)][1]

    def back(self) -> None:
        """Copy every byte of the moved storages back, so that a write outside the output shows."""
        for here, there in self.storages.values():
            here.copy_(there)


class Moved(torch.autograd.Function):
    """Move a tensor to the device and its gradient back to the CPU."""

    @staticmethod
    def forward(ctx, x, mover):
        ctx.set_materialize_grads(False)
        return mover.view(x)

    @staticmethod
    def backward(ctx, grad):
        return None if grad is None else grad.cpu(), None


def each_tensor(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """Apply `change` to each tensor of a value, inside tuples, lists, dicts and dataclasses too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(x, change) for x in value)
    if isinstance(value, dict):
        return {name: each_tensor(x, change) for name, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, each_tensor(getattr(value, field.name), change))
        return other
    return value


def on_device(op: Callable) -> Callable:
    """Wrap `op` to move all tensors to the device and its results back. Differentiable."""

    @functools.wraps(op)
    def run(*arguments: object, **options: object) -> object:
        skip_unless_served(options.get("backend"), arguments[0].dtype)
        mover = Mover(DEVICE)
        return each_tensor(op(*each_tensor(arguments, mover), **each_tensor(options, mover)), Tensor.cpu)

    return run


def placed(case: testing.Case) -> testing.Case:
    """Move a case to the device, with the same views."""
    return case._map(Mover(DEVICE).view)


def unmasked(case: testing.Case) -> testing.Case:
    """Make every token valid and the hidden states of ignored rows finite."""
    finite = {name: getattr(case, name).nan_to_num(0, 0, 0) for name in ("student_hidden", "teacher_hidden")}
    return dataclasses.replace(case, mask=None, labels=None, token_weights=None, **finite)


def unserved(backend: str | None, dtype: torch.dtype) -> str | None:
    """Return the reason why a backend has no sweeps for `dtype` on the device, or None."""
    return backends.explain(DEVICE.type, dtype)[backend] if backend and DEVICE.type == "cuda" else None


def skip_unless_served(backend: str | None, dtype: torch.dtype) -> None:
    reason = unserved(backend, dtype)
    if reason is not None:
        pytest.skip(reason)


class PlacedRows:
    """A row backend whose sweeps run on the device. Writes to their arguments are copied back."""

    def __init__(self, name: str) -> None:
        self.name, self.backend = name, backends.select(name, DEVICE)

    def __getattr__(self, name: str) -> Callable:
        def sweep(*arguments: object) -> object:
            skip_unless_served(self.name, arguments[0].dtype)
            mover = Mover(DEVICE)
            result = getattr(self.backend, name)(*each_tensor(arguments, mover))
            mover.back()
            return each_tensor(result, Tensor.cpu)

        return sweep


def unit(name: str) -> ModuleType:
    """Execute tests/unit/<name>.py as a second module whose public ops run on the device.

    Plain PyTorch runs on the CPU and on the device, and the larger error counts.
    """
    spec = importlib.util.spec_from_file_location(f"on_device_{name}", TESTS / "unit" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in OPS:
        if hasattr(module, op):
            setattr(module, op, on_device(getattr(module, op)))
    if hasattr(module, "plain_outcomes"):
        module.plain_outcomes = plain_outcomes
    if DRY_RUN:  # the interpreter truncates to bf16
        module.assert_one_rounding = functools.partial(testing.assert_one_rounding, interpreter=True)
        module.assert_on_target = lambda actual, truth, target: testing.assert_on_target(
            actual, truth, "default"
        )
    return module


def plain_outcomes(case: testing.Case, **options: object) -> tuple[testing.Outcome, ...]:
    there = testing.evaluate(on_device(linear_divergence_reference), case, **options)
    return *testing.plain_outcomes(case, **options), there


def adopt(module: ModuleType, but: str = "compile") -> dict[str, object]:
    """Return a unit file's fixtures and its tests of a backend, for the globals of a test file on the device.

    Tests whose name matches the pattern `but` are left out.
    """
    stem = module.__name__.rpartition("test_")[2]
    found = {}
    for name, value in vars(module).items():
        if name.startswith("test_"):
            if "backend" in inspect.signature(value).parameters and not re.search(but, name):
                found[name.replace("test_", f"test_{stem}_", 1)] = value
        elif isinstance(value, FIXTURE) and (
            FIXTURE is not FunctionType or hasattr(value, "__pytest_wrapped__")
        ):
            found[name] = value
    return found
