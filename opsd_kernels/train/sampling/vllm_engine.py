"""Sample rollouts through vLLM, for large models on a GPU. Optional: imported on use.

Simplifications: the engine holds a second copy of the weights, updated from the student before every
sampling, and is made again when a view is longer than those before it. A seed per answer makes it repeatable
with the same vLLM and machine only, so a resumed run is not bit for bit the uninterrupted one.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import PreTrainedModel

from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.models.pretrained import context_length

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
        self._vllm: Any = vllm
        self._config, self._engine, self._length = config, None, 0

    def _holding(self, length: int, longest: int) -> Any:
        """Return an engine for sequences of `length` tokens; the model has positions for `longest`."""
        if length > self._length:
            # Doubled when it grows, since making an engine takes a minute. The first one knows the longest
            # view of a whole evaluation.
            self._length = max(length, min(2 * self._length, longest))
            self._engine = None
            # Its memory must be free before the next one measures what is left.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._engine = self._vllm.LLM(
                model=self._config.model,
                dtype=self._config.dtype,
                seed=self._config.seed,
                gpu_memory_utilization=MEMORY_SHARE,
                # Without it the key-value cache of the model's own length, often 128k, must fit the share.
                max_model_len=self._length,
                max_num_seqs=self._config.rollout_batch,
                enforce_eager=True,
                trust_remote_code=False,
            )
        return self._engine

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
        longest = context_length(model.config) or 0
        engine = self._holding(max(map(len, prompts)) + max_new_tokens, longest)
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]

        def load(worker: Any) -> None:
            worker.load_weights(weights)

        engine.apply_model(load)
        # It holds keys and values of the weights before these.
        engine.reset_prefix_cache()
        common: dict[str, Any] = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "stop_token_ids": stops,
            "ignore_eos": False,
            "detokenize": False,
        }
        params = [self._vllm.SamplingParams(seed=place, **common) for place in places]
        outputs = engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
        )
        return [tuple(output.outputs[0].token_ids) for output in outputs]
