"""GKD, GOLD, SDFT and the trainers of a teacher's server: one step of every setting, as TRL's."""

from types import SimpleNamespace

import pytest
import torch
from trl_served import SERVED, THEIRS, batch_for, build, needs_async
from trl_trainers import SHAPE, fused, one_step

from opsd_kernels.testing import assert_no_worse, assert_one_rounding
from opsd_kernels.testing.reference import linear_topk_divergence_reference

pytestmark = pytest.mark.filterwarnings("ignore")


def judged_list(*operands, **options):
    loss = linear_topk_divergence_reference(*operands, **options)
    return (loss[0], SimpleNamespace(**loss[1])) if isinstance(loss, tuple) else loss


@pytest.fixture(scope="module")
def trios(home):
    """Make TRL's trainer and ours in fp32 and the judge in float64: TRL's, or ours on the reference."""
    made = {}

    def get(name):
        if name not in made:
            kind = {"teacher_model_kind": "base"} if name == "SDFTTrainer" else {}
            judge = getattr(fused, name) if name in SERVED else THEIRS[name]
            classes = (
                (THEIRS[name], torch.float32),
                (getattr(fused, name), torch.float32),
                (judge, torch.float64),
            )
            made[name] = [build(cls, name, home, dtype, **kind) for cls, dtype in classes]
            for trainer in made[name]:
                if name == "SDFTTrainer":  # a teacher unlike the student
                    state = trainer.teacher_model.state_dict()
                    trainer.teacher_model.load_state_dict({k: 0.9 * v for k, v in state.items()})
        return made[name]

    return get


def compare(trios, name, monkeypatch, without=(), count=None, **changes):
    """Compare loss, gradient and metrics of one step with TRL's; the truth is float64."""
    batch = {key: value for key, value in batch_for(name).items() if key not in without}
    theirs, mine, judge = trios(name)
    plain, actual = (one_step(trainer, batch, count=count, **changes) for trainer in (theirs, mine))
    with monkeypatch.context() as patch:
        if name in SERVED:
            patch.setattr(SERVED[name], "linear_topk_divergence", judged_list)
        truth = one_step(judge, batch, torch.float64, count=count, **changes)
    assert truth.student_hidden.abs().max() > 0
    assert_no_worse(actual, plain, truth)
    logged = [trainer._metrics["train"] for trainer in (mine, theirs, judge)]
    assert logged[0].keys() == logged[1].keys()
    for key, (value,) in logged[2].items():
        pair = [torch.tensor(each[key][0]) for each in logged[:2]]
        if name in SERVED:  # the judge is ours
            assert_one_rounding(pair[0], pair[1].double(), torch.float32, magnitude=10.0, name=key)
        else:
            assert_no_worse(*pair, torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize("beta, count", [(0.0, None), (0.3, 7), (1.0, torch.tensor(11.0))])
@pytest.mark.parametrize("name", ["GKDTrainer", "GOLDTrainer"])
def test_labelled_sequences(trios, monkeypatch, name, beta, count):
    """GOLD divides the logits by its temperature, GKD does not."""
    compare(trios, name, monkeypatch, count=count, beta=beta, temperature=0.7)


@pytest.mark.parametrize(
    "settings",
    [
        {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
        {"distillation_mode": "full_logits", "num_loss_tokens_to_skip": 2, "temperature": 0.7},
        {"distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_add_tail": True},
        {"distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_alpha": 1.0},
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "num_loss_tokens_to_skip": 1},
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "distillation_is_clip": None},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
@pytest.mark.parametrize("on_policy", [False, True], ids=["later", "on-policy"])
def test_sdft_settings(trios, monkeypatch, settings, on_policy):
    defaults = {"distillation_alpha": 0.4, "distillation_add_tail": False, "distillation_is_clip": 1.2,
                "temperature": 1.0, "num_loss_tokens_to_skip": 0}  # fmt: skip
    without = ("old_per_token_logps",) if on_policy else ()
    compare(trios, "SDFTTrainer", monkeypatch, without, **{**defaults, **settings})


# One entry, renormalised, is 1 on both sides: such a loss is 0.
@pytest.mark.parametrize(
    "beta, k, tail",
    [(0.0, 6, True), (0.0, 6, False), (0.0, 1, True), (0.3, 1, True), (0.3, 1, False), (1.0, 1, True)],
)
def test_server_settings(trios, monkeypatch, beta, k, tail):
    settings = {"beta": beta, "loss_top_k": k, "loss_add_tail": tail, "temperature": 0.7}
    asked = trios("ServerDistillationTrainer")[1].teacher_client.temperatures
    asked.clear()
    compare(trios, "ServerDistillationTrainer", monkeypatch, **settings)
    assert {*asked} == {0.7}


@needs_async
@pytest.mark.parametrize("beta, tail", [(0.0, True), (0.0, False), (0.3, True), (0.3, False), (1.0, True)])
@pytest.mark.parametrize("teachers", [1, 2])
def test_async_settings(trios, monkeypatch, beta, tail, teachers):
    """Losses, gradients, and the metrics of each teacher."""
    settings = {"beta": beta, "add_tail_bucket": tail, "teacher_temperature": 1.4}
    without = () if teachers == 2 else ("teacher_id_idx",)
    compare(trios, "AsyncDistillationTrainer", monkeypatch, without, **settings)
    logged = trios("AsyncDistillationTrainer")[1]._metrics["train"]
    assert ("teacher_jsd/two" in logged) == (teachers == 2)


@needs_async
def test_the_async_head_is_that_of_the_model(home):
    """TRL reads no `logits_soft_cap`: the loss of a RecurrentGemma is that of another model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RecurrentGemmaConfig(
        hidden_size=32, lru_width=32, head_dim=8, logits_soft_cap=0.7, **SHAPE
    )
    name, losses = "AsyncDistillationTrainer", {}
    for label, cls, known in (
        ("theirs", THEIRS[name], 0),
        ("known", THEIRS[name], 1),
        ("ours", getattr(fused, name), 0),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = transformers.RecurrentGemmaForCausalLM(config)
        trainer = build(cls, name, home, student=student)
        if known:  # under the name that TRL reads
            student.config.final_logit_softcapping = 0.7
        losses[label] = one_step(trainer, batch_for(name)).loss
    assert (losses["theirs"] - losses["known"]).abs() > 1e-2
    assert_one_rounding(losses["ours"], losses["known"], torch.float32, magnitude=5.0)


def test_tool_outputs_are_left_out(trios):
    """TRL reads no `tool_mask` here: our losses of complementary masks add up to its loss."""
    name = "ServerDistillationTrainer"
    theirs, mine, _ = trios(name)
    batch, settings = batch_for(name), {"beta": 0.0, "loss_top_k": 6, "loss_add_tail": True}
    mask = batch["completion_mask"]
    tools = (torch.arange(mask.numel()) % 3 > 0).long().view_as(mask)
    kept = (tools, 1 - tools)
    parts = [one_step(mine, {**batch, "tool_mask": each}, **settings).loss for each in kept]
    total = sum(part * (mask * each).sum() for part, each in zip(parts, kept, strict=True))
    with_tools = one_step(theirs, {**batch, "tool_mask": tools}, **settings).loss
    assert (parts[0] - parts[1]).abs() > 0.01
    assert_one_rounding(total / mask.sum(), with_tools.double(), torch.float32, magnitude=5.0)


def sized(vocabulary, dtype=torch.float32):
    """Make a teacher with a vocabulary of its own."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = transformers.LlamaConfig(hidden_size=32, **{**SHAPE, "vocab_size": vocabulary})
        return transformers.LlamaForCausalLM(config).to(dtype)


def test_gold_cuts_a_padded_teacher(home):
    """A head with more rows is cut to the student's, as by TRL; one with fewer is refused."""
    outcomes = []
    for cls, dtype in (
        (THEIRS["GOLDTrainer"], torch.float32),
        (fused.GOLDTrainer, torch.float32),
        (THEIRS["GOLDTrainer"], torch.float64),
    ):
        trainer = build(cls, "GOLDTrainer", home, dtype, teacher=sized(72, dtype))
        outcomes.append(one_step(trainer, batch_for("GOLDTrainer"), dtype))
    plain, actual, truth = outcomes
    assert_no_worse(actual, plain, truth)
    match = "teacher_model: expected a teacher with the student's vocabulary, of 64 entries or more, got 60"
    with pytest.raises(ValueError, match=match):
        build(fused.GOLDTrainer, "GOLDTrainer", home, teacher=sized(60))


def test_refused_settings(home):
    with pytest.raises(ValueError, match="^use_uld_loss: expected False"):
        build(
            fused.GOLDTrainer,
            "GOLDTrainer",
            home,
            use_uld_loss=True,
            teacher_tokenizer_name_or_path=home.teacher,
        )
    with pytest.raises(ValueError, match="^distillation_topk: expected a number"):
        build(
            fused.SDFTTrainer,
            "SDFTTrainer",
            home,
            distillation_mode="topk_logits",
            distillation_topk=None,
        )


def test_nothing_to_learn_from(trios):
    """Without a token that has a teacher the loss is 0 and still has a graph."""
    name = "ServerDistillationTrainer"
    batch = batch_for(name)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    outcome = one_step(trios(name)[1], batch, beta=0.0, loss_top_k=6)
    assert outcome.loss == 0 and outcome.student_hidden.abs().max() == 0
