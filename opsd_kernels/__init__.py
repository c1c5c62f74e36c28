"""The loss head of on-policy self-distillation: LM head, log-softmax and token divergence between a teacher and a student, fused, chunk by chunk."""

from .functional import TokenStats, linear_divergence
from .planner import ChunkPlan, plan

__all__ = ["ChunkPlan", "TokenStats", "linear_divergence", "plan"]
__version__ = "0.1.0"
