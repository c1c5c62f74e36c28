"""TRL's (1.14.1 to 1.16) distillation trainers with the fused loss, without logits.

`DistillationTrainer` and the trainers of trl.experimental: `GKDTrainer`, `GOLDTrainer`, `SDFTTrainer`,
`SDPOTrainer`, `IWOPDTrainer`, `ServerDistillationTrainer`, `AsyncDistillationTrainer`. Only the methods that
compute a loss from logits are overridden. The constructor raises ValueError for settings that the fused loss
does not support. docs/integrations-trl.md shows how to use them, how they differ from TRL's, and which
defects are not copied.

A trainer is imported where it is first named: in TRL before 1.16 that of `AsyncDistillationTrainer` needs
aiohttp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_distillation import AsyncDistillationTrainer
    from .base import FusedLoss
    from .distillation import DistillationTrainer, GKDTrainer, GOLDTrainer
    from .iw_opd import IWOPDTrainer
    from .self_distillation import SDFTTrainer, SDPOTrainer
    from .server_distillation import ServerDistillationTrainer

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
_HOMES = {
    "AsyncDistillationTrainer": "async_distillation",
    "FusedLoss": "base",
    "IWOPDTrainer": "iw_opd",
    "ServerDistillationTrainer": "server_distillation",
    **dict.fromkeys(("DistillationTrainer", "GKDTrainer", "GOLDTrainer"), "distillation"),
    **dict.fromkeys(("SDFTTrainer", "SDPOTrainer"), "self_distillation"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
