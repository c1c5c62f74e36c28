"""Write the configuration file of `opsd train --write-config`: every key, its value and a comment."""

from __future__ import annotations

import json
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.settings import CHOICES

# Width of `key: value`, where the comments start.
WIDTH = 34
COMMENTS: dict[str, dict[str, str]] = {
    "what runs, and where": {
        "env": "the problems and their verifier",
        "model": "tiny, smollm2, a .gguf file, or the directory or name of a Hugging Face model",
        "seed": "of prompts, answers and contexts",
        "device": "",
        "dtype": "of the weights",
        "threads": "CPU threads; part of the numbers",
        "shard": "over several ranks: each holds the whole model, or its part (FSDP2)",
        "collective_timeout": "seconds that a rank waits for the others before it fails",
    },
    "your own prompts, env: jsonl": {
        "data": "JSONL file with a prompt per line",
        "verifier": "exact, numeric, math, python or package.module:function",
        "chat_template": "Jinja file for a tokenizer without one",
    },
    "rollouts": {
        "steps": "batches of rollouts",
        "updates_per_batch": "optimisation steps on each",
        "prompts_per_step": "",
        "group_size": "answers to each prompt",
        "rollout_temperature": "",
        "max_new_tokens": "of an answer",
        "rollout_batch": "answers sampled at once, at most",
        "rollout_engine": "",
    },
    "the teacher and its context": {
        "context": "the contents of the teacher's prompt",
        "feedback": "the feedback on a failure; the kinds depend on env",
        "siblings": "true: context sdpo shows a correct answer of the group",
        "successes": "correct siblings shown by context positive and contrastive",
        "failures": "wrong siblings shown by context contrastive and failure",
        "control": "other answers in place of the siblings",
        "teacher": "the model that scores",
        "ema_rate": "a of teacher <- (1-a) teacher + a student; null: .01 with feedback, .05 without",
        "trust_region": "the student's share of the mixed logits, for teacher trust_region",
        "teacher_model": "for teacher external: tiny, or a directory or name",
        "teacher_accuracy": "at which the warm start of teacher_model tiny stops",
    },
    "objective": {
        "objective": "the whole distribution, or the sampled token alone",
        "divergence": "",
        "beta": "the teacher's weight, of jsd, the skew divergences and mixed_kl",
        "distill_temperature": "of both sides' logits in the loss",
        "teacher_temperature": "null: the same",
        "topk": "null: the whole vocabulary",
        "topk_support": "whose k largest",
        "topk_tail": "treatment of the others",
        "entry_clip": "of an entry of the vocabulary, nats; null: none",
        "token_clip": "of a token's divergence, nats; null: none",
        "token_weights": "schemes of opsd_kernels.weights, such as MeanOne(PrefixDiscrepancy(0.5))",
        "segment_separator": "text of the token that ends a segment, for SegmentMean",
        "token_reward": "for objective sampled_token",
        "reward_strength": "for token_reward proximal and power",
        "reward_clip": "of a token's reward; null: none",
        "importance_clip": "of the ratio to the policy that sampled",
        "reduction": "",
        "gradient_tolerance": "share of a chunk's gradient that may be left out; null: none",
        "backend": "row backend of the op; null: its choice. Part of the numbers",
        "router_aux_loss_coef": "of a mixture-of-experts student; null: its config's, 0: none",
    },
    "policy gradient": {
        "policy_weight": "its share of the loss; 1 runs no teacher",
        "advantage_std": "true: divide advantages by the group's standard deviation",
        "clip_low": "PPO's, below 1",
        "clip_high": "PPO's, above 1",
    },
    "rehearsal": {
        "rehearsal_prompts": "per step, of the skills to keep",
        "rehearsal_weight": "of their loss",
    },
    "optimiser": {
        "learning_rate": "constant after its warm-up",
        "lr_warmup_steps": "",
        "weight_decay": "",
        "max_grad_norm": "",
        "micro_batch": "rollouts in a forward; the result does not depend on it",
        "share_prompts": "what rows begin with runs once, as a prompt; null: with models other than tiny",
        "gradient_checkpointing": "less memory, more time",
        "lora_rank": "0: every weight trains",
        "lora_alpha": "",
    },
    "evaluation and records": {
        "eval_every": "steps between probes of the accuracies",
        "eval_samples": "answers before and after the run",
        "probe_samples": "answers in a probe",
        "checkpoint_every": "steps",
        "keep_checkpoints": "the newest ones",
        "samples_every": "steps between two whose samples are kept",
        "samples_kept": "answers of such a step in samples.jsonl, with the teacher's prompt",
        "tensorboard": "",
        "cache_dir": "of base models; null: OPSD_CACHE",
    },
    "the tiny model and its warm start": {
        "tiny_hidden": "",
        "tiny_layers": "",
        "tiny_heads": "",
        "warm_seed": "",
        "warm_accuracy": "at which it stops",
        "warm_share": "of the skill to be trained, among examples without a context",
        "warm_batch": "",
        "warm_learning_rate": "",
        "warm_max_steps": "",
    },
}


def commented_yaml(config: TrainConfig) -> str:
    """Return a YAML file that `opsd train` reads back to the same configuration."""
    lines = ["# opsd train THIS_FILE; missing keys have their defaults, --set KEY=VALUE overrides both."]
    for title, keys in COMMENTS.items():
        lines += ["", f"# {title}"]
        for key, comment in keys.items():
            choices = " | ".join(CHOICES.get(key, ()))
            told = "; ".join(part for part in (comment, choices) if part)
            entry = f"{key}: {_scalar(getattr(config, key))}"
            lines.append(f"{entry:<{WIDTH}}  # {told}" if told else entry)
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """Write a value as JSON, with a point in 1e-06, which YAML 1.1 would read as text."""
    text = json.dumps(value)
    mantissa, e, exponent = text.partition("e") if isinstance(value, float) else (text, "", "")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text
