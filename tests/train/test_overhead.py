"""benchmarks/trainer_overhead.py: its clock, and that the functions it times exist."""

import importlib.util
from itertools import count
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trainer_overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("trainer_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_timed_call_exists(overhead):
    assert [name for owner, name, _ in overhead.places() if not callable(getattr(owner, name, None))] == []


def test_a_part_inside_another_is_not_counted_twice(overhead):
    parts = overhead.Parts(count().__next__)  # a second passes between two readings of the clock
    inner = parts.timed(lambda: "inner", lambda: "done")
    with parts.part("outer"):
        assert inner() == "done" and inner() == "done"
    assert parts.seconds == {"outer": 3, "inner": 2}
