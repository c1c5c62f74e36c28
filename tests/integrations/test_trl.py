"""TRL's trainers with the fused loss against TRL's own: 20 training steps, and one step of every setting."""

import warnings

import pytest
import torch
from trl_trainers import (
    FULL,
    GPU_ONLY,
    JSD,
    NAMES,
    SAMPLED,
    SDPO_DEFAULTS,
    THEIRS,
    TOPK,
    after_training,
    batch_for,
    build,
    compare,
    load,
    one_step,
    parameters,
    with_judge,
)

from opsd_kernels.testing import assert_no_worse, assert_same_bits

trl = pytest.importorskip("trl", minversion="1.14.1", reason="trl is not installed")
transformers, datasets, tokenizers = (
    pytest.importorskip(name) for name in ("transformers", "datasets", "tokenizers")
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "You are importing from 'trl.experimental'"
    from trl.experimental import sdpo

    from opsd_kernels.integrations import trl as fused

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(name, home, monkeypatch):
    """Both trainers sample with the same seed. The truth is float64 on the same batches.

    It is TRL's loss, or the reference's where TRL's is fp32 only.
    """
    if name in GPU_ONLY:
        pytest.skip("the loss of this version of TRL needs a GPU")
    theirs, batches, logged = after_training(THEIRS[name], name, home)
    mine, sampled, also = after_training(getattr(fused, name), name, home)
    assert logged == also and len(mine["evaluation"])
    for one, other in zip(batches, sampled, strict=True):
        assert all(
            torch.equal(one[key], other[key])
            for key in one
            if isinstance(one[key], torch.Tensor) and not one[key].is_floating_point()
        )
    judge = THEIRS[name]
    if name == "DistillationTrainer":
        judge = getattr(fused, name)
        with_judge(monkeypatch)
    truth = after_training(judge, name, home, batches, torch.float64)[0]
    assert (
        truth["losses"].std() > 0
        and (truth["parameters"] - parameters(load(home.student)).double()).abs().max() > 1e-3
    )
    # on the models' own samples, which differ in float64
    truth["evaluation"] = theirs["evaluation"].double()
    for key in truth:
        assert_no_worse(mine[key], theirs[key], truth[key])


@pytest.mark.parametrize(
    "beta, temperature, count", [(0.0, 1.0, None), (0.3, 1.4, 7), (1.0, 0.7, torch.tensor(11.0))]
)
def test_distillation_settings(trio, monkeypatch, beta, temperature, count):
    compare(trio, "DistillationTrainer", monkeypatch, count=count, beta=beta, temperature=temperature)


@pytest.mark.parametrize(
    "settings",
    [
        {**FULL, "distillation_alpha": 0.0},
        {**FULL, "distillation_alpha": 1.0, "temperature": 0.7},
        {**FULL, "distillation_is_clip": None, "distillation_weight": 0.6, "loss_type": "dapo"},
        {**TOPK, "temperature": 1.3},
        {**TOPK, "distillation_add_tail": True, "distillation_weight": 0.3, "loss_type": "dr_grpo"},
        {
            **TOPK,
            "distillation_alpha": 1.0,
            "distillation_weight": 0.7,
            "importance_sampling_level": "sequence",
        },
        SAMPLED,
        {**SAMPLED, "distillation_is_clip": None, "distillation_weight": 0.5, "loss_type": "bnpo"},
        {"distillation_weight": 0.0, "temperature": 1.2},
        {"distillation_weight": 0.0, "importance_sampling_level": "sequence", "loss_type": "dr_grpo"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
@pytest.mark.parametrize("on_policy", [False, True], ids=["later", "on-policy"])
def test_sdpo_settings(trio, monkeypatch, settings, on_policy):
    compare(
        trio,
        "SDPOTrainer",
        monkeypatch,
        ("old_per_token_logps",) if on_policy else (),
        **{**SDPO_DEFAULTS, **settings},
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"distillation_objective": "iw_opd", "iw_opd_gamma": 0.7, "temperature": 1.0},
        {"distillation_objective": "iw_opd", "iw_opd_gamma": 2.0, "temperature": 0.8, "rollout": True},
        {**JSD, "beta": 0.3, "loss_top_k": 0},
        {**JSD, "beta": 1.0, "loss_top_k": 0},
        {**JSD, "beta": 0.0, "loss_top_k": 7},
        {**JSD, "beta": 0.0, "loss_top_k": 7, "loss_add_tail": False},
        {**JSD, "beta": 1.0, "loss_top_k": 7},
        {**JSD, "beta": 1.0, "loss_top_k": 1, "reverse_kl_top_1_mode": "argmax"},
        {**JSD, "beta": 1.0, "loss_top_k": 1, "reverse_kl_top_1_mode": "sampled"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_iw_opd_settings(trio, monkeypatch, settings):
    rollout = settings.get("rollout", False)
    compare(
        trio,
        "IWOPDTrainer",
        monkeypatch,
        () if rollout else ("rollout_logprobs",),
        count=None if rollout else 19,
        **settings,
    )


def test_nothing_to_learn_from(trio):
    """Without a teacher for any sequence the loss is 0 and still has a graph."""
    mine = trio("SDPOTrainer")[1]
    for settings in (FULL, SAMPLED):
        outcome = one_step(
            mine,
            {**batch_for("SDPOTrainer"), "self_distillation_mask": torch.zeros(4)},
            **{**SDPO_DEFAULTS, **settings},
        )
        assert outcome.loss == 0 and outcome.student_hidden.abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_are_made(trio, name):
    """The head is never called, not even for the log-probs of the rollout; TRL's trainers call it."""
    calls = []
    for trainer in trio(name)[:2]:
        hooks = [
            model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
            for model in (trainer.model, trainer.teacher_model)
        ]
        batch = batch_for(name)
        one_step(trainer, batch)
        if name == "SDPOTrainer":
            trainer.args.steps_per_generation = 3
            logprobs = trainer._compute_rollout_logps(
                **{
                    key: batch[key]
                    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
                }
            )
            assert logprobs.shape == batch["completion_ids"].shape and not logprobs.requires_grad
        for hook in hooks:
            hook.remove()
        if trainer is trio(name)[0]:
            assert calls or name == "DistillationTrainer"
            calls.clear()
    assert not calls


def counted(reduced, bucket):
    """Reduce over one process, and record the bucket."""
    reduced.append(bucket.index())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_the_wrapper_of_the_student_runs(trio, tmp_path):
    """Under DDP the loss is computed in the wrapper's forward, whose hooks then reduce the gradients."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for name in NAMES:
            mine, reduced = trio(name)[1], []
            alone = one_step(mine, batch_for(name))
            wrapped = torch.nn.parallel.DistributedDataParallel(mine.model)
            wrapped.register_comm_hook(reduced, counted)
            assert_same_bits(one_step(mine, batch_for(name), model=wrapped), alone)
            assert reduced
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations(trio, name):
    mine = trio(name)[1]
    kept = one_step(mine, batch_for(name))
    runs = []
    hook = mine.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    mine.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_bits(one_step(mine, batch_for(name)), kept)
    mine.model.gradient_checkpointing_disable()
    hook.remove()
    assert len(runs) == 2


def test_adapter_off_is_the_teacher(home):
    """With LoRA the teacher of kind `base` is the student without its adapter, trunk and head."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    outcomes, theirs = [], sdpo.SDPOTrainer
    for cls, dtype in ((theirs, torch.float32), (fused.SDPOTrainer, torch.float32), (theirs, torch.float64)):
        torch.manual_seed(3)
        student = peft.get_peft_model(
            load(home.student, dtype),
            peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
        for key, parameter in student.named_parameters():
            if "lora" in key:
                parameter.data = torch.linspace(-0.3, 0.3, parameter.numel(), dtype=dtype).reshape(
                    parameter.shape
                )
        trainer = build(cls, "SDPOTrainer", home, student=student, teacher_model_kind="base")
        trainer.current_gradient_accumulation_steps = 1
        outcomes.append(one_step(trainer, batch_for("SDPOTrainer"), dtype, **{**SDPO_DEFAULTS, **FULL}))
    plain, actual, truth = outcomes
    assert truth.student_hidden.abs().max() > 0
    assert_no_worse(actual, plain, truth)
