"""NeMo-RL's distillation loss as a shim, against its formula written out densely."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opsd_kernels.integrations.nemo_rl import DistillationLossFn
from opsd_kernels.testing import Outcome, assert_no_worse, assert_on_target, assert_one_rounding

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations-nemo-rl.md"
B, S, V, H, H_T, K = 3, 9, 47, 12, 16, 6


def batch(dtype):
    gen = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    made = SimpleNamespace(hidden=draw(B, S, H), weight=draw(V, H) / 2)
    made.teachers = [(draw(B, S, H_T), draw(V, H_T) / 3), (draw(B, S, H), draw(V, H) / 2)]
    top = (made.teachers[0][0] @ made.teachers[0][1].T).topk(K)
    mask = torch.arange(S) >= torch.tensor([3, 1, 5])[:, None]
    made.data = {
        "input_ids": torch.randint(V, (B, S), generator=gen), "token_mask": mask.float(),
        "sample_mask": torch.tensor([1.0, 0.0, 1.0]),
        "teacher_topk_logits": top.values, "teacher_topk_indices": top.indices,
        "teacher_index": torch.tensor([1, 0, 0]),
    }  # fmt: skip
    return made


def formula(log_q, log_p, cfg, data, count):
    """Add up the terms of each entry, then masked_mean, as NeMo-RL does."""
    forward, reverse = log_p.exp() * (log_p - log_q), log_q.exp() * (log_q - log_p)
    weight = {"forward": 1.0, "reverse": 0.0, "mixed": cfg["mixed_kl_weight"]}[cfg["kl_type"]]
    per_token = (weight * forward + (1 - weight) * reverse).sum(-1)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return (per_token * mask).sum() / (mask.sum() if count is None else count)


def dense(made, cfg, count, whole=0, temperature=1.0):
    logits = (made.hidden @ made.weight.T)[:, :-1] / temperature
    if whole:
        pairs = [(h @ W.T / temperature).log_softmax(-1)[:, :-1] for h, W in made.teachers[:whole]]
        index = made.data["teacher_index"] if whole > 1 else torch.zeros(B, dtype=torch.long)
        log_p = torch.stack(pairs)[index, torch.arange(B)]
        return formula(logits.log_softmax(-1), log_p, cfg, made.data, count)
    ids = made.data["teacher_topk_indices"][:, :-1]
    log_p = made.data["teacher_topk_logits"][:, :-1].log_softmax(-1)
    if cfg["zero_outside_topk"]:
        log_q = logits.log_softmax(-1).gather(-1, ids)
    else:
        log_q = logits.gather(-1, ids).log_softmax(-1)
    return formula(log_q, log_p, cfg, made.data, count)


def shim(made, cfg, count, whole=0, **options):
    if whole:
        sides = zip(*made.teachers[:whole], strict=True)
        hidden, weight = sides if whole > 1 else made.teachers[0]
        options |= {"teacher_hidden": hidden, "teacher_weight": weight}
    loss_of = DistillationLossFn(cfg)
    loss, metrics = loss_of(made.hidden, made.weight, made.data, None, count, **options)
    assert metrics["num_valid_samples"] == B and torch.equal(metrics["loss"], loss.detach())
    return loss


def outcome(loss_of, dtype, *args, **options):
    made = batch(torch.float32)
    for name in ("hidden", "weight"):
        setattr(made, name, getattr(made, name).to(dtype).requires_grad_())
    made.teachers = [(h.to(dtype), W.to(dtype)) for h, W in made.teachers]
    if dtype == torch.float64:
        made.data["teacher_topk_logits"] = made.data["teacher_topk_logits"].to(dtype)
    loss = loss_of(made, *args, **options)
    return Outcome(loss.detach(), *torch.autograd.grad(loss, (made.hidden, made.weight)))


CONFIGS = [
    {"kl_type": kind, "mixed_kl_weight": weight, "zero_outside_topk": zero}
    for kind, weight, zero in (
        ("mixed", 0.7, False), ("mixed", 0.5, False), ("mixed", 0.0, False), ("forward", 0.3, False),
        ("reverse", 0.3, False), ("forward", 0.3, True),
    )
]  # fmt: skip


@pytest.mark.parametrize("whole, count", [(0, None), (0, 17), (1, torch.tensor(23.0)), (2, None), (2, 17)])
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: "-".join(map(str, cfg.values())))
def test_the_formula(cfg, whole, count):
    """Lists, one whole teacher, and two by teacher_index; values and gradients of hidden states and head."""
    truth, plain = (outcome(dense, dtype, cfg, count, whole) for dtype in (torch.float64, torch.float32))
    assert all(value.abs().max() > 0 for _, value in truth.named())
    given = SimpleNamespace(**cfg) if whole else cfg  # NeMo-RL's config has attributes, older ones entries
    assert_no_worse(outcome(shim, torch.float32, given, count, whole), plain, truth)


@pytest.mark.parametrize("whole", [0, 2])
def test_options_of_the_op(whole):
    cfg = CONFIGS[0]
    truth, plain = (
        outcome(dense, dtype, cfg, None, whole, temperature=1.6) for dtype in (torch.float64, torch.float32)
    )
    options = {"temperature": 1.6, "workspace_bytes": 4096}
    assert_no_worse(outcome(shim, torch.float32, cfg, None, whole, **options), plain, truth)


def test_bf16():
    cfg = CONFIGS[0]
    made = batch(torch.float32)
    rounded = SimpleNamespace(**vars(made))
    for name in ("hidden", "weight"):
        setattr(rounded, name, getattr(made, name).bfloat16().double().requires_grad_())
    rounded.data = {**made.data, "teacher_topk_logits": made.data["teacher_topk_logits"].double()}
    loss = dense(rounded, cfg, None)
    truth = Outcome(loss.detach(), *torch.autograd.grad(loss, (rounded.hidden, rounded.weight)))
    assert_on_target(outcome(shim, torch.bfloat16, cfg, None), truth, "default")


def test_masked_rows_may_hold_anything():
    made, other = batch(torch.float32), batch(torch.float32)
    counted = (made.data["token_mask"] * made.data["sample_mask"][:, None])[:, 1:] != 0
    other.hidden[:, :-1][~counted] = torch.nan
    other.hidden[:, -1] = torch.inf
    other.data["teacher_topk_indices"][:, :-1][~counted] = V + 3
    other.data["teacher_index"] = other.data["teacher_index"].clone()
    other.data["teacher_index"][1] = 9  # of a sample that is left out
    for whole in (0, 2):
        assert torch.equal(shim(other, CONFIGS[0], None, whole), shim(made, CONFIGS[0], None, whole))


def test_without_masks_every_prediction_counts():
    made = batch(torch.float64)
    ones = {"token_mask": torch.ones(B, S), "sample_mask": torch.ones(B)}
    made.data |= ones
    expected = dense(made, CONFIGS[0], None)
    for name in ones:
        del made.data[name]
    assert_one_rounding(shim(made, CONFIGS[0], None), expected, torch.float32)


def test_an_empty_micro_batch():
    made = batch(torch.float32)
    made.data["sample_mask"][:] = 0
    for whole in (0, 1, 2):
        made.hidden = made.hidden.detach().requires_grad_()
        loss = shim(made, CONFIGS[0], None, whole)
        assert loss == 0 and (torch.autograd.grad(loss, made.hidden)[0] == 0).all()


def test_defaults_are_nemos():
    """Mixed at .5, both sides renormalised on the list."""
    made = batch(torch.float32)
    assert torch.equal(shim(made, {}, None), shim(made, CONFIGS[1], None))


@pytest.mark.parametrize(
    "cfg, match",
    [
        ({"kl_type": "jsd"}, "kl_type: expected one of 'forward', 'reverse', 'mixed'"),
        ({"mixed_kl_weight": 1.5}, "mixed_kl_weight: expected a number in"),
        ({"zero_outside_topk": True}, "zero_outside_topk: expected False, or kl_type='forward'"),
    ],
)
def test_bad_configs(cfg, match):
    with pytest.raises(ValueError, match=match):
        DistillationLossFn(cfg)


def test_bad_teacher_index():
    made = batch(torch.float32)
    made.data["teacher_index"] = torch.tensor([2, 0, 0])
    with pytest.raises(
        ValueError, match=r"teacher_index: expected entries in \[0, 2\) at valid tokens, got \[2\]"
    ):
        shim(made, CONFIGS[0], None, 2)


@pytest.mark.parametrize("whole", [0, 1, 2])
@pytest.mark.parametrize(
    "name, value, decides",
    [
        ("divergence", "jsd", "kl_type of the config decides, got 'jsd'"),
        ("beta", 0.1, "mixed_kl_weight of the config decides, got 0.1"),
        ("tail", "bucket", "zero_outside_topk of the config decides, got 'bucket'"),
        ("mask", torch.zeros(B, S - 1), "token_mask and sample_mask of data decide, got a tensor"),
        ("normalizer", 1e9, "global_valid_toks decides, got 1000000000.0"),
        ("teacher_index", torch.zeros(B, S - 1).long(), "teacher_index of data decides, got a tensor"),
        ("return_stats", True, "the result is (loss, metrics), got True"),
    ],
)
def test_options_that_the_shim_sets_are_refused(name, value, decides, whole):
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected no argument, since {decides}")):
        shim(batch(torch.float32), CONFIGS[0], None, whole, **{name: value})


def test_a_teacher_s_head_without_its_hidden_states_is_refused():
    made = batch(torch.float32)
    with pytest.raises(ValueError, match="^teacher_hidden: expected hidden states beside teacher_weight"):
        shim(made, CONFIGS[0], None, teacher_weight=made.weight)


def test_the_page_runs():
    made = batch(torch.float32)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    made.hidden.requires_grad_()
    session = {"hidden": made.hidden, "head": made.weight, "data": made.data, "count": 17}
    session["teachers"] = made.teachers
    exec(block, session)
    for name, whole in (("loss", 0), ("whole", 2)):
        expected = dense(made, CONFIGS[1], 17, whole)
        assert_one_rounding(session[name], expected, torch.float32, magnitude=2.0)
