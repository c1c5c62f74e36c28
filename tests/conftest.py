"""Settings of the whole suite."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """The machines that run this suite have two cores, and sums over another number of threads round differently."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """Every torch.empty comes filled with NaN, so that an output which no one writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the fill happens in this mode only
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
