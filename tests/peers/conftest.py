"""The ops under comparison."""

import pytest
from trl_losses import OPS, Ops


@pytest.fixture(params=OPS.values(), ids=OPS)
def ops(request) -> Ops:
    return request.param
