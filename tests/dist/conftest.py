"""The launcher for tests that need several processes."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def launching():
    spec = importlib.util.spec_from_file_location("launching", Path(__file__).with_name("launching.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.end_forks()
