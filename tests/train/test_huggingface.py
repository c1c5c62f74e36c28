"""Five architectures with random weights: the fused loss is the loss of the model's own logits."""

import copy
import dataclasses
import json
import sys
import types

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from opsd_kernels.integrations.transformers import Head
from opsd_kernels.testing import assert_no_worse, assert_same_bits
from opsd_kernels.train import objective
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import completion_hidden, make_batch
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.loop import train
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records.log import read_metrics
from opsd_kernels.train.sampling.rollout import Request, Sampler, requests
from opsd_kernels.train.shared_prompts import hidden_states
from opsd_kernels.train.teacher import AdapterOff, Copy
from opsd_kernels.train.types import Context, Prompt, Rollout, Verdict

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SHAPE |= {
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PADDING = 7  # rows of the head without a token
CONFIGS = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, tie_word_embeddings=True, **SHAPE),
    "gemma2": lambda v: Gemma2Config(
        vocab_size=v,
        head_dim=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0,
        sliding_window=4,
        **SHAPE,
    ),
    "mistral": lambda v: MistralConfig(vocab_size=v, head_dim=8, sliding_window=4, **SHAPE),
    "cohere": lambda v: CohereConfig(vocab_size=v, logit_scale=0.25, **SHAPE),
}


@pytest.fixture
def vocab(encoder):
    return pretrained.vocabulary(encoder.tokenizer)


@pytest.fixture(params=CONFIGS)
def made(request, vocab):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        CONFIGS[request.param](vocab + PADDING), dtype=torch.float32
    ).eval()


@pytest.fixture
def batch(vocab):
    gen = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, vocab, (n,), generator=gen).tolist() for n in (3, 7, 5, 4, 9, 6, 2, 4, 1)]
    prompts, views, answers = rows[:3], rows[3:6], rows[6:]
    rollouts = [
        Rollout(Prompt(i, ""), i, 0, tuple(prompt), tuple(answer), "", Verdict(0.0))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return make_batch(rollouts, [tuple(view) for view in views], 0)


def own_logits(model, side, vocab):
    """Return the logits of the model's own forward, without padding."""
    return completion_hidden(model(input_ids=side.tokens_BL).logits, side.rows_BT)[..., :vocab]


def dense(student, teacher, batch, vocab):
    log_q = (
        own_logits(student, batch.student, vocab)
        .to(torch.promote_types(student.dtype, torch.float32))
        .log_softmax(-1)
    )
    with torch.no_grad():
        log_p = own_logits(teacher, batch.teacher, vocab).to(log_q.dtype).log_softmax(-1)
    loss = ((log_q.exp() * (log_q - log_p)).sum(-1) * batch.mask_BT).sum() / batch.mask_BT.sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in student.parameters())]


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            parameter.mul_(
                1
                + 0.2
                * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype) + index).view_as(parameter)
            )
    return other


def fused(student, teacher, batch, vocab, **changes):
    loss, _ = steps.gradients(
        student, Copy(teacher, 0.0), batch, TrainConfig(backend="torch", **changes), vocab
    )
    return [loss, *(p.grad for p in student.parameters())]


def test_the_fused_loss_is_the_loss_of_the_models_own_logits(made, batch, vocab):
    """Compared in fp32: in bf16 the trunk's rounding dominates both errors, and one may cancel by chance."""
    teacher = moved(made)
    truth = dense(copy.deepcopy(made).double(), copy.deepcopy(teacher).double(), batch, vocab)
    peer = dense(copy.deepcopy(made), teacher, batch, vocab)
    for actual, p, t in zip(fused(copy.deepcopy(made), teacher, batch, vocab), peer, truth, strict=True):
        assert_no_worse(actual, p, t)


def test_checkpointed_activations_give_the_same_gradient(made, batch, vocab):
    teacher, plain = moved(made), fused(copy.deepcopy(made).train(), moved(made), batch, vocab)
    pretrained.recompute_activations(made)
    for actual, expected in zip(fused(made.train(), teacher, batch, vocab), plain, strict=True):
        assert_same_bits(actual, expected)


def test_generation_follows_the_full_forward_and_never_draws_padding(made, encoder, task, vocab):
    sampler = Sampler(encoder, 6, 1.5, 5, vocab)
    made.get_output_embeddings().weight.data[vocab:] *= 20
    rollouts = sampler.sample(
        made, task, requests([task.env(problem, 0).prompt() for problem in task.train[:4]], 3), 0
    )
    batch = make_batch(rollouts, [rollout.prompt_tokens for rollout in rollouts], 0)
    with torch.no_grad():
        probabilities = (own_logits(made, batch.student, vocab).double() / 1.5).softmax(-1)
    drawn = probabilities.gather(-1, batch.labels_BT.clamp(min=0)[..., None])[..., 0][batch.mask_BT]
    assert batch.labels_BT.max() < vocab and drawn.min() > 0
    assert len({rollout.tokens for rollout in rollouts}) > 8
    again = Sampler(encoder, 6, 1.5, 12, vocab).sample(
        made, task, requests([task.env(problem, 0).prompt() for problem in task.train[:4]], 3), 0
    )
    assert again == rollouts, "the cache and the padding of a batch change nothing"


def test_teacher_and_student_may_be_padded_differently(vocab, batch):
    torch.manual_seed(5)
    student, teacher = (
        AutoModelForCausalLM.from_config(CONFIGS["llama"](vocab + extra), dtype=torch.float32)
        for extra in (2, 9)
    )
    truth = dense(copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), batch, vocab)
    peer = dense(copy.deepcopy(student), teacher, batch, vocab)
    for actual, p, t in zip(fused(student, teacher, batch, vocab), peer, truth, strict=True):
        assert_no_worse(actual, p, t)


@pytest.fixture
def folder(tmp_path, encoder, vocab):
    """Save a bf16 Gemma-2 with the tiny tokenizer."""
    torch.manual_seed(6)
    AutoModelForCausalLM.from_config(
        CONFIGS["gemma2"](vocab + PADDING), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "model")
    encoder.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    rows = [
        {"prompt": f"{i}+{i}", "answer": str(i), "feedback": "1 2", "split": split}
        for split in ("train", "held_out", "untrained", "rehearsal")
        for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def run_settings(config, folder, data, **changes):
    common = {
        "env": "jsonl",
        "data": str(data),
        "model": str(folder),
        "feedback": "text",
        "steps": 4,
        "max_new_tokens": 5,
        "rehearsal_prompts": 2,
    }
    return dataclasses.replace(config, **{**common, "learning_rate": 1e-2, **changes})


def test_a_directory_in_bf16_with_checkpointing_and_several_updates_runs_and_resumes(
    config, folder, data, tmp_path
):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>")
    settings = run_settings(
        config,
        folder,
        data,
        dtype="bfloat16",
        gradient_checkpointing=True,
        chat_template=str(template),
        updates_per_batch=2,
    )
    train(settings, tmp_path / "whole")
    train(dataclasses.replace(settings, steps=2), tmp_path / "part")
    (tmp_path / "part" / "summary.json").unlink()
    (tmp_path / "part" / "config.json").write_text(settings.to_json())
    train(settings, tmp_path / "part", resume=True)
    for name in ("model", "teacher", "reference", "optimizer"):
        paths = [
            tmp_path / run / "checkpoint" / "step_000004" / f"{name}.safetensors" for run in ("whole", "part")
        ]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(line["divergence"] > 0 and line["rehearsal_loss"] is not None for line in lines)


@pytest.mark.parametrize("teacher", ["adapter_off", "ema"])
def test_lora_trains_the_adapter_alone_and_resumes(config, folder, data, tmp_path, teacher):
    pytest.importorskip("peft", reason="peft, the library of the adapters, is not installed")
    settings = run_settings(config, folder, data, lora_rank=2, teacher=teacher)
    train(settings, tmp_path / "whole")
    train(dataclasses.replace(settings, steps=2), tmp_path / "part")
    (tmp_path / "part" / "summary.json").unlink()
    (tmp_path / "part" / "config.json").write_text(settings.to_json())
    train(settings, tmp_path / "part", resume=True)
    newest = [tmp_path / run / "checkpoint" / "step_000004" for run in ("whole", "part")]
    assert (newest[0] / "adapter_model.safetensors").read_bytes() == (
        newest[1] / "adapter_model.safetensors"
    ).read_bytes()
    assert not (newest[0] / "model.safetensors").exists()
    base, adapted = (
        pretrained.load_pretrained(folder, settings)[0],
        pretrained.load_student(folder, newest[0], settings)[0],
    )
    plain = dict(base.named_parameters())
    kept = {
        name: p for name, p in pretrained.without_adapter(adapted).named_parameters() if "lora" not in name
    }
    assert all(p.equal(plain[name.replace(".base_layer", "")]) for name, p in kept.items())
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in adapted.named_parameters())


def test_the_teacher_without_the_adapter_is_the_base(folder, config, vocab, batch):
    pytest.importorskip("peft", reason="peft, the library of the adapters, is not installed")
    base, _ = pretrained.load_pretrained(folder, config)
    adapted, _ = pretrained.load_student(folder, None, dataclasses.replace(config, lora_rank=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    teacher = AdapterOff(adapted)
    with torch.no_grad(), teacher.using() as model:
        off = hidden_states(model, batch.teacher)
    with torch.no_grad():
        assert_same_bits(off, hidden_states(base.eval(), batch.teacher))
        assert not hidden_states(adapted, batch.teacher).equal(off)
    assert not Head.of(adapted).weight.requires_grad
    loss, _ = objective.step_loss(adapted, teacher, batch, config, batch.totals, vocab)
    loss.backward()
    assert {p.grad is not None for p in adapted.parameters() if p.requires_grad} == {True}


@pytest.mark.parametrize(
    "library, changes", [("peft", {"lora_rank": 2}), ("vllm", {"rollout_engine": "vllm"})]
)
def test_an_optional_library_that_is_missing_is_named(config, folder, monkeypatch, library, changes):
    monkeypatch.setitem(sys.modules, library, None)
    key = next(iter(changes))
    # Not a TrainConfig, since rollout_engine=vllm requires device=cuda.
    settings = types.SimpleNamespace(**{**dataclasses.asdict(config), **changes})
    told = {"peft": "peft is not installed", "vllm": "vLLM is not installed"}[library]
    with pytest.raises(ConfigError, match=f"{key}: expected .*, as {told}"):
        pretrained.load_student(folder, None, settings) if library == "peft" else models_engine(settings)


def models_engine(settings):
    from opsd_kernels.train.sampling.rollout import make_engine

    return make_engine(settings)


@pytest.fixture
def vllm(config, monkeypatch):
    """Return the record of a stand-in for vLLM: the calls of its engines and their arguments."""
    asked = types.SimpleNamespace(weights=None, prompts=[], params=[], calls=[], options=[])

    class Engine:
        def __init__(self, **options):
            asked.options.append(options)

        def apply_model(self, function):
            asked.calls.append("load")
            function(
                types.SimpleNamespace(load_weights=lambda weights: setattr(asked, "weights", dict(weights)))
            )

        def reset_prefix_cache(self):
            asked.calls.append("reset")
            return True

        def generate(self, prompts, params, use_tqdm):
            asked.calls.append("generate")
            asked.prompts += prompts
            asked.params += params
            longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
            assert longest + params[0]["max_tokens"] <= asked.options[-1]["max_model_len"]
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[10, 11, 1, 12])])
                for _ in prompts
            ]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    asked.settings = types.SimpleNamespace(
        **{**dataclasses.asdict(config), "rollout_engine": "vllm", "model": "somewhere"}
    )
    return asked


def test_what_vllm_is_asked_for(vllm, encoder, task, model, vocab):
    """It gets the weights and one seed per answer; its tokens are cut at a stop."""
    sampler = Sampler(encoder, 4, 0.7, 5, vocab, models_engine(vllm.settings))
    rollouts = sampler.sample(
        model, task, requests([task.env(problem, 0).prompt() for problem in task.train[:4]], 2), 0, 1
    )
    (options,) = vllm.options
    assert options["model"] == "somewhere" and options["trust_remote_code"] is False
    assert options["max_num_seqs"] == vllm.settings.rollout_batch
    assert vllm.weights["lm_head.weight"].equal(model.lm_head.weight)
    assert [tuple(prompt["prompt_token_ids"]) for prompt in vllm.prompts] == [
        rollout.prompt_tokens for rollout in rollouts
    ]
    assert len({params["seed"] for params in vllm.params}) == 8 and vllm.params[0]["temperature"] == 0.7
    assert {rollout.tokens for rollout in rollouts} == {(10, 11, 1)}


def test_vllm_forgets_the_keys_and_values_of_the_weights_before(vllm, encoder, task, model, vocab):
    sampler = Sampler(encoder, 4, 0.7, 5, vocab, models_engine(vllm.settings))
    for step in range(2):
        sampler.sample(model, task, requests([task.env(7, 0).prompt()], 9), 0, step)
    assert vllm.calls == ["load", "reset", "generate"] * 2


def test_vllm_holds_the_longest_view_and_its_answer(vllm, encoder, task, model, vocab):
    """A longer view makes another engine, of twice the length within the model's own."""
    sampler = Sampler(encoder, 4, 0.7, 2, vocab, models_engine(vllm.settings))
    prompt, lengths = task.env(7, 0).prompt(), []
    for digits in ([1, 9], [1], [10], [200], [150]):
        asked = [Request(prompt, 0, n, Context(("1" * n,))) for n in digits]
        rollouts = sampler.sample(model, task, asked, 0, 1)
        lengths.append(max(len(rollout.prompt_tokens) for rollout in rollouts) + 4)
    made = [options["max_model_len"] for options in vllm.options]
    assert made == [lengths[0], 2 * lengths[0], lengths[3]]
    assert model.config.max_position_embeddings >= made[1]


def test_a_teacher_of_another_vocabulary_is_refused(encoder, task):
    from opsd_kernels.train.models import tiny

    with pytest.raises(
        ConfigError, match="teacher_model: expected a tokenizer with the student's vocabulary"
    ):
        pretrained.check_same_vocabulary(
            encoder.tokenizer, tiny.build_tokenizer((*task.vocabulary, "more"), task.template)
        )
