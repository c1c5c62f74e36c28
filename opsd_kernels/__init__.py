"""Provide the fused loss head of on-policy self-distillation.

LM head, log-softmax and token divergence between a teacher and a student, computed chunk by chunk.
"""

from . import objectives, weights
from ._core.planner import ChunkPlan, plan
from ._core.reductions import TokenStats
from ._core.shard import VocabShard
from .cached import ForwardKLCache, cache_forward_kl, linear_cached_forward_kl
from .divergence import linear_divergence
from .logprobs import TopK, linear_logprobs, linear_logprobs_at, linear_topk
from .modules import DistillationHead, LinearDivergenceLoss
from .quantized import QuantizedHead
from .topk import linear_divergence_to, linear_topk_divergence
from .version import __version__ as __version__

__all__ = [
    "ChunkPlan",
    "DistillationHead",
    "ForwardKLCache",
    "LinearDivergenceLoss",
    "QuantizedHead",
    "TokenStats",
    "TopK",
    "VocabShard",
    "cache_forward_kl",
    "linear_cached_forward_kl",
    "linear_divergence",
    "linear_divergence_to",
    "linear_logprobs",
    "linear_logprobs_at",
    "linear_topk",
    "linear_topk_divergence",
    "objectives",
    "plan",
    "weights",
]
