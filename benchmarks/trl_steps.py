"""TRL's trainers with their loss and with ours: time and peak memory by steps.py.

    python benchmarks/trl_steps.py [--rounds 3] [--tokens 64] [--dtype float32 --dtype bfloat16]
        [--json FILE]

A step is compute_loss and its backward pass; sampling and the optimiser are TRL's on both sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from steps import HIDDEN, PROMPT, SEQUENCES, Integration, V, lengths, main
from torch import Tensor

ROWS = {
    "DistillationTrainer": "JSD, beta 0.5",
    "SDPOTrainer": "top-20 with tail, alpha 0.5, importance clip",
    "IWOPDTrainer": "sampled tokens, prefix weights",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DistillationTrainer": {"beta": 0.5},
    "SDPOTrainer": {
        "teacher_model_kind": "live",
        "distillation_mode": "topk_logits",
        "distillation_topk": 20,
        "distillation_add_tail": True,
        "distillation_alpha": 0.5,
        "num_generations": SEQUENCES,
    },
    "IWOPDTrainer": {"max_length": 1024},
}


def model(seed: int, dtype: str, folder: str) -> Any:
    """Return a randomly initialised Qwen2 with an LM head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    made = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V,
            initializer_range=0.1,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            **shape,
        )
    )
    # IWOPDTrainer loads the teacher's tokenizer from here.
    made.config._name_or_path = folder
    return made.to(getattr(torch, dtype))


def tokenizer(folder: str) -> Any:
    """Return a tokenizer with special tokens alone, saved in `folder`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.save_pretrained(folder)
    return made


def trainer(name: str, side: str, dtype: str, folder: str) -> Any:
    """Return TRL's trainer or ours; student and teacher have heads of their own."""
    warnings.simplefilter("ignore")
    import trl
    from datasets import Dataset
    from trl.experimental import iw_opd, sdpo

    from opsd_kernels.integrations import trl as fused

    theirs = {
        "DistillationTrainer": trl.DistillationTrainer,
        "SDPOTrainer": sdpo.SDPOTrainer,
        "IWOPDTrainer": iw_opd.IWOPDTrainer,
    }
    config = {
        "DistillationTrainer": trl.DistillationConfig,
        "SDPOTrainer": sdpo.SDPOConfig,
        "IWOPDTrainer": iw_opd.IWOPDConfig,
    }[name]
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": SEQUENCES,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "gradient_checkpointing": False,
    }
    words, student, teacher = tokenizer(folder), model(0, dtype, folder), model(1, dtype, folder)
    others = (lambda completions, **_: [0.0] * len(completions),) if name == "SDPOTrainer" else (teacher,)
    data = Dataset.from_dict({"prompt": ["a"] * 8})
    made = (theirs[name] if side == "trl" else getattr(fused, name))(
        student, *others, config(**common, **SETTINGS[name]), train_dataset=data, processing_class=words
    )
    made.teacher_model, made.current_gradient_accumulation_steps = teacher, 1
    return made


def batch(name: str, tokens: int) -> dict[str, Any]:
    """Return SEQUENCES completions, of the lengths in steps.lengths, in the trainer's format."""
    gen = torch.Generator().manual_seed(0)
    mask, asked = (
        (torch.arange(tokens) < lengths(tokens)[:, None]).long(),
        torch.ones(SEQUENCES, PROMPT, dtype=torch.int64),
    )
    prompt, completion = (
        torch.randint(3, V, (SEQUENCES, width), generator=gen) for width in (PROMPT, tokens)
    )
    if name == "IWOPDTrainer":
        labels = torch.cat([torch.full_like(prompt, -100), torch.where(mask == 1, completion, -100)], 1)
        return {
            "input_ids": torch.cat([prompt, completion], 1),
            "attention_mask": torch.cat([asked, mask], 1),
            "labels": labels,
        }
    made: dict[str, Any] = {
        "prompt_ids": prompt,
        "prompt_mask": asked,
        "completion_ids": completion,
        "completion_mask": mask,
    }
    made |= {
        "teacher_input_ids": torch.cat([prompt, prompt, completion], 1),
        "teacher_attention_mask": torch.cat([asked, asked, mask], 1),
    }
    return {
        **made,
        "advantages": torch.zeros(SEQUENCES),
        "old_per_token_logps": -12 - torch.rand(completion.shape, generator=gen),
    }


def build(
    name: str, side: str, dtype: str, folder: str, fp32: bool
) -> tuple[list[Tensor], Callable[[int], Callable[[], Tensor]]]:
    """Return the parameters and the loss of one side (steps.Build)."""
    made = trainer(name, side, dtype, folder)
    made.model.train()
    if fp32:
        made.model.float(), made.teacher_model.float()

    def losses(tokens: int) -> Callable[[], Tensor]:
        inputs = batch(name, tokens)
        return lambda: made.compute_loss(made.model, inputs)

    return list(made.model.parameters()), losses


INTEGRATION = Integration("trl", "TRL", ROWS, build)

if __name__ == "__main__":
    main(INTEGRATION)
