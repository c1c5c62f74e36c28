"""The settings of a run: one frozen TrainConfig, read from JSON or YAML and written as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_kernels import env as environment
from opsd_kernels.objectives import REWARDS
from opsd_kernels.spec import CLIPS, KIND_NAMES
from opsd_kernels.train.config.presets import FEEDBACK, PRESETS, RUN_FEEDBACK
from opsd_kernels.train.config.values import (
    ConfigError,
    check_key,
    check_type,
    expect,
    expect_choice,
    nearest,
    parse_value,
    read_file,
)
from opsd_kernels.train.config.weight_text import parse_weights

__all__ = ["ConfigError", "TrainConfig", "load_config"]

CHOICES: dict[str, tuple[str, ...]] = {
    "env": tuple(FEEDBACK),
    "context": ("sdpo", "positive", "contrastive", "failure", "none"),
    "control": ("none", "random_sibling", "unrelated", "successes_only"),
    "teacher": ("ema", "frozen", "live", "trust_region", "adapter_off", "external"),
    "objective": ("full", "sampled_token"),
    "divergence": tuple(KIND_NAMES),
    "topk_support": ("student", "teacher"),
    "topk_tail": ("bucket", "renormalize", "none"),
    "token_reward": REWARDS,
    "reduction": ("token_mean", "sequence_mean"),
    "rollout_engine": ("transformers", "vllm"),
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "shard": ("none", "fsdp"),
}
POSITIVE = (
    "steps updates_per_batch prompts_per_step group_size rollout_temperature max_new_tokens rollout_batch "
    "distill_temperature reward_strength importance_clip learning_rate max_grad_norm micro_batch eval_every "
    "eval_samples probe_samples checkpoint_every keep_checkpoints samples_every threads lora_alpha "
    "tiny_hidden tiny_layers tiny_heads warm_batch warm_learning_rate warm_max_steps collective_timeout"
).split()
POSITIVE_OR_NULL = ("teacher_temperature", "topk", *CLIPS, "reward_clip")
# Strictly between 0 and 1.
SHARES = ("beta", "warm_accuracy", "warm_share", "teacher_accuracy")
NOT_NEGATIVE = (
    "seed warm_seed weight_decay lr_warmup_steps successes failures rehearsal_prompts rehearsal_weight "
    "lora_rank samples_kept clip_low clip_high"
).split()
# A resumed run may differ in these.
WHERE_NOT_WHAT = ("cache_dir", "tensorboard", "keep_checkpoints", "shard", "collective_timeout")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the results of a run. The defaults learn on two CPU cores in minutes.

    `model` is "tiny" (made by a supervised warm start, cached), the directory or name of a Hugging Face
    model, a `.gguf` file, or "smollm2", from an installed package.

    `ema_rate=None` takes SDPO's .01 with feedback and .05 without (arXiv:2601.20802). The tiny model moves
    further in a step than a large one: with .01 its teacher forgot to read the context within 200 steps
    (accuracy .999 to .78, the student's .24 to .66; with .003 .995 and .74).

    `threads` and `backend` (None: the op's choice) change the numbers: a different number of threads or a
    different kernel rounds differently.
    """

    env: str = "secret_op"
    model: str = "tiny"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    shard: str = "none"
    collective_timeout: float = 1800.0
    # the user's own prompts
    data: str | None = None
    verifier: str = "exact"
    chat_template: str | None = None
    # rollouts
    steps: int = 200
    updates_per_batch: int = 1
    prompts_per_step: int = 64
    group_size: int = 4
    rollout_temperature: float = 1.0
    max_new_tokens: int = 4
    rollout_batch: int = 512
    rollout_engine: str = "transformers"
    # the teacher and its context
    context: str = "sdpo"
    feedback: str = "answer"
    siblings: bool = True
    successes: int = 2
    failures: int = 1
    control: str = "none"
    teacher: str = "ema"
    ema_rate: float | None = 0.003
    trust_region: float = 0.1
    teacher_model: str | None = None
    teacher_accuracy: float = 0.9
    # objective
    objective: str = "full"
    divergence: str = "reverse_kl"
    beta: float = 0.5
    distill_temperature: float = 1.0
    teacher_temperature: float | None = None
    topk: int | None = None
    topk_support: str = "student"
    topk_tail: str = "bucket"
    entry_clip: float | None = None
    token_clip: float | None = None
    token_weights: str | None = None
    segment_separator: str = "\n"
    token_reward: str = "log_ratio"
    reward_strength: float = 0.5
    reward_clip: float | None = None
    importance_clip: float = 2.0
    reduction: str = "token_mean"
    gradient_tolerance: float | None = None
    backend: str | None = None
    router_aux_loss_coef: float | None = None
    # policy gradient
    policy_weight: float = 0.0
    advantage_std: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    # rehearsal
    rehearsal_prompts: int = 16
    rehearsal_weight: float = 1.0
    # optimiser
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch: int = 256
    share_prompts: bool | None = None
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    # evaluation and records
    eval_every: int = 50
    eval_samples: int = 2000
    probe_samples: int = 512
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    samples_every: int = 20
    samples_kept: int = 4
    tensorboard: bool = True
    cache_dir: str | None = None
    # the tiny base model and its warm start
    tiny_hidden: int = 96
    tiny_layers: int = 2
    tiny_heads: int = 4
    warm_seed: int = 0
    warm_accuracy: float = 0.22
    warm_share: float = 0.07
    warm_batch: int = 128
    warm_learning_rate: float = 3e-3
    warm_max_steps: int = 6000

    def __post_init__(self) -> None:
        for field, kind in field_types().items():
            check_type(field, getattr(self, field), kind)
        for field, choices in CHOICES.items():
            expect_choice(field, getattr(self, field), choices)
        expect_choice("feedback", self.feedback, FEEDBACK[self.env])
        for field in POSITIVE:
            expect(getattr(self, field) > 0, field, "a number above 0", getattr(self, field))
        for field in POSITIVE_OR_NULL:
            expect(
                getattr(self, field) is None or getattr(self, field) > 0,
                field,
                "null or a number above 0",
                getattr(self, field),
            )
        if self.router_aux_loss_coef is not None:
            expect(
                self.router_aux_loss_coef >= 0,
                "router_aux_loss_coef",
                "null or a number of at least 0",
                self.router_aux_loss_coef,
            )
        for field in NOT_NEGATIVE:
            expect(getattr(self, field) >= 0, field, "a number of at least 0", getattr(self, field))
        for field in SHARES:
            expect(
                0 < getattr(self, field) < 1, field, "a number strictly between 0 and 1", getattr(self, field)
            )
        backends = environment.BACKEND.choices
        expect(
            self.backend in (None, *backends),
            "backend",
            "null or one of " + ", ".join(backends),
            self.backend,
            nearest(self.backend, backends),
        )
        expect(
            self.ema_rate is None or 0 < self.ema_rate <= 1,
            "ema_rate",
            "null or a number in (0, 1]",
            self.ema_rate,
        )
        expect(
            self.gradient_tolerance is None or 0 <= self.gradient_tolerance < 1,
            "gradient_tolerance",
            "null or a number in [0, 1)",
            self.gradient_tolerance,
        )
        expect(0 <= self.trust_region < 1, "trust_region", "a number in [0, 1)", self.trust_region)
        expect(0 <= self.policy_weight <= 1, "policy_weight", "a number in [0, 1]", self.policy_weight)
        expect(self.clip_low < 1, "clip_low", "a number below 1", self.clip_low)
        expect(
            self.tiny_hidden % (2 * self.tiny_heads) == 0,
            "tiny_hidden",
            f"a multiple of 2 * tiny_heads = {2 * self.tiny_heads}",
            self.tiny_hidden,
        )
        self._check_together()

    def _check_together(self) -> None:
        """Check the conditions between keys."""
        told = self.context != "sdpo" or self.siblings or self.feedback != "none"
        expect(
            told, "siblings", "true when feedback is 'none' (else no rollout has a context)", self.siblings
        )
        expect(
            self.context not in ("positive", "contrastive") or self.successes > 0,
            "successes",
            f"at least 1 for context={self.context}",
            self.successes,
        )
        expect(
            self.context not in ("failure", "contrastive") or self.failures > 0,
            "failures",
            f"at least 1 for context={self.context}",
            self.failures,
        )
        expect(
            self.shows_peers or self.control == "none",
            "control",
            "none unless context is positive, contrastive or failure",
            self.control,
        )
        expect(
            self.control != "successes_only" or self.context == "contrastive",
            "context",
            "contrastive for control=successes_only",
            self.context,
        )
        expect(
            (self.teacher == "external") == (self.teacher_model is not None),
            "teacher_model",
            "a model exactly if teacher is external",
            self.teacher_model,
        )
        expect(
            self.teacher != "adapter_off" or self.lora_rank > 0,
            "lora_rank",
            "a number above 0 for teacher=adapter_off",
            self.lora_rank,
        )
        expect(
            self.reward_strength < 1 or self.token_reward != "proximal",
            "reward_strength",
            "a number below 1 for proximal",
            self.reward_strength,
        )
        expect(
            self.objective == "full" or self.topk is None,
            "topk",
            "null for objective=sampled_token",
            self.topk,
        )
        expect(
            self.rollout_engine != "vllm" or self.device == "cuda",
            "device",
            "cuda for rollout_engine=vllm",
            self.device,
        )
        expect(
            self.policy_weight == 0 or self.group_size > 1,
            "group_size",
            "at least 2 with a policy gradient, whose baseline is the group",
            self.group_size,
        )
        self._check_environment()
        if self.token_weights is not None:
            parse_weights(self.token_weights)

    def _check_environment(self) -> None:
        """Check the conditions of environments for real models."""
        expect(self.env != "jsonl" or self.data is not None, "data", "a JSONL file for env=jsonl", self.data)
        # A tiny model's tokenizer has the words of its own environment alone.
        expect(
            self.env not in ("python", "jsonl") or "tiny" not in (self.model, self.teacher_model),
            "model",
            f"a language model for env={self.env} (smollm2, a .gguf file or a Hugging Face model)",
            "tiny",
        )
        expect(
            self.env != "jsonl" or self.feedback not in RUN_FEEDBACK or self.verifier == "python",
            "verifier",
            f"python for feedback={self.feedback}, which comes from the tests",
            self.verifier,
        )

    @property
    def shows_peers(self) -> bool:
        """True if the teacher's context shows several siblings, or failures."""
        return self.context in ("positive", "contrastive", "failure")

    @property
    def teacher_rate(self) -> float:
        """Return the EMA rate a of `teacher <- (1-a) teacher + a student`."""
        if self.ema_rate is not None:
            return self.ema_rate
        return 0.05 if self.feedback == "none" else 0.01

    @property
    def shares_prompts(self) -> bool:
        """True if a prompt runs once for all its answers."""
        return self.model != "tiny" if self.share_prompts is None else self.share_prompts

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def differences(self, other: TrainConfig) -> list[str]:
        """Return `key: mine here, theirs there` for each key that decides the numbers and differs."""
        return [
            f"{name}: {getattr(self, name)!r} here, {getattr(other, name)!r} there"
            for name in field_types()
            if name not in WHERE_NOT_WHAT and getattr(self, name) != getattr(other, name)
        ]


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Combine the defaults, the environment's preset, the file and each `key=value`, in this order.

    Raises ConfigError for an unknown key or a value that the key does not allow.
    """
    values = read_file(Path(path)) if path is not None else {}
    for key in values:
        check_key(key, field_types())
    for override in overrides:
        key, equals, text = override.partition("=")
        expect(bool(equals), "override", "key=value", override)
        check_key(key.strip(), field_types())
        values[key.strip()] = parse_value(text.strip(), field_types()[key.strip()])
    preset = PRESETS.get(str(values.get("env", TrainConfig.env)), {})
    return TrainConfig(**{**preset, **values})


@functools.cache
def field_types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)
