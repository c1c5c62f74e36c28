"""Heads sharded over ranks against whole heads, on two to four gloo processes.

Every divergence, clip, weight, top-k support, list and statistic, and log-probs.
"""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_the_whole(launching, world, tmp_path):
    results = launching.launch("vocab_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > 115
    launching.assert_none_failed(results)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_heads_of_more_than_one_matrix(launching, world, tmp_path):
    results = launching.launch("head_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) > 65
    launching.assert_none_failed(results)


@pytest.mark.slow
def test_16_bit_logits_of_three_shards(launching, tmp_path):
    results = launching.launch("vocab_ranks.py", 3, tmp_path, "16-bit")
    assert len(results) == 3 and len(results[0]) == 4
    launching.assert_none_failed(results)


@pytest.mark.slow
def test_labels_at_the_edges_of_shards(launching, tmp_path):
    """Every size from 1000 to 1030 on three ranks: the values and gradients of one process."""
    launching.assert_none_failed(launching.launch("label_ranks.py", 3, tmp_path))
