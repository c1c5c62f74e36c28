"""DistillationHead on ranks with different tokens, one with none: two and four gloo processes against one."""

import time

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(launching, world, tmp_path):
    results = launching.launch("data_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) == 4
    launching.assert_none_failed(results)


@pytest.mark.slow
def test_a_rank_that_dies_does_not_hang_the_others(launching, tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0 ended with .*rank 1 ended with 7"):
        launching.launch("data_ranks.py", 2, tmp_path, "die", timeout_s=120)
    assert time.monotonic() - began < 100, "the others waited for their time-out and more"
