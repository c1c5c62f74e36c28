"""TRL's trainers with the fused loss beside TRL's own: 20 steps of training, one step of every setting, TRL's defects, settings that are refused."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from opsd_kernels.testing import Outcome, assert_no_worse, assert_same_bits
from opsd_kernels.testing.reference import linear_divergence_reference

trl = pytest.importorskip("trl", minversion="1.16", reason="trl is not installed")
transformers, datasets, tokenizers = (
    pytest.importorskip(name) for name in ("transformers", "datasets", "tokenizers")
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "You are importing from 'trl.experimental'"
    from trl.experimental import iw_opd, sdpo

    from opsd_kernels.integrations import trl as fused

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("DistillationTrainer", "SDPOTrainer", "IWOPDTrainer")
THEIRS = {
    "DistillationTrainer": trl.DistillationTrainer,
    "SDPOTrainer": sdpo.SDPOTrainer,
    "IWOPDTrainer": iw_opd.IWOPDTrainer,
}
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
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, padding_side="left", **special
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Directories of a student and of a teacher of another architecture and width."""
    root = tmp_path_factory.mktemp("models")
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
SETTINGS = {  # those of the 20 steps
    "DistillationTrainer": {"beta": 0.5, "temperature": 1.3},
    "SDPOTrainer": {**LOGITS, "distillation_alpha": 0.5, "distillation_is_clip": 1.02, "distillation_weight": 0.8, "num_generations": 4,
                    "steps_per_generation": 4, "loss_type": "grpo", "teacher_update_rate": 0.3},
    "IWOPDTrainer": {"max_length": 64, "iw_opd_gamma": 0.7},
}  # fmt: skip


def load(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def build(cls, name, home, dtype=torch.float32, data=None, student=None, teacher=None, **settings):
    """A trainer of `cls` on the models of `home`, in `dtype`."""
    common = {"output_dir": home.out, "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1, "bf16": False,
              "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False, "max_completion_length": 8,
              "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "per_device_eval_batch_size": 4}  # fmt: skip
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
    """Keeps the batches that the loss got and what it returned; with batches given, feeds those instead of sampling."""

    fed, divisor = None, True

    def _prepare_inputs(self, generation_batch):
        if self.fed is None:
            return super()._prepare_inputs(generation_batch)
        batch = copied(self.fed[len(self.losses)], self.model.dtype)
        self._buffered_inputs, self._buffer_step = [batch], 1
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.divisor and isinstance(self, iw_opd.IWOPDTrainer):
            num_items_in_batch = (
                inputs["labels"] != -100
            ).sum()  # what TRL's loss needs to be right: see test_divisor_is_what_was_sampled
        self.batches.append(copied(inputs))
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def recorded(cls, fed=None, divisor=True):
    return type("Recorded", (Recorded, cls), {"fed": fed, "divisor": divisor, "batches": [], "losses": []})


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def after_training(cls, name, home, fed=None, dtype=torch.float32):
    """Losses and metrics by step, those of an evaluation, all parameters, the batches, and the names of everything that was logged."""
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


def judged(*operands, **options):
    loss = linear_divergence_reference(*operands, **options)
    return (loss[0], SimpleNamespace(**loss[1])) if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps(name, home, monkeypatch):
    """Both sample for themselves, from the same seed. The truth is float64 on the same batches: TRL's loss, or the judge's where TRL's knows fp32 only."""
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
        monkeypatch.setattr(fused, "linear_divergence", judged)
    truth = after_training(judge, name, home, batches, torch.float64)[0]
    assert (
        truth["losses"].std() > 0
        and (truth["parameters"] - parameters(load(home.student)).double()).abs().max() > 1e-3
    )
    truth["evaluation"] = theirs[
        "evaluation"
    ].double()  # on what the models sample, which float64 samples otherwise
    for key in truth:
        assert_no_worse(mine[key], theirs[key], truth[key])


def ragged(lengths, width, left):
    """(B, width) 0 / 1."""
    columns = torch.arange(width)
    lengths = torch.tensor(lengths)[:, None]
    return (columns >= width - lengths if left else columns < lengths).long()


def batch_for(name):
    """Four sequences of unequal length, one of them without a token that counts, one without a teacher."""
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
    """Loss and gradient of all parameters, with settings changed on the trainer."""
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


@pytest.fixture(scope="module")
def trio(home):
    """TRL's in fp32, ours in fp32, and what judges them, in float64."""
    made = {}

    def get(name):
        if name not in made:
            judge = getattr(fused, name) if name == "DistillationTrainer" else THEIRS[name]
            settings = {"teacher_model_kind": "base"} if name == "SDPOTrainer" else {}
            classes = (
                (THEIRS[name], torch.float32),
                (getattr(fused, name), torch.float32),
                (judge, torch.float64),
            )
            made[name] = [build(cls, name, home, dtype, **settings) for cls, dtype in classes]
            for trainer in made[name]:
                trainer.current_gradient_accumulation_steps = 2
                if name == "SDPOTrainer":  # a teacher that is not the student
                    trainer.teacher_model.load_state_dict(
                        {k: 0.9 * v for k, v in trainer.teacher_model.state_dict().items()}
                    )
        return made[name]

    return get


def compare(trio, name, monkeypatch, without=(), count=None, **changes):
    batch = {key: value for key, value in batch_for(name).items() if key not in without}
    theirs, mine, judge = trio(name)
    plain, actual = (
        one_step(theirs, batch, count=count, **changes),
        one_step(mine, batch, count=count, **changes),
    )
    metrics = [
        {key: torch.tensor(value[0]) for key, value in sorted(trainer._metrics["train"].items())}
        for trainer in (mine, theirs)
    ]
    with monkeypatch.context() as patch:
        if name == "DistillationTrainer":
            patch.setattr(fused, "linear_divergence", judged)
        truth = one_step(judge, batch, torch.float64, count=count, **changes)
    assert_no_worse(actual, plain, truth)
    assert truth.student_hidden.abs().max() > 0
    true_metrics = {
        key: torch.tensor(value[0], dtype=torch.float64) for key, value in judge._metrics["train"].items()
    }
    assert metrics[0].keys() == metrics[1].keys() == true_metrics.keys()
    for key, value in true_metrics.items():
        assert_no_worse(metrics[0][key], metrics[1][key], value)


@pytest.mark.parametrize(
    "beta, temperature, count", [(0.0, 1.0, None), (0.3, 1.4, 7), (1.0, 0.7, torch.tensor(11.0))]
)
def test_distillation_settings(trio, monkeypatch, beta, temperature, count):
    compare(trio, "DistillationTrainer", monkeypatch, count=count, beta=beta, temperature=temperature)


FULL, TOPK = (
    {"distillation_mode": "full_logits"},
    {"distillation_mode": "topk_logits", "distillation_topk": 9},
)
SAMPLED = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}
SDPO_DEFAULTS = {"distillation_alpha": 0.4, "distillation_add_tail": False, "distillation_is_clip": 1.2, "distillation_weight": 1.0, "temperature": 1.0,
                 "loss_type": "grpo", "importance_sampling_level": "token"}  # fmt: skip


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


JSD = {"distillation_objective": "jsd", "temperature": 1.3, "loss_add_tail": True}


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
    """No sequence has a teacher: the loss is 0 and attached."""
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
    """The head is never called, by TRL's it is; nor for the log-probs of the rollout."""
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
    """A reduction over one process."""
    reduced.append(bucket.index())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_the_wrapper_of_the_student_runs(trio, tmp_path):
    """Under DDP the loss is made inside the wrapper's forward, whose hooks then reduce the gradients."""
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
    """LoRA: the teacher of kind `base` is the student without its adapter, trunk and head."""
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


def masked_head(path, dtype):
    """A model with one vocabulary entry that is never sampled: probability zero on both sides."""
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
    """One step of TRL's and of ours in fp32, then of ours with the judge's loss, in fp32 and in float64. `make(cls, dtype)` gives a trainer."""
    mine, op, outcomes = getattr(fused, name), fused.linear_divergence, []
    for cls, dtype, loss in (
        (THEIRS[name], torch.float32, op),
        (mine, torch.float32, op),
        (mine, torch.float32, judged),
        (mine, torch.float64, judged),
    ):
        trainer = make(cls, dtype)
        trainer.current_gradient_accumulation_steps = 1
        with monkeypatch.context() as patch:
            patch.setattr(fused, "linear_divergence", loss)
            outcomes.append(one_step(trainer, batch, dtype, **settings))
    return outcomes


@pytest.mark.parametrize(
    "name, settings",
    [("SDPOTrainer", {**SDPO_DEFAULTS, **FULL}), ("IWOPDTrainer", {**JSD, "beta": 1.0, "loss_top_k": 0})],
)
def test_a_masked_vocabulary_entry(home, monkeypatch, name, settings):
    """TRL's loss is NaN: 0 * (-inf + inf). Ours is what the other entries say."""

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
    """The losses of one optimisation step as the optimizer sees them, and the batches."""
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
    """TRL's own loss in float64, over the number of tokens that were sampled."""
    judge = build(iw_opd.IWOPDTrainer, "IWOPDTrainer", home, torch.float64)
    count = sum((batch["labels"] != -100).sum() for batch in batches)
    return sum(
        judge.compute_loss(
            judge.model.train(), copied(batch, torch.float64), num_items_in_batch=count
        ).detach()
        for batch in batches
    ), count


def test_the_divisor_is_what_was_sampled(home):
    """TRL's counts the data set's completions, `gradient_accumulation_steps` times: none in a data set of prompts, and too many with accumulation."""
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
    """TRL's DistillationTrainer leaves the forward that has autocast in it: with bf16=True it computes in fp32. Its SDPOTrainer does not."""
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


def test_recurrent_gemma_keeps_its_softcap(home, monkeypatch):
    """TRL's DistillationTrainer does not know `logits_soft_cap`."""

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
    adapted = peft.get_peft_model(
        load(home.student), peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="^model: expected .* a linear head that has no adapter of its own"):
        build(fused.SDPOTrainer, "SDPOTrainer", home, student=adapted, teacher_model_kind="base")
    with pytest.raises(ValueError, match="^teacher_model: expected a local model"):
        fused.DistillationTrainer(
            load(home.student),
            None,
            trl.DistillationConfig(home.out, bf16=False, use_cpu=True),
            PROMPTS,
            processing_class=tokenizer(),
        )


def test_options_of_the_op_are_within_reach(home):
    """A subclass states what TRL's config has no word for."""
    limited = type(
        "Limited", (fused.DistillationTrainer,), {"loss_options": {"token_clip": 0.05, "backend": "torch"}}
    )
    batch = batch_for("DistillationTrainer")
    free, clipped = (
        one_step(build(cls, "DistillationTrainer", home), batch).loss
        for cls in (fused.DistillationTrainer, limited)
    )
    assert 0 < clipped < free / 2
