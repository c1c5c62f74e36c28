"""verl's own functions, for the tests and the benchmark of integrations.verl.

They are taken one by one: verl as a whole needs ray, tensordict and GPU libraries.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VERSION = "0.9.1"
FUNCTIONS = {
    "utils/torch_functional.py": ["masked_sum"],
    "trainer/ppo/core_algos.py": ["agg_loss"],
    "workers/utils/padding.py": ["no_padding_2_padding"],
    "trainer/distillation/fsdp/losses.py": [
        "_chunked_topk_log_probs",
        "kl_divergence",
        "compute_forward_kl_topk",
    ],
    "trainer/distillation/losses.py": [
        "compute_forward_kl_topk",
        "compute_distillation_loss_range",
        "distillation_loss",
    ],
}


def nested(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(packed, torch.tensor((0, *lengths)).cumsum(0))


def download(place: Path) -> Path:
    """Download verl's wheel with pip and return the directory that holds `verl/`.

    Raises CalledProcessError or TimeoutExpired.
    """
    what = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "10", f"verl=={VERSION}"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", *what, "-d", str(place)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place)
    return place


class Theirs:
    """Functions of verl's files, each file in its own namespace, with stand-ins for the rest of verl."""

    def __init__(self, root: Path) -> None:
        for path, names in FUNCTIONS.items():
            space = {
                "torch": torch,
                "F": torch.nn.functional,
                "verl_F": SimpleNamespace(),
                "tu": SimpleNamespace(),
                "DistillationLossConfig": object,
            }
            for node in ast.parse((root / path).read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name in names:
                    node.decorator_list, node.returns = [], None
                    for argument in node.args.args:
                        argument.annotation = None
                    exec(compile(ast.Module([node], []), path, "exec"), space)
            assert set(names) <= space.keys()
            setattr(self, path.replace("/", "_").removesuffix(".py"), space)
        self.trainer_ppo_core_algos["verl_F"].masked_sum = self.utils_torch_functional["masked_sum"]
        self.workers_utils_padding["tu"].get_non_tensor_data = lambda data, key, default: data.get(
            key, default
        )
        self.trainer_distillation_fsdp_losses["get_ulysses_sequence_parallel_world_size"] = lambda: 1
        self.final = self.trainer_distillation_losses
        self.final |= {
            "no_padding_2_padding": self.workers_utils_padding["no_padding_2_padding"],
            "agg_loss": self.trainer_ppo_core_algos["agg_loss"],
            "get_distillation_loss_fn": {
                "forward_kl_topk": self.final["compute_forward_kl_topk"]
            }.__getitem__,
            "Metric": lambda aggregation, value: value,
            "AggregationType": SimpleNamespace(MIN="min", MAX="max"),
        }

    def loss(
        self, logits: Tensor, data: dict[str, Any], config: Any, distillation: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute (aggregated loss, metrics) from logits (1, tokens, V) of the packed sequences."""
        config.global_batch_info, whole = {}, data["teacher_ids"].offsets().diff().tolist()
        per_token = self.trainer_distillation_fsdp_losses["compute_forward_kl_topk"](
            logits, data["teacher_logprobs"], data["teacher_ids"], distillation, "thd"
        )
        return self.final["distillation_loss"](
            config, distillation, {k: nested(x[0], whole) for k, x in per_token.items()}, data
        )
