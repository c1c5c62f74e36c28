"""Heads sharded over ranks against whole heads, on two and three gloo processes.

Every divergence, clip, weight, top-k support, list and statistic, and log-probs.
"""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_the_whole(launching, world, tmp_path):
    """In float64 on two ranks, in fp32 on three."""
    results = launching.launch("vocab_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > 60
    launching.assert_none_failed(results)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_heads_of_more_than_one_matrix(launching, world, tmp_path):
    results = launching.launch("head_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > (22 if world == 2 else 65)
    launching.assert_none_failed(results)


@pytest.mark.slow
def test_labels_at_the_edges_of_shards(launching, tmp_path):
    """Sizes from 1000 to 1046 on three ranks: the values and gradients of one process."""
    launching.assert_none_failed(launching.launch("label_ranks.py", 3, tmp_path))
