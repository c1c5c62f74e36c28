"""Fixtures of the TRL tests. Their modules import TRL first, and are skipped where it is missing."""

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    import trl_trainers

    return trl_trainers.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trio(home):
    import trl_trainers

    return trl_trainers.make_trio(home)
