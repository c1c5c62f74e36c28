"""Heads spread over ranks: the shard of a rank, and DTensor heads made whole. The collectives: _core/shard.py."""

from ._core.shard import VocabShard, gathered, is_dtensor

__all__ = ["VocabShard", "gathered", "is_dtensor"]
