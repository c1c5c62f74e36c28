"""TRL's trainers with the fused loss: unusual models, TRL's defects, and refused settings."""

import warnings

import pytest
import torch
from trl_trainers import (
    ASKED,
    CHATS,
    FULL,
    GPU_ONLY,
    JSD,
    PROMPTS,
    SDPO_DEFAULTS,
    SHAPE,
    THEIRS,
    V,
    batch_for,
    build,
    copied,
    load,
    one_step,
    recorded,
    tokenizer,
    with_judge,
)

from opsd_kernels.testing import assert_no_worse

trl = pytest.importorskip("trl", minversion="1.14.1", reason="trl is not installed")
transformers, datasets, tokenizers = (
    pytest.importorskip(name) for name in ("transformers", "datasets", "tokenizers")
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "You are importing from 'trl.experimental'"
    from trl.experimental import iw_opd

    from opsd_kernels.integrations import trl as fused

pytestmark = pytest.mark.filterwarnings("ignore")


def masked_head(path, dtype):
    """Load a model in which one vocabulary entry has probability zero."""
    model = load(path, dtype)
    head, width = model.get_output_embeddings(), model.config.hidden_size
    biased = torch.nn.Linear(width, V, dtype=dtype)
    biased.weight = head.weight
    biased.bias = torch.nn.Parameter(
        torch.where(torch.arange(V) == V - 1, -torch.inf, 0.0).to(dtype), requires_grad=False
    )
    model.set_output_embeddings(biased)
    return model


def beside_the_judge(name, monkeypatch, batch, make, **settings):
    """Take one step of TRL's and ours in fp32, then of ours on the reference loss in fp32 and float64."""
    mine, outcomes = getattr(fused, name), []
    for cls, dtype, by_reference in (
        (THEIRS[name], torch.float32, False),
        (mine, torch.float32, False),
        (mine, torch.float32, True),
        (mine, torch.float64, True),
    ):
        trainer = make(cls, dtype)
        trainer.current_gradient_accumulation_steps = 1
        with monkeypatch.context() as patch:
            if by_reference:
                with_judge(patch)
            outcomes.append(one_step(trainer, batch, dtype, **settings))
    return outcomes


@pytest.mark.parametrize(
    "name, settings",
    [("SDPOTrainer", {**SDPO_DEFAULTS, **FULL}), ("IWOPDTrainer", {**JSD, "beta": 1.0, "loss_top_k": 0})],
)
def test_a_masked_vocabulary_entry(home, monkeypatch, name, settings):
    """TRL's loss is NaN: 0 * (-inf + inf). Ours is the sum over the other entries."""

    def make(cls, dtype):
        teacher = (
            {"teacher_model_kind": "live"}
            if name == "SDPOTrainer"
            else {"teacher": masked_head(home.teacher, dtype)}
        )
        return build(cls, name, home, student=masked_head(home.student, dtype), **teacher)

    batch = {
        key: torch.where(value == V - 1, 9, value) if not value.is_floating_point() else value
        for key, value in batch_for(name).items()
    }
    theirs, actual, plain, truth = beside_the_judge(name, monkeypatch, batch, make, **settings)
    assert theirs.loss.isnan() and truth.loss > 0
    assert_no_worse(actual, plain, truth)


def step_of_iw_opd(cls, home, data, dtype=torch.float32, **settings):
    """Return the losses of one optimisation step, as the optimizer gets them, and the batches."""
    torch.manual_seed(0)
    trainer = build(
        recorded(cls, divisor=False),
        "IWOPDTrainer",
        home,
        dtype,
        data=data,
        max_steps=1,
        per_device_train_batch_size=2,
        **settings,
    )
    trainer.train()
    return torch.stack(trainer.losses).sum(), trainer


def true_step(home, batches):
    """Return TRL's own loss in float64, over the number of sampled tokens."""
    judge = build(iw_opd.IWOPDTrainer, "IWOPDTrainer", home, torch.float64)
    count = sum((batch["labels"] != -100).sum() for batch in batches)
    return sum(
        judge.compute_loss(
            judge.model.train(), copied(batch, torch.float64), num_items_in_batch=count
        ).detach()
        for batch in batches
    ), count


def test_the_divisor_is_what_was_sampled(home):
    """The loss is divided by the number of sampled tokens.

    TRL's counts the data set's completions, `gradient_accumulation_steps` times: none in a data set of
    prompts, and too many with accumulation.
    """
    theirs, _ = step_of_iw_opd(iw_opd.IWOPDTrainer, home, ASKED)
    assert not theirs.isfinite()
    for data, steps in ((ASKED, 1), (CHATS, 2)):
        mine, trainer = step_of_iw_opd(fused.IWOPDTrainer, home, data, gradient_accumulation_steps=steps)
        truth, sampled = true_step(home, trainer.batches)
        assert len(trainer.batches) == steps
        assert_no_worse(mine, truth.float(), truth)
    theirs, _ = step_of_iw_opd(iw_opd.IWOPDTrainer, home, CHATS, gradient_accumulation_steps=2)
    counted = 2 * 4 * 5  # two copies of four completions of five tokens
    assert counted != sampled
    assert_no_worse(theirs * counted / sampled, truth.float(), truth)


@pytest.mark.parametrize("name", ["DistillationTrainer", "SDPOTrainer"])
def test_mixed_precision_is_what_the_config_says(home, name):
    """With bf16=True the loss runs under autocast.

    TRL's DistillationTrainer leaves the forward that enters autocast and computes in fp32; its SDPOTrainer
    does not.
    """
    if name in GPU_ONLY:
        pytest.skip("the loss of this version of TRL needs a GPU")
    seen = {}
    for cls in (THEIRS[name], getattr(fused, name)):
        trainer = build(
            cls, name, home, bf16=True, **({"teacher_model_kind": "live"} if name == "SDPOTrainer" else {})
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        layer = trainer.model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda _, __, output, key=cls: seen.update({key: output.dtype}))
        assert one_step(trainer, batch_for(name)).loss.isfinite()
    assert seen == {
        THEIRS[name]: torch.float32 if name == "DistillationTrainer" else torch.bfloat16,
        getattr(fused, name): torch.bfloat16,
    }


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_sdpo_teacher_does_not_drop_out(home, kind):
    """With disable_dropout=False the student drops out; the teacher, which may be the student, does not."""
    student = load(home.student)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = build(
        fused.SDPOTrainer,
        "SDPOTrainer",
        home,
        student=student,
        teacher_model_kind=kind,
        disable_dropout=False,
    )
    trainer.current_gradient_accumulation_steps = 1
    seen, norms = [], {id(model): model for model in (trainer.model, trainer.teacher_model)}
    for model in norms.values():
        model.model.norm.register_forward_hook(lambda _, __, states: seen.append(states.detach()))
    # The first step also tries padding on the model.
    for _ in range(3):
        one_step(trainer, batch_for("SDPOTrainer"))
        assert trainer.model.training
    teacher, mine, again, other = seen[-4:]
    assert torch.equal(teacher, again) and not torch.equal(mine, other)


@pytest.mark.skipif("DistillationTrainer" in GPU_ONLY, reason="the loss of this version of TRL needs a GPU")
def test_recurrent_gemma_keeps_its_softcap(home, monkeypatch):
    """TRL's DistillationTrainer ignores `logits_soft_cap`."""

    def model(seed, dtype):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = transformers.RecurrentGemmaConfig(
                hidden_size=32, lru_width=32, head_dim=8, logits_soft_cap=0.7, **SHAPE
            )
            return transformers.RecurrentGemmaForCausalLM(config).to(dtype)

    def make(cls, dtype):
        return build(cls, "DistillationTrainer", home, student=model(0, dtype), teacher=model(1, dtype))

    theirs, actual, plain, truth = beside_the_judge(
        "DistillationTrainer", monkeypatch, batch_for("DistillationTrainer"), make
    )
    assert_no_worse(actual, plain, truth)
    with pytest.raises(AssertionError, match="loss: error"):
        assert_no_worse(theirs, plain, truth)


@pytest.mark.parametrize(
    "name, settings, match",
    [
        (
            "SDPOTrainer",
            {"distillation_mode": "topk_logits", "distillation_topk": None},
            "^distillation_topk: expected a number",
        ),
        ("SDPOTrainer", {"loss_type": "sapo"}, "^loss_type: expected 'grpo', .*got 'sapo'"),
        ("SDPOTrainer", {"use_teacher_server": True}, "^use_teacher_server: expected False.*got True"),
        (
            "IWOPDTrainer",
            {"distillation_objective": "jsd", "beta": 0.5, "loss_top_k": 4},
            "^loss_top_k: expected 0 where 0 < beta < 1.*got 4",
        ),
        (
            "IWOPDTrainer",
            {"use_teacher_server": True, "teacher_model_server_url": "http://localhost:1"},
            "^use_teacher_server: expected False",
        ),
    ],
)
def test_settings_without_a_fused_loss_are_refused(home, name, settings, match):
    with pytest.raises(ValueError, match=match):
        build(getattr(fused, name), name, home, **settings)


def test_models_without_a_fused_loss_are_refused(home):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load(home.student), config)
    with pytest.raises(ValueError, match="^model: expected a plain LoRA on the head"):
        build(fused.SDPOTrainer, "SDPOTrainer", home, student=adapted, teacher_model_kind="base")
    with pytest.raises(ValueError, match="^teacher_model: expected a local model"):
        fused.DistillationTrainer(
            load(home.student),
            None,
            trl.DistillationConfig(home.out, bf16=False, use_cpu=True),
            PROMPTS,
            processing_class=tokenizer(),
        )


@pytest.mark.parametrize("value", [True, False])
def test_the_trainer_decides_whether_the_op_returns_statistics(home, value):
    told = type("Told", (fused.DistillationTrainer,), {"loss_options": {"return_stats": value}})
    with pytest.raises(ValueError, match="^loss_options: expected options without return_stats"):
        build(told, "DistillationTrainer", home)


def test_options_of_the_op_are_within_reach(home):
    """A subclass sets options that TRL's config lacks."""
    limited = type(
        "Limited", (fused.DistillationTrainer,), {"loss_options": {"token_clip": 0.05, "backend": "torch"}}
    )
    batch = batch_for("DistillationTrainer")
    free, clipped = (
        one_step(build(cls, "DistillationTrainer", home), batch).loss
        for cls in (fused.DistillationTrainer, limited)
    )
    assert 0 < clipped < free / 2
