"""Distil on-policy in TRL with the fused loss: a tiny student learns a tiny teacher's distribution.

    pip install . trl    # in a checkout of the repository
    python examples/trl_distillation.py

Takes under a minute on a CPU, offline. With real models only the last lines are needed: pass model names
instead of the models made here.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import DistillationConfig

# Instead of: from trl import DistillationTrainer
from opsd_kernels.integrations.trl import DistillationTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(seed: int, width: int, spread: float) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **shape,
        )
    )


class Report(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if "entropy" in logs:
            measured = f"reverse KL {logs['loss']:.3f} nats   student entropy {logs['entropy']:.2f} nats"
            print(f"step {state.global_step:3d}   {measured}")


with tempfile.TemporaryDirectory() as folder:
    config = DistillationConfig(
        folder, beta=1.0, max_completion_length=12, per_device_train_batch_size=16, max_steps=120,
        learning_rate=1e-2, logging_steps=20, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"w{i % 61} w{(7 * i) % 61}" for i in range(500)]})
    student, teacher = make_model(0, 64, spread=0.05), make_model(1, 64, spread=0.15)
    trainer = DistillationTrainer(
        student,
        teacher,
        config,
        train_dataset=prompts,
        processing_class=make_tokenizer(),
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
