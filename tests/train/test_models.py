"""Models that are unlike Llama: trained right, or refused before the first step."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    RwkvConfig,
)

from opsd_kernels.testing import assert_same_bits, relative_error
from opsd_kernels.train import step as steps
from opsd_kernels.train.batch import make_batch
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.loop import train
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.records.log import read_metrics
from opsd_kernels.train.sampling import agreement
from opsd_kernels.train.sampling.rollout import Sampler, requests
from opsd_kernels.train.teacher import Copy
from opsd_kernels.train.types import Prompt, Rollout, Verdict

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
ENDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
LONG = {"max_seq_len": 128, "d_model": 16, "n_layers": 2, "n_heads": 2, "initializer_range": 0.3}
CONFIGS = {
    # Read nowhere by the model.
    "mpt": lambda v: MptConfig(vocab_size=v, logit_scale=0.25, **LONG, **ENDS),
    "mpt_in_words": lambda v: MptConfig(vocab_size=v, logit_scale="inv_sqrt_d_model", **LONG, **ENDS),
    # A layer between trunk and head.
    "modernbert": lambda v: ModernBertDecoderConfig(
        vocab_size=v, cls_token_id=1, sep_token_id=1, **SHAPE, **{**ENDS, "bos_token_id": 2}
    ),
    # Its base_model is the model itself.
    "llama4": lambda v: Llama4TextConfig(
        vocab_size=v, intermediate_size_mlp=32, head_dim=8, num_local_experts=2, num_key_value_heads=1,
        **SHAPE, **ENDS,
    ),
    "rwkv": lambda v: RwkvConfig(
        vocab_size=v, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=128,
        **ENDS,
    ),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=128,
                                 initializer_range=0.3, tie_word_embeddings=False, **ENDS),
    "opt": lambda v: OPTConfig(
        vocab_size=v, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, init_std=0.3, tie_word_embeddings=False, **ENDS,
    ),
    "bart": lambda v: BartConfig(
        vocab_size=v, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=128, init_std=0.3, is_decoder=True, forced_eos_token_id=None,
        tie_word_embeddings=False, **ENDS,
    ),
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE, **ENDS),
    "mixtral": lambda v: MixtralConfig(
        vocab_size=v, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=1, **SHAPE, **ENDS
    ),
    "encoder": lambda v: BertConfig(vocab_size=v, is_decoder=False, **SHAPE, **ENDS),
    # Counts positions in generate otherwise than in its forward.
    "roberta": lambda v: RobertaConfig(vocab_size=v, is_decoder=True, **SHAPE, **ENDS),
}  # fmt: skip


@pytest.fixture(scope="module")
def vocab(encoder):
    return pretrained.vocabulary(encoder.tokenizer)


def made(kind, vocab, seed=3, **options):
    config = CONFIGS[kind](vocab)
    for name, value in options.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def saved(tmp_path, encoder, vocab):
    """Return a function that saves a model of a kind with the tiny tokenizer."""

    def save(kind, **options):
        made(kind, vocab, **options).save_pretrained(tmp_path / kind)
        encoder.tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture
def settings(config, tmp_path):
    rows = [
        {"prompt": f"{'1+' * (i % 3)}{i}", "answer": str(i), "feedback": "1 2", "split": split}
        for split in ("train", "held_out", "untrained", "rehearsal")
        for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return dataclasses.replace(
        config, model="saved", env="jsonl", data=str(tmp_path / "data.jsonl"), feedback="text", steps=2,
        max_new_tokens=5, rehearsal_prompts=2, learning_rate=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mpt", "modernbert", "llama4", "rwkv", "mixtral"])
def test_trains(kind, saved, settings, tmp_path):
    train(dataclasses.replace(settings, model=str(saved(kind))), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and all(line["divergence"] > 0 for line in lines)


@pytest.mark.parametrize("key", ["model", "teacher_model"])
@pytest.mark.parametrize("kind, match", [
    ("mpt_in_words", "expected a number or None as logit_scale in the config of MptForCausalLM.*inv_sqrt"),
    ("encoder", "expected a causal language model.*is_decoder.*BertLMHeadModel"),
])  # fmt: skip
def test_refused_before_the_first_step(kind, match, key, saved, settings, tmp_path):
    folders = {"model": str(saved(kind))}
    if key == "teacher_model":
        folders = {"model": str(saved("llama")), "teacher_model": folders["model"], "teacher": "external"}
    with pytest.raises(ConfigError, match=f"^{key}: {match}"):
        train(dataclasses.replace(settings, **folders), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_that_samples_otherwise_than_it_scores_is_refused(saved, settings, tmp_path):
    with pytest.raises(ConfigError, match="^model: expected a model whose generate samples.*Roberta"):
        train(dataclasses.replace(settings, model=str(saved("roberta"))), tmp_path / "run")


@pytest.mark.parametrize(
    "kind, together", [("rwkv", "alone"), ("opt", "any"), ("bart", "one length"), ("gpt2", "any")]
)
def test_answers_do_not_depend_on_their_batch(kind, together, vocab, encoder, task):
    """Prompts share a batch unless their answers would depend on it.

    RWKV's cached steps add the rows of a batch up in transformers 5.23; Bart counts positions from the first
    column.
    """
    model = made(kind, vocab)
    if kind == "rwkv":
        model.head.weight.data.mul_(20)
    asked = [
        dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, text="7 " * (i % 4)))
        for i, request in enumerate(requests([task.env(n, 0).prompt() for n in task.train[:6]], 2))
    ]
    many, one = (
        Sampler(encoder, 6, 1.0, batch, vocab).sample(model, task, asked, 0, 1) for batch in (512, 1)
    )
    assert len({len(rollout.prompt_tokens) for rollout in many}) > 2
    assert many == one and len({rollout.tokens for rollout in many}) > 4
    assert agreement.batches(model, 0) == together


def router_gradients(config, vocab, **options):
    """Return the gradients of the routers and of the other weights, and the loss, of one batch."""
    student = made("mixtral", vocab, **options).train()
    gen = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, vocab, (n,), generator=gen).tolist() for n in (3, 5, 4, 4, 6, 3, 2, 4, 1)]
    rollouts = [
        Rollout(Prompt(i, ""), i, 0, tuple(prompt), tuple(answer), "", Verdict(0.0))
        for i, (prompt, answer) in enumerate(zip(rows[:3], rows[6:], strict=True))
    ]
    batch = make_batch(rollouts, [tuple(view) for view in rows[3:6]], 0)
    teacher = Copy(made("mixtral", vocab, seed=5), 0.0)
    loss, _ = steps.gradients(student, teacher, batch, config, vocab)
    parts = ([], [])
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            parts["gate.weight" in name].append(parameter.grad.flatten())
    return torch.cat(parts[1]), torch.cat(parts[0]), loss, student, batch


def test_the_routers_auxiliary_loss_is_added(config, vocab):
    without = router_gradients(config, vocab, router_aux_loss_coef=0.0)
    added = router_gradients(config, vocab, router_aux_loss_coef=10.0)
    assert (added[0] - without[0]).norm() > without[0].norm()
    overruled = router_gradients(
        dataclasses.replace(config, router_aux_loss_coef=10.0), vocab, router_aux_loss_coef=0.1
    )
    assert_same_bits(overruled[0], added[0])
    # transformers' own, without padding.
    *_, student, batch = without
    lengths = [len(rollout.prompt_tokens + rollout.tokens) - 1 for rollout in batch.rollouts]
    mask = (torch.arange(batch.student.tokens_BL.shape[1]) < torch.tensor(lengths)[:, None]).long()
    own = student(batch.student.tokens_BL, attention_mask=mask, output_router_logits=True).aux_loss
    assert relative_error(added[2] - without[2], 10 * own) < 1e-4
    off = router_gradients(
        dataclasses.replace(config, router_aux_loss_coef=0.0), vocab, router_aux_loss_coef=10.0
    )
    assert_same_bits(off[0], without[0])


def test_a_model_without_routers_has_no_auxiliary_loss(saved, settings, tmp_path):
    wanted = dataclasses.replace(settings, model=str(saved("llama")), router_aux_loss_coef=1.0)
    with pytest.raises(ConfigError, match="^router_aux_loss_coef: expected null or 0 for Llama.*got 1.0"):
        train(wanted, tmp_path / "run")
