"""Check the package's operators on the arguments of real calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.library import opcheck

TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")


def check_operators(
    module: ModuleType, names: Sequence[str], run: Callable[[], Any], tests: Sequence[str] = TESTS
) -> int:
    """Run torch's opcheck on each call of the module's operators within `run`; return their number, not 0."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            op = getattr(module, name)
            patch.setattr(module, name, lambda *args, op=op: calls.append((op, args)) or op(*args))
        run()
    assert calls
    for op, args in calls:
        opcheck(op.default, tuple(map(_detached, args)), test_utils=tests)
    return len(calls)


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(entry) for entry in value]
    return value.detach() if isinstance(value, torch.Tensor) else value
