"""Tests on a CUDA device, skipped without one.

OPSD_GPU_TESTS=smoke runs every kernel of the CUDA library and a share of the rest, in a minute on 12 workers.
OPSD_GPU_TESTS=interpret runs one of each on the CPU with Triton's interpreter, to check the tests themselves.
"""

import os
import sys
from pathlib import Path

if os.environ.get("OPSD_GPU_TESTS") == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded
sys.path.insert(0, str(Path(__file__).resolve().parent))

import placing
import pytest
import torch

from opsd_kernels._rows import backends

HERE = Path(__file__).resolve().parent
# A backend runs every n-th parameter set of a test, by the sum of the parameters' positions. Triton takes
# half a second to compile a kernel of each set; Triton and torch run all sets without a GPU.
EVERY = {"cuda": 1, "triton": 6, "torch": 3}
# In a smoke run. The row contract runs every CUDA kernel in every type and form on short rows, 800 tests that
# take 20 s on one core with the C++ kernels. Of rows as long as real vocabularies every fifth set has every
# divergence; their float64 truth takes a core 4 s per test.
SMOKE_EVERY = {"cuda": 8, "triton": 24, "torch": 24}
SMOKE_LONG = 5
FIRST_ALONE = 1000  # in a dry run, and where tests are skipped


def pytest_configure(config):
    if placing.DRY_RUN:  # NumPy warns of every inf and NaN in the interpreter
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.*")


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in item.path.parents]
    missing = (
        None
        if placing.DRY_RUN or torch.cuda.is_available()
        else "no CUDA device is visible (OPSD_GPU_TESTS=interpret: a dry run on the CPU)"
    )
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))
    out_of_turn = set(ours) - set(in_turn(ours, first_alone=placing.DRY_RUN or bool(missing)))
    if out_of_turn:
        config.hook.pytest_deselected(items=list(out_of_turn))
        items[:] = [item for item in items if item not in out_of_turn]


def in_turn(items, first_alone):
    """Yield the items whose parameters' positions add up to a multiple of their backend's number in EVERY.

    A position counts among the values of its parameter.
    """
    positions = {}
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        backend = params.pop("backend", None)
        if placing.DRY_RUN and backend == "triton" and "rows" not in item.path.name:
            continue  # an interpreted op call takes minutes; tests/interp runs one
        every = FIRST_ALONE if first_alone else one_in(item, backend)
        total = 0
        for name, value in params.items():
            known = positions.setdefault((item.path, item.originalname, name), {})
            total += known.setdefault(repr(value), len(known))
        if total % every == 0:
            yield item


def one_in(item, backend):
    """Return n where a backend runs every n-th parameter set of a test."""
    if not placing.SMOKE:
        return EVERY.get(backend, 1)
    if backend == "cuda" and "rows" in item.path.name:
        return SMOKE_LONG if item.originalname.endswith("real_vocabularies") else 1
    return SMOKE_EVERY.get(backend, 1)


@pytest.fixture(params=["cpp" if placing.DRY_RUN else "cuda", "triton", "torch"])
def backend(request):
    """The name of each backend on the device; skipped with its reason where it cannot serve."""
    reason = backends.explain(placing.DEVICE.type)[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device():
    return placing.DEVICE


@pytest.fixture
def cuda():
    """The CUDA device, for tests of streams, graphs and host synchronisation."""
    if placing.DEVICE.type != "cuda":
        pytest.skip("only CUDA has it")
    return placing.DEVICE


@pytest.fixture
def as_users_run():
    """Turn off deterministic algorithms and NaN-filled allocations, which launch kernels of their own."""
    torch.use_deterministic_algorithms(False)
