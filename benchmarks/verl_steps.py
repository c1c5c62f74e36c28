"""verl's top-k distillation loss by its own functions, and ours: time and peak memory by steps.py.

    python benchmarks/verl_steps.py [--rounds 3] [--tokens 64] [--dtype float32 --dtype bfloat16]
        [--json FILE]

A step is everything after the trunk, and the gradients of hidden states and head: the packed micro-batch with
its prompts, teacher lists of 32 entries. verl is not installed: pip downloads its wheel, or VERL_SOURCE names
the directory that holds `verl/`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from steps import HIDDEN, PROMPT, SEQUENCES, Integration, V, lengths, main
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "integrations"))
import verl_source

K = 32  # verl's distillation.yaml
CLAMPS = {"forward_kl_topk": (None, None), "forward_kl_topk, clamped": (10.0, -10.0)}
ROWS = {
    "forward_kl_topk": "top-32, token-mean",
    "forward_kl_topk, clamped": "the same, losses at 10 and log-probs at -10",
}


def micro_batch(tokens: int, gen: torch.Generator) -> dict[str, Any]:
    """Return prompts and responses as verl's nested tensors."""
    responses = lengths(tokens).tolist()
    whole = [PROMPT + length for length in responses]
    logprobs, ids = (torch.randn(sum(whole), 4 * K, generator=gen) * 2).log_softmax(-1).topk(K)
    data = {"teacher_logprobs": logprobs, "teacher_ids": ids * (V // (4 * K))}
    data = {name: verl_source.nested(x, whole) for name, x in data.items()}
    data |= {"prompts": verl_source.nested(torch.zeros(SEQUENCES * PROMPT), [PROMPT] * SEQUENCES)}
    data |= {"responses": verl_source.nested(torch.zeros(sum(responses)), responses)}
    data["response_mask"] = torch.nested.as_nested_tensor(
        [torch.ones(length, dtype=torch.bool) for length in responses], layout=torch.jagged
    )
    return {**data, "dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "temperature": 1.0}


def build(
    name: str, side: str, dtype: str, folder: str, fp32: bool
) -> tuple[list[Tensor], Callable[[int], Callable[[], Tensor]]]:
    """Return the leaves and the loss of one side (steps.Build)."""
    from opsd_kernels.integrations.verl import distillation_loss

    gen = torch.Generator().manual_seed(0)
    kept = torch.float32 if fp32 else getattr(torch, dtype)

    def drawn(rows: int, scale: float) -> Tensor:
        return (
            (scale * torch.randn(rows, HIDDEN, generator=gen))
            .to(getattr(torch, dtype))
            .to(kept)
            .requires_grad_()
        )

    head, theirs = drawn(V, 0.1), verl_source.Theirs(Path(os.environ["VERL_SOURCE"]) / "verl")
    highest, floor = CLAMPS[name]
    chosen = SimpleNamespace(
        loss_mode="forward_kl_topk",
        topk=K,
        loss_max_clamp=highest,
        log_prob_min_clamp=floor,
        use_policy_gradient=False,
    )
    config, distillation = (
        SimpleNamespace(loss_agg_mode="token-mean", loss_scale_factor=None),
        SimpleNamespace(distillation_loss=chosen),
    )
    leaves = [head]

    def losses(tokens: int) -> Callable[[], Tensor]:
        gen.manual_seed(1)
        data = micro_batch(tokens, gen)
        hidden = drawn(SEQUENCES * PROMPT + int(lengths(tokens).sum()), 1.0)
        leaves[1:] = [hidden]
        if side == "verl":
            return lambda: theirs.loss((hidden @ head.T)[None], data, config, distillation)[0]
        return lambda: distillation_loss(
            config, distillation, {"hidden_states": hidden, "lm_head_weight": head}, data
        )[0]

    return leaves, losses


INTEGRATION = Integration("verl", "verl", ROWS, build, versions={"verl": verl_source.VERSION})

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        if "VERL_SOURCE" not in os.environ:
            os.environ["VERL_SOURCE"] = str(verl_source.download(Path(place)))
        main(INTEGRATION)
