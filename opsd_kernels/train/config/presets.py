"""The kinds of feedback of each environment, and the settings in which it differs from the defaults."""

from __future__ import annotations

from typing import Any

FEEDBACK: dict[str, tuple[str, ...]] = {
    "secret_op": ("answer", "first", "first_two", "last", "marks", "wrong", "corrupted", "other", "none"),
    "expr": ("case", "answer", "wrong", "none"),
    "mastermind": ("counts", "answer", "wrong", "none"),
    "chain": ("where", "answer", "wrong", "none"),
    "plan": ("where", "plan", "answer", "wrong", "none"),
    "python": ("answer", "error", "test", "wrong", "none"),
    "jsonl": ("text", "answer", "error", "test", "wrong", "none"),
}
# Kinds that need verifier=python, of the rows of a data file.
RUN_FEEDBACK = ("error", "test", "wrong")

# Defaults of load_config, which the user's settings override. Answers differ in length, and skills in how
# fast a base model learns them in part.
PRESETS: dict[str, dict[str, Any]] = {
    "secret_op": {},
    "expr": {"feedback": "case", "max_new_tokens": 8, "warm_share": 0.5},
    # `opsd discover`, 12 hard questions, rate 1e-3: in 256 attempts forward KL found 11 and reverse KL 9. Of
    # 6 questions in 128 attempts at rate 3e-3, EMA .1 found 4 and .003 found 3.
    "mastermind": {
        "feedback": "counts",
        "warm_share": 0.6,
        "warm_accuracy": 0.03,
        "learning_rate": 2e-3,
        "ema_rate": 0.1,
        "divergence": "forward_kl",
    },
    # With feedback `where` the teacher of `chain` is worse than its student (.31 against .39), which 100
    # steps bring to 0: hence the whole answer as feedback.
    "chain": {"max_new_tokens": 13, "warm_share": 0.3},
    "plan": {"max_new_tokens": 10, "warm_share": 0.05, "warm_accuracy": 0.3},
    # For SmolLM2-135M, whose answers are three times as often right at temperature .5 as at 1. A rate of
    # 1.5e-4 drew it away from its teacher within 8 steps. A checkpoint takes 2.2 GB.
    "python": {
        "model": "smollm2",
        "threads": 2,
        "steps": 48,
        "prompts_per_step": 8,
        "group_size": 2,
        "max_new_tokens": 32,
        "rollout_temperature": 0.5,
        "rollout_batch": 64,
        "rehearsal_prompts": 0,
        "teacher": "frozen",
        "learning_rate": 5e-5,
        "lr_warmup_steps": 3,
        "micro_batch": 8,
        "eval_samples": 128,
        "probe_samples": 32,
        "keep_checkpoints": 1,
    },
    "jsonl": {
        "feedback": "text",
        "max_new_tokens": 256,
        "rehearsal_prompts": 0,
        "ema_rate": None,
        "learning_rate": 1e-6,
        "micro_batch": 8,
    },
}
