"""Small TRL trainers, with TRL's own loss and with the fused one, and batches for one step of each."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from opsd_kernels.testing import Outcome, assert_no_worse
from opsd_kernels.testing.reference import linear_divergence_reference

trl = pytest.importorskip("trl", minversion="1.14.1", reason="trl is not installed")
transformers, datasets, tokenizers = (
    pytest.importorskip(name) for name in ("transformers", "datasets", "tokenizers")
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "You are importing from 'trl.experimental'"
    from trl.experimental import iw_opd, sdpo

    from opsd_kernels.integrations import trl as fused
    from opsd_kernels.integrations.trl import distillation, self_distillation
    from opsd_kernels.integrations.trl import iw_opd as fused_iw_opd

NAMES = ("DistillationTrainer", "SDPOTrainer", "IWOPDTrainer")
THEIRS = {
    "DistillationTrainer": trl.DistillationTrainer,
    "SDPOTrainer": sdpo.SDPOTrainer,
    "IWOPDTrainer": iw_opd.IWOPDTrainer,
}
# TRL 1.15 computes this loss by a Triton kernel alone.
on_cpu = trl.__version__.startswith("1.15.") and not torch.cuda.is_available()
GPU_ONLY = ("DistillationTrainer",) if on_cpu else ()
V, STEPS = 64, 20
SHAPE = {
    "vocab_size": V,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SHAPE |= {"max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(V - 5))]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}<assistant> {% endif %}"
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, padding_side="left", **special
    )


def reward(completions, **_):
    return [float("w1" in completion or "w7" in completion) for completion in completions]


PROMPTS = datasets.Dataset.from_dict(
    {"prompt": [" ".join(f"w{i + j}" for j in range(2 + i % 3)) for i in range(24)]}
)
ASKED = datasets.Dataset.from_dict(
    {"messages": [[{"role": "user", "content": prompt}] for prompt in PROMPTS["prompt"]]}
)
CHATS = datasets.Dataset.from_dict(
    {"messages": [[*chat, {"role": "assistant", "content": "w1 w2 w3 w4 w5"}] for chat in ASKED["messages"]]}
)
LOGITS = {"distillation_mode": "topk_logits", "distillation_topk": 8, "distillation_add_tail": True}
# Settings of the 20 steps.
SETTINGS = {
    "DistillationTrainer": {"beta": 0.5, "temperature": 1.3},
    "SDPOTrainer": {**LOGITS, "distillation_alpha": 0.5, "distillation_is_clip": 1.02,
                    "distillation_weight": 0.8, "num_generations": 4, "steps_per_generation": 4,
                    "loss_type": "grpo", "teacher_update_rate": 0.3},
    "IWOPDTrainer": {"max_length": 64, "iw_opd_gamma": 0.7},
}  # fmt: skip


def load(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def build(cls, name, home, dtype=torch.float32, data=None, student=None, teacher=None, **settings):
    """Build a trainer of `cls` on the models of `home`, in `dtype`."""
    common = {
        "output_dir": home.out, "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3,
        "logging_steps": 1, "bf16": False, "report_to": [], "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "gradient_checkpointing": False, "max_completion_length": 8,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    settings, student = (
        {**common, **SETTINGS[name], **settings},
        load(home.student, dtype) if student is None else student,
    )
    if name == "SDPOTrainer":
        trainer = cls(
            student,
            reward,
            sdpo.SDPOConfig(**settings),
            PROMPTS if data is None else data,
            processing_class=tokenizer(),
        )
    else:
        config, prompts = (
            (trl.DistillationConfig, PROMPTS)
            if name == "DistillationTrainer"
            else (iw_opd.IWOPDConfig, CHATS)
        )
        data = prompts if data is None else data
        trainer = cls(
            student,
            load(home.teacher, dtype) if teacher is None else teacher,
            config(**settings),
            train_dataset=data,
            processing_class=tokenizer(),
        )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def copied(batch, dtype=None):
    return {
        k: (v.to(dtype) if dtype and v.is_floating_point() else v.clone())
        if isinstance(v, torch.Tensor)
        else v
        for k, v in batch.items()
    }


class Recorded:
    """Record batches and losses. Batches in `fed` replace sampled ones."""

    fed, divisor = None, True

    def _prepare_inputs(self, generation_batch):
        if self.fed is None:
            return super()._prepare_inputs(generation_batch)
        batch = copied(self.fed[len(self.losses)], self.model.dtype)
        self._buffered_inputs, self._buffer_step = [batch], 1
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.divisor and isinstance(self, iw_opd.IWOPDTrainer):
            # TRL's loss needs this count: see test_the_divisor_is_what_was_sampled.
            num_items_in_batch = (inputs["labels"] != -100).sum()
        self.batches.append(copied(inputs))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def recorded(cls, fed=None, divisor=True):
    return type("Recorded", (Recorded, cls), {"fed": fed, "divisor": divisor, "batches": [], "losses": []})


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def after_training(cls, name, home, fed=None, dtype=torch.float32):
    """Train and evaluate. Returns losses, metrics and parameters, the batches, and all logged names.

    The losses and metrics are by step.
    """
    torch.manual_seed(0)
    trainer = build(recorded(cls, fed), name, home, dtype)
    trainer.train()
    if fed is None:
        trainer.evaluate(trainer.train_dataset.select(range(2)))
    logs = trainer.state.log_history
    of_the_loss = (
        "entropy",
        "grad_norm",
        "iw_opd",
        "sdpo",
        "self_distillation/distillation_loss",
        "self_distillation/policy_loss",
    )
    kept = [key for key in sorted(logs[STEPS - 1]) if key.startswith(of_the_loss)]
    metrics = torch.tensor([[log[key] for key in kept] for log in logs[:STEPS]], dtype=torch.float64)
    losses = torch.stack(trainer.losses)
    values = {
        "losses": losses[:STEPS],
        "evaluation": losses[STEPS:],
        "parameters": parameters(trainer.model),
        **dict(zip(kept, metrics.T, strict=True)),
    }
    return values, trainer.batches, set().union(*logs)


def with_judge(patch):
    """Replace linear_divergence by the reference in all trainers."""
    for part in (distillation, self_distillation, fused_iw_opd):
        patch.setattr(part, "linear_divergence", judged)


def judged(*operands, **options):
    loss = linear_divergence_reference(*operands, **options)
    return (loss[0], SimpleNamespace(**loss[1])) if isinstance(loss, tuple) else loss


def ragged(lengths, width, left):
    """Return a mask (B, width) of 0 and 1."""
    columns = torch.arange(width)
    lengths = torch.tensor(lengths)[:, None]
    return (columns >= width - lengths if left else columns < lengths).long()


def batch_for(name):
    """Make four sequences of unequal length, one without a valid token, one without a teacher."""
    gen = torch.Generator().manual_seed(1)
    prompt, longer, completion = (
        ragged((2, 5, 3, 4), 5, True),
        ragged((9, 6, 7, 9), 9, True),
        ragged((6, 4, 1, 0), 6, False),
    )
    p_ids, t_ids, c_ids = (
        torch.randint(5, V, mask.shape, generator=gen) * mask for mask in (prompt, longer, completion)
    )
    if name == "IWOPDTrainer":
        labels = torch.cat([torch.full_like(p_ids, -100), torch.where(completion == 1, c_ids, -100)], 1)
        rollout = -4 - torch.rand(labels.shape, generator=gen)
        return {
            "input_ids": torch.cat([p_ids, c_ids], 1),
            "attention_mask": torch.cat([prompt, completion], 1),
            "labels": labels,
            "rollout_logprobs": rollout,
        }
    batch = {
        "prompt_ids": p_ids,
        "prompt_mask": prompt,
        "completion_ids": c_ids,
        "completion_mask": completion,
    }
    if name == "DistillationTrainer":
        return {**batch, "tool_mask": (torch.rand(c_ids.shape, generator=gen) > 0.3).long()}
    batch |= {
        "teacher_input_ids": torch.cat([t_ids, c_ids], 1),
        "teacher_attention_mask": torch.cat([longer, completion], 1),
    }
    batch |= {
        "self_distillation_mask": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "advantages": torch.tensor([1.0, -0.5, 0.3, 2.0]),
    }
    return {**batch, "old_per_token_logps": -4 - torch.rand(c_ids.shape, generator=gen)}


def one_step(trainer, batch, dtype=torch.float32, count=None, model=None, **changes):
    """Return the loss and the gradient of all parameters, with settings changed on the trainer."""
    for key, value in changes.items():
        for holder in (trainer, trainer.args):
            if hasattr(holder, key):
                setattr(holder, key, value)
    trainer._metrics["train"].clear()
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(
        trainer.model if model is None else model, copied(batch, dtype), num_items_in_batch=count
    )
    loss.backward()
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in trainer.model.parameters()
        if p.requires_grad
    ]
    return Outcome(loss.detach(), torch.cat([grad.reshape(-1) for grad in grads]))


def compare(trio, name, monkeypatch, without=(), count=None, **changes):
    batch = {key: value for key, value in batch_for(name).items() if key not in without}
    theirs, mine, judge = trio(name)
    with monkeypatch.context() as patch:
        if name in GPU_ONLY:
            with_judge(patch)
        plain = one_step(theirs, batch, count=count, **changes)
    actual = one_step(mine, batch, count=count, **changes)
    metrics = [
        {key: torch.tensor(value[0]) for key, value in sorted(trainer._metrics["train"].items())}
        for trainer in (mine, theirs)
    ]
    with monkeypatch.context() as patch:
        if name == "DistillationTrainer":
            with_judge(patch)
        truth = one_step(judge, batch, torch.float64, count=count, **changes)
    assert_no_worse(actual, plain, truth)
    assert truth.student_hidden.abs().max() > 0
    true_metrics = {
        key: torch.tensor(value[0], dtype=torch.float64) for key, value in judge._metrics["train"].items()
    }
    assert metrics[0].keys() == metrics[1].keys() == true_metrics.keys()
    for key, value in true_metrics.items():
        assert_no_worse(metrics[0][key], metrics[1][key], value)


FULL, TOPK = (
    {"distillation_mode": "full_logits"},
    {"distillation_mode": "topk_logits", "distillation_topk": 9},
)
SAMPLED = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
SDPO_DEFAULTS = {"distillation_alpha": 0.4, "distillation_add_tail": False, "distillation_is_clip": 1.2,
                 "distillation_weight": 1.0, "temperature": 1.0, "loss_type": "grpo",
                 "importance_sampling_level": "token"}  # fmt: skip
JSD = {"distillation_objective": "jsd", "temperature": 1.3, "loss_add_tail": True}


def make_models(root):
    """Save a student and a teacher of another architecture and width below `root`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, **SHAPE))
        teacher = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(hidden_size=48, tie_word_embeddings=True, **SHAPE)
        )
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return SimpleNamespace(
        student=str(root / "student"), teacher=str(root / "teacher"), out=str(root / "out")
    )


def make_trio(home):
    """Return a function that makes TRL's trainer and ours in fp32, and the truth's in float64."""
    made = {}

    def get(name):
        if name not in made:
            judge = getattr(fused, name) if name == "DistillationTrainer" else THEIRS[name]
            settings = {"teacher_model_kind": "base"} if name == "SDPOTrainer" else {}
            classes = (
                (getattr(fused, name) if name in GPU_ONLY else THEIRS[name], torch.float32),
                (getattr(fused, name), torch.float32),
                (judge, torch.float64),
            )
            made[name] = [build(cls, name, home, dtype, **settings) for cls, dtype in classes]
            for trainer in made[name]:
                trainer.current_gradient_accumulation_steps = 2
                if name == "SDPOTrainer":  # a teacher unlike the student
                    trainer.teacher_model.load_state_dict(
                        {k: 0.9 * v for k, v in trainer.teacher_model.state_dict().items()}
                    )
        return made[name]

    return get
