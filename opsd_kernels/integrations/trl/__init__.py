"""TRL's (1.14.1 to 1.16) distillation trainers with the fused loss, without logits.

`DistillationTrainer` and the trainers of trl.experimental: `GKDTrainer`, `GOLDTrainer`, `SDFTTrainer`,
`SDPOTrainer`, `IWOPDTrainer`, `ServerDistillationTrainer`, `AsyncDistillationTrainer`. Only the methods that
compute a loss from logits are overridden. The constructor raises ValueError for settings that the fused loss
does not support. docs/integrations-trl.md shows how to use them, how they differ from TRL's, and which
defects are not copied.
"""

from __future__ import annotations

from .base import FusedLoss
from .distillation import DistillationTrainer, GKDTrainer, GOLDTrainer
from .iw_opd import IWOPDTrainer
from .self_distillation import SDFTTrainer, SDPOTrainer
from .served import AsyncDistillationTrainer, ServerDistillationTrainer

__all__ = [
    "AsyncDistillationTrainer",
    "DistillationTrainer",
    "FusedLoss",
    "GKDTrainer",
    "GOLDTrainer",
    "IWOPDTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
    "ServerDistillationTrainer",
]
