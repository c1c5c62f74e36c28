"""Collectives between ranks and FSDP2 shards of a model."""
