"""Sample rollouts through vLLM, for large models on a GPU. Optional: imported on use.

Simplifications: the engine holds a second copy of the weights, updated from the student before every
sampling. A seed per answer makes it repeatable with the same vLLM and machine only, so a resumed run is not
bit for bit the uninterrupted one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from opsd_kernels.train.config import ConfigError, TrainConfig

# Share of the GPU's memory; the student, its optimiser and the teacher need the rest.
MEMORY_SHARE = 0.3


class VllmEngine:
    """An engine whose `generate` copies the student's weights and samples.

    Raises ConfigError without vLLM, or with an adapter, whose weights have other names.
    """

    def __init__(self, config: TrainConfig):
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                "rollout_engine: expected transformers, as vLLM is not installed (pip install vllm), "
                "got 'vllm'"
            ) from error
        if config.lora_rank or config.model == "tiny":
            raise ConfigError(
                "rollout_engine: expected transformers for lora_rank > 0 and for the tiny model, got 'vllm'"
            )
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=config.model,
            dtype=config.dtype,
            seed=config.seed,
            gpu_memory_utilization=MEMORY_SHARE,
            enforce_eager=True,
            trust_remote_code=False,
        )

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: list[tuple[int, ...]],
        places: list[int],
        stops: list[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[tuple[int, ...]]:
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]

        def load(worker: Any) -> None:
            worker.load_weights(weights)

        self._engine.apply_model(load)
        common: dict[str, Any] = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "stop_token_ids": stops,
            "ignore_eos": False,
            "detokenize": False,
        }
        params = [self._params(seed=place, **common) for place in places]
        outputs = self._engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
        )
        return [tuple(output.outputs[0].token_ids) for output in outputs]
