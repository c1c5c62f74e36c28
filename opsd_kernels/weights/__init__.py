"""Token weightings: how much each token of a rollout counts. Contract: base.py. Schemes: schemes.py."""

from .base import Constant, Given, Product, TokenWeighting
from .schemes import AcrossRanks as AcrossRanks  # for ranks that share a batch; no scheme of its own
from .schemes import (
    EntropyGate,
    ExponentialDecay,
    FirstFraction,
    ImportanceRatio,
    LastFraction,
    LinearDecay,
    MeanOne,
    PackedSequences,
    PrefixDiscrepancy,
    SegmentMean,
    Sigmoid,
    TrustGate,
)

__all__ = [
    "Constant",
    "EntropyGate",
    "ExponentialDecay",
    "FirstFraction",
    "Given",
    "ImportanceRatio",
    "LastFraction",
    "LinearDecay",
    "MeanOne",
    "PackedSequences",
    "PrefixDiscrepancy",
    "Product",
    "SegmentMean",
    "Sigmoid",
    "TokenWeighting",
    "TrustGate",
]
