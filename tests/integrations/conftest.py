"""Fixtures of the TRL tests. Their modules import TRL first, and are skipped where it is missing."""

import sys

import pytest

KEPT = []  # both states after the last test that had them


@pytest.fixture(autouse=True)
def state_of_accelerate():
    """Restore what a config of transformers resets when it looks for its device.

    The trainers made before it, which a module keeps for its tests, still read it.
    """
    state = sys.modules.get("accelerate.state")
    shared = (
        [] if state is None else [each._shared_state for each in (state.PartialState, state.AcceleratorState)]
    )
    if not all(shared):
        for each, kept in zip(shared, KEPT, strict=False):
            each.update(kept)
    yield
    if shared and all(shared):
        KEPT[:] = [dict(each) for each in shared]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    import trl_trainers

    return trl_trainers.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trio(home):
    import trl_trainers

    return trl_trainers.make_trio(home)
