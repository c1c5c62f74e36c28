"""Lists, log-probs at ids, targets, quantised heads and cached teachers over two and three ranks."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_the_whole(launching, world, tmp_path):
    results = launching.launch("form_ranks.py", world, tmp_path)
    assert len(results) == world and len(results[0]) == 18
    launching.assert_none_failed(results)
