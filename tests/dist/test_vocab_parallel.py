"""Heads spread over ranks against whole heads: two and four gloo processes, every divergence, clip, weight, support, list and statistic, and log-probs."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_equal_the_whole(launching, world, tmp_path):
    results = launching.launch("vocab_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > 115
    launching.assert_none_failed(results)
