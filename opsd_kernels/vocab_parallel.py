"""Export the shard of a vocabulary-parallel head, and `gathered` for DTensor heads (_core/shard.py)."""

from ._core.shard import VocabShard, gathered, is_dtensor

__all__ = ["VocabShard", "gathered", "is_dtensor"]
