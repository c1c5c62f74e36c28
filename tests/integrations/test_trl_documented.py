"""TRL's documented example of each trainer, with one import changed: the same losses step by step.

Names of models become those of tiny models on the disk, servers become stand-ins; the configs get a few
settings for a short run on a CPU. GOLD's example is run without `use_uld_loss`, which is refused.
"""

import queue
import random
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from trl_served import COMMON, Client, K, asynchronous, batch_for, datasets, needs_async, transformers
from trl_trainers import GPU_ONLY, SHAPE, tokenizers

from opsd_kernels.integrations import trl as trainers
from opsd_kernels.testing import assert_on_target

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS = 3
# fmt: off
EXAMPLES = {
    "DistillationTrainer": """
from trl import DistillationConfig, DistillationTrainer
train_dataset = Dataset.from_dict({"prompt": PROMPTS})
trainer = DistillationTrainer(
    model="student", teacher_model="teacher", args=DistillationConfig("out", beta=0.5, **SHORT),
    train_dataset=train_dataset,
)
""",
    "GKDTrainer": """
from trl.experimental.gkd import GKDConfig, GKDTrainer
tokenizer = AutoTokenizer.from_pretrained("student")
model, teacher_model = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", "teacher"))
train_dataset = Dataset.from_dict({"messages": CHATS})
training_args = GKDConfig(output_dir="out", **SHORT)
trainer = GKDTrainer(
    model=model, teacher_model=teacher_model, args=training_args, processing_class=tokenizer,
    train_dataset=train_dataset, eval_dataset=train_dataset,
)
""",
    "GOLDTrainer": """
from trl.experimental.gold import GOLDConfig, GOLDTrainer
train_dataset = Dataset.from_dict({"messages": CHATS})
trainer = GOLDTrainer(
    model="student", teacher_model="teacher", args=GOLDConfig(output_dir="out", **SHORT),
    train_dataset=train_dataset,
)
""",
    "SDFTTrainer": """
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
train_dataset = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": PROMPTS[::-1]})
training_args = SDFTConfig(
    output_dir="out", distillation_alpha=0.5, distillation_mode="topk_logits", distillation_topk=5, **SHORT
)
trainer = SDFTTrainer(model="student", args=training_args, train_dataset=train_dataset)
""",
    "SDPOTrainer": """
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
train_dataset = Dataset.from_dict({"prompt": PROMPTS, "privileged_context": PROMPTS[::-1]})
training_args = SDPOConfig(
    output_dir="out", distillation_mode="topk_logits", distillation_topk=100,
    include_environment_feedback=True, **SHORT,
)
trainer = SDPOTrainer(
    model="student", reward_funcs=REWARD, args=training_args, train_dataset=train_dataset,
)
""",
    "IWOPDTrainer": """
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
train_dataset = Dataset.from_dict({"messages": CHATS})
training_args = IWOPDConfig(
    output_dir="out", distillation_objective="iw_opd", iw_opd_gamma=0.5, **SHORT
)
trainer = IWOPDTrainer(
    model="student", teacher_model="teacher", train_dataset=train_dataset, args=training_args,
)
""",
    "ServerDistillationTrainer": """
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
train_dataset = Dataset.from_dict({"prompt": PROMPTS})
config = ServerDistillationConfig("out", teacher_model_server_url="http://localhost:8000", **SHORT)
trainer = ServerDistillationTrainer(model="student", args=config, train_dataset=train_dataset)
""",
    "AsyncDistillationTrainer": """
from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer
train_dataset = Dataset.from_dict({"prompt": PROMPTS})
trainer = AsyncDistillationTrainer(
    model="student", args=AsyncDistillationConfig("out", **SHORT), train_dataset=train_dataset, **STANDINS,
)
""",
}
# fmt: on
SHORT = {
    "GKDTrainer": {"max_new_tokens": 6},
    "SDPOTrainer": {"num_generations": 4},
    "SDFTTrainer": {"num_generations": 1},
    "AsyncDistillationTrainer": {
        "teacher_server_urls": {"one": "http://a"},
        "teacher_top_k": K,
        "token_budget": -1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Save a student and a teacher with a tokenizer of bytes, as GOLD needs it."""
    root = tmp_path_factory.mktemp("documented")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<eos>", "<user>", "<assistant>", *alphabet]
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, pad_token="<pad>", eos_token="<eos>",
        padding_side="left", additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    shape = {**SHAPE, "vocab_size": len(words)}
    for seed, name in enumerate(("student", "teacher")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = transformers.LlamaConfig(hidden_size=32 + 16 * seed, **shape)
            transformers.LlamaForCausalLM(config).save_pretrained(root / name)
        made.save_pretrained(root / name)
    return root


class Teacher(Client):
    """A server's teacher over the bytes."""

    table = (2.0 * torch.randn(260, 260, generator=torch.Generator().manual_seed(8))).log_softmax(-1)


class Standins:
    """A rollout worker and a weight transfer that need no server: the packed rows of a teacher."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        from trl.experimental.async_distillation.async_rollout_worker import RolloutSample

        batch = batch_for("AsyncDistillationTrainer")
        for number in range(4 * (STEPS + 2)):
            rows = {key: batch[key][0, 2:9].numpy() for key in ("input_ids", "completion_mask")}
            rows |= {
                key: np.roll(batch[key][0, 2:9].numpy(), number, 0)
                for key in ("teacher_topk_ids", "teacher_topk_logprobs")
            }
            # TRL up to 1.15.0 packs lists.
            rows = {key: value.tolist() for key, value in rows.items()} if lists() else rows
            sample = {"prompt": [], "completion": [], "model_version": 0, "metrics": {}}
            sample |= {"teacher_id": "one", "prompt_id": number}
            self.rollout_buffer.put(RolloutSample(**sample, **rows))

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def lists():
    from importlib.metadata import version

    return tuple(map(int, version("trl").split(".")[:2])) < (1, 16)


def losses(name, disk, monkeypatch, fused):
    """Run the example, with the trainer of TRL or with ours; return losses and parameters."""
    code = EXAMPLES[name]
    if fused:
        pattern = rf"(import \w+), {name}\n"
        code, changed = re.subn(pattern, rf"\1\nfrom opsd_kernels.integrations.trl import {name}\n", code)
        assert changed == 1
    common = {**COMMON, "max_steps": STEPS, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    if name not in ("GKDTrainer", "AsyncDistillationTrainer"):
        common["max_completion_length"] = 6
    prompts = ["one two", "a", "three four five", "six"] * 4
    session = {
        "PROMPTS": prompts,
        "SHORT": {**common, **SHORT.get(name, {})},
        "Dataset": datasets.Dataset,
        "CHATS": [
            [{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1]}] for p in prompts
        ],
        "REWARD": lambda completions, **_: [float(len(c) % 3) for c in completions],
        "AutoTokenizer": transformers.AutoTokenizer,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
    }
    if name == "AsyncDistillationTrainer":
        session["STANDINS"] = {"rollout_worker": Standins(), "weight_transfer": Standins()}
    monkeypatch.chdir(disk)
    random.seed(0)
    torch.manual_seed(0)
    student = transformers.AutoModelForCausalLM.from_pretrained("student")
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: student)
    with monkeypatch.context() as patch:
        if name == "AsyncDistillationTrainer":
            patch.setattr(asynchronous, "AutoModelForCausalLM", loader)
            patch.setattr(asynchronous, "get_peak_flops_per_device", lambda *_: 1.0, raising=False)
        with mock.patch("trl.generation.vllm_client.VLLMClient", Teacher):
            exec(code, session)
        trainer = session["trainer"]
        if name == "IWOPDTrainer":
            # TRL divides by other numbers: test_the_divisor_is_what_was_sampled.
            loss = trainer.compute_loss
            count = lambda inputs: (inputs["labels"] != -100).sum()  # noqa: E731
            trainer.compute_loss = lambda model, inputs, *_, **__: loss(
                model, inputs, num_items_in_batch=count(inputs)
            )
        trainer.train()
    values = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(values), torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_every_trainer_has_its_example():
    assert set(EXAMPLES) == set(trainers.__all__) - {"FusedLoss"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=needs_async) if x == "AsyncDistillationTrainer" else x for x in EXAMPLES],
)
def test_one_import_changed(name, disk, monkeypatch):
    if name in GPU_ONLY:
        pytest.skip("the loss of this version of TRL needs a GPU")
    theirs, trained = losses(name, disk, monkeypatch, fused=False)
    ours, parameters = losses(name, disk, monkeypatch, fused=True)
    assert len(ours) == STEPS and ours.isfinite().all() and ours.abs().max() > 0.01
    assert_on_target(ours, theirs, "loss")
    assert_on_target(parameters, trained, "loss")
