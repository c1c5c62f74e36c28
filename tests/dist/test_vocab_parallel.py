"""Heads sharded over ranks against whole heads, on two and four gloo processes.

Every divergence, clip, weight, top-k support, list and statistic, and log-probs.
"""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_shards_equal_the_whole(launching, world, tmp_path):
    results = launching.launch("vocab_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > 115
    launching.assert_none_failed(results)
