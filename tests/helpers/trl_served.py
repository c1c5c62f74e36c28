"""Teachers behind a server for TRL's trainers, GKD, GOLD and SDFT: builders and batches of one step."""

import contextlib
import queue
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from trl_trainers import CHATS, PROMPTS, STEPS, V, load, ragged, tokenizer

trl = pytest.importorskip("trl", minversion="1.14.1", reason="trl is not installed")
transformers, datasets = (pytest.importorskip(name) for name in ("transformers", "datasets"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "You are importing from 'trl.experimental'"
    from trl.experimental import gkd, gold, sdft, server_distillation

    from opsd_kernels.integrations.trl import server_distillation as fused_server

try:
    from trl.experimental.async_distillation import async_distillation_trainer as asynchronous

    from opsd_kernels.integrations.trl import async_distillation as fused_async
except ModuleNotFoundError:  # aiohttp, before TRL 1.16
    asynchronous = fused_async = None

THEIRS = {
    "GKDTrainer": gkd.GKDTrainer,
    "GOLDTrainer": gold.GOLDTrainer,
    "SDFTTrainer": sdft.SDFTTrainer,
    "ServerDistillationTrainer": server_distillation.ServerDistillationTrainer,
    "AsyncDistillationTrainer": getattr(asynchronous, "AsyncDistillationTrainer", None),
}
CONFIGS = {
    "GKDTrainer": gkd.GKDConfig,
    "GOLDTrainer": gold.GOLDConfig,
    "SDFTTrainer": sdft.SDFTConfig,
    "ServerDistillationTrainer": server_distillation.ServerDistillationConfig,
    "AsyncDistillationTrainer": getattr(asynchronous, "AsyncDistillationConfig", None),
}
# Trainers with a teacher's list, and the module that calls the op.
SERVED = {"ServerDistillationTrainer": fused_server, "AsyncDistillationTrainer": fused_async}
needs_async = pytest.mark.skipif(asynchronous is None, reason="aiohttp is not installed")
K = 6
COMMON = {
    "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1,
    "bf16": False, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    "gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
SETTINGS = {
    "GKDTrainer": {"max_new_tokens": 8, "beta": 0.4},
    # It prepares data for tokenizers of bytes alone.
    "GOLDTrainer": {"max_completion_length": 8, "beta": 0.4, "temperature": 1.3,
                    "dataset_kwargs": {"skip_prepare_dataset": True}},
    "SDFTTrainer": {"max_completion_length": 8, "distillation_is_clip": 1.02, "num_generations": 1,
                    "distillation_mode": "full_logits", "distillation_alpha": 0.4},
    "ServerDistillationTrainer": {"max_completion_length": 8, "beta": 0.0, "loss_top_k": K,
                                  "teacher_model_server_url": "http://localhost:1"},
    "AsyncDistillationTrainer": {"beta": 0.0, "teacher_top_k": K,
                                 "teacher_server_urls": {"one": "http://a", "two": "http://b"}},
}  # fmt: skip
ASKED = datasets.Dataset.from_dict(
    {"prompt": PROMPTS["prompt"], "privileged_context": [f"w{9 + i} w8" for i in range(len(PROMPTS))]}
)
DATA = {"GKDTrainer": CHATS, "GOLDTrainer": CHATS, "SDFTTrainer": ASKED}
TABLE = (2.0 * torch.randn(V, V, generator=torch.Generator().manual_seed(8))).log_softmax(-1)


class Client:
    """Stand in for TRL's VLLMClient: a teacher whose distribution depends on the last token."""

    table = TABLE

    def __init__(self, *args, **kwargs):
        self.temperatures = []

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        self.temperatures.append(temperature)
        result = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for sequence, start in zip(sequences, prompt_lengths, strict=True):
            rows = self.table[sequence[start - 1 : -1]]
            best = rows.topk(top_logprobs)
            own = rows.gather(-1, torch.tensor(sequence[start:]).view(-1, 1))
            for name, values in zip(result, (best.values, best.indices, own), strict=True):
                result[name].append(values.tolist())
        return result


class Worker:
    """Stand in for the rollout worker of AsyncDistillationTrainer."""

    rollout_buffer = queue.Queue()

    def start(self):
        """No rollouts."""

    stop = start


def build(cls, name, home, dtype=torch.float32, student=None, teacher=None, **settings):
    """Build a trainer of `cls` on the models of `home`, in `dtype`, without a server."""
    config = CONFIGS[name](output_dir=home.out, **{**COMMON, **SETTINGS[name], **settings})
    student = load(home.student, dtype) if student is None else student
    arguments = {"args": config, "train_dataset": DATA.get(name, PROMPTS), "processing_class": tokenizer()}
    with contextlib.ExitStack() as patches:
        if name == "AsyncDistillationTrainer":
            # It loads the student by name, with an attention for GPUs.
            loader = SimpleNamespace(from_pretrained=lambda *_, **__: student)
            patches.enter_context(mock.patch.object(asynchronous, "AutoModelForCausalLM", loader))
            if hasattr(asynchronous, "get_peak_flops_per_device"):  # reads a GPU
                flops = mock.patch.object(asynchronous, "get_peak_flops_per_device", lambda *_: 1.0)
                patches.enter_context(flops)
            arguments |= {"rollout_worker": Worker(), "weight_transfer": SimpleNamespace()}
        if name == "ServerDistillationTrainer":
            patches.enter_context(mock.patch("trl.generation.vllm_client.VLLMClient", Client))
        if name in ("GKDTrainer", "GOLDTrainer"):
            arguments["teacher_model"] = load(home.teacher, dtype) if teacher is None else teacher
        trainer = cls(model="student" if name == "AsyncDistillationTrainer" else student, **arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.current_gradient_accumulation_steps = 2
    return trainer


def batch_for(name):
    """Make four sequences of unequal length, one without a valid token; for async one packed row."""
    gen = torch.Generator().manual_seed(1)
    prompt, longer, completion = (
        ragged((2, 5, 3, 4), 5, True),
        ragged((9, 6, 7, 9), 9, True),
        ragged((6, 4, 1, 0), 6, False),
    )
    p_ids, t_ids, c_ids = (
        torch.randint(5, V, mask.shape, generator=gen) * mask for mask in (prompt, longer, completion)
    )
    tokens, attended = torch.cat([p_ids, c_ids], 1), torch.cat([prompt, completion], 1)
    if name in ("GKDTrainer", "GOLDTrainer"):
        labels = torch.where(completion == 1, c_ids, -100)
        labels = torch.cat([torch.full_like(p_ids, -100), labels], 1)
        return {"input_ids": tokens, "attention_mask": attended, "labels": labels}
    parts = {
        "prompt_ids": p_ids, "prompt_mask": prompt, "completion_ids": c_ids, "completion_mask": completion
    }  # fmt: skip
    if name == "ServerDistillationTrainer":
        return parts
    if name == "SDFTTrainer":
        teacher = {
            "teacher_input_ids": torch.cat([t_ids, c_ids], 1),
            "teacher_attention_mask": torch.cat([longer, completion], 1),
        }
        return {**parts, **teacher, "old_per_token_logps": -4 - torch.rand(c_ids.shape, generator=gen)}
    return packed(tokens, attended, torch.cat([torch.zeros_like(prompt), completion], 1))


def packed(tokens, attended, completion):
    """The row of a rank as TRL's collator packs it, with padding for a longer one at its end."""
    sequences = [row[keep] for row, keep in zip(tokens, attended.bool(), strict=True)]
    masks = [row[keep] for row, keep in zip(completion, attended.bool(), strict=True)]
    ids, logprobs, teachers = [], [], []
    for number, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        rows = TABLE[sequence.roll(1)]
        best = rows.topk(K)
        own, again = sequence[:, None], (best.indices == sequence[:, None]).any(-1, keepdim=True)
        each = torch.cat([best.indices, own.masked_fill(again, -1)], -1)
        values = torch.cat([best.values, rows.gather(-1, own).masked_fill(again, -torch.inf)], -1)
        # Nothing was returned for one of the tokens, and prompts have no teacher.
        known = mask.clone()
        known[-1] = number != 1
        ids.append(each.masked_fill(known[:, None] == 0, -1))
        logprobs.append(values.masked_fill(known[:, None] == 0, -torch.inf))
        teachers.append(torch.full_like(sequence, number % 2))
    batch = {
        "input_ids": torch.cat(sequences), "attention_mask": torch.ones(sum(map(len, sequences))),
        "completion_mask": torch.cat(masks),
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences]),
        "teacher_topk_ids": torch.cat(ids), "teacher_topk_logprobs": torch.cat(logprobs),
        "teacher_id_idx": torch.cat(teachers),
    }  # fmt: skip
    fill = {"teacher_topk_ids": -1, "teacher_topk_logprobs": -torch.inf, "teacher_id_idx": -1}
    batch = {
        key: torch.cat([value, value.new_full((3, *value.shape[1:]), fill.get(key, 0))])[None]
        for key, value in batch.items()
    }
    batch["attention_mask"] = batch["attention_mask"].long()
    count = float(completion.sum())
    numbers = {"global_n_tokens": count, "global_n_forward_tokens": 2 * count, "mean_seq_len": 5.0}
    return batch | {key: torch.tensor([value]) for key, value in numbers.items()}
