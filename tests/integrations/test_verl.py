"""verl's distillation losses as shims against dense float64 versions, and against verl's own code."""

import math
import os
import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verl_source
from torch import Tensor
from verl_batches import (
    GLOBAL,
    RESPONSES,
    Batch,
    H,
    K,
    V,
    check,
    dense_aggregate,
    dense_loss,
    list_losses,
    outcome,
    response_mask,
    responses_of,
    settings,
)

from opsd_kernels.integrations import verl
from opsd_kernels.integrations.verl import AGG_MODES, agg_loss, agg_weights, distillation_loss, topk_distill
from opsd_kernels.testing import (
    assert_no_worse,
    assert_on_target,
    assert_one_rounding,
    assert_same_bits,
)

ROOT = Path(__file__).resolve().parent.parent.parent

# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("counts", GLOBAL, ids=["local", "global"])
@pytest.mark.parametrize("factor", [None, 32])
def test_agg_loss(mode, counts, factor):
    losses, mask = (
        torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        response_mask(),
    )
    expected = dense_aggregate(losses, mask, mode, **counts, loss_scale_factor=factor)
    losses[~mask] = torch.nan
    for given in (mask, mask.long(), mask.float()):
        assert_one_rounding(
            agg_loss(losses, given, mode, **counts, loss_scale_factor=factor), expected, torch.float64
        )


def test_nothing_valid_is_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert all(agg_loss(torch.full((2, 3), torch.inf), nothing, mode) == 0 for mode in AGG_MODES)


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize(
    "given, missing",
    [({"batch_num_tokens": 7}, "global_batch_size"), ({"global_batch_size": 7}, "batch_num_tokens")],
)
def test_counts_of_one_rank_are_not_those_of_all(mode, given, missing):
    """Only `token-sum` works without the counts of the global batch."""
    needed = "global_batch_size" if mode.startswith("seq") else {"token-mean": "batch_num_tokens"}.get(mode)
    if needed == missing:
        with pytest.raises(
            ValueError, match=f"{missing}: expected the count of the global batch, since dp_size is 2"
        ):
            agg_weights(response_mask(), mode, dp_size=2, **given)
    else:
        agg_weights(response_mask(), mode, dp_size=2, **given)


# ---------------------------------------------------------------- the loss of a micro-batch


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("counts", GLOBAL, ids=["local", "global"])
@pytest.mark.parametrize("loss_mode", ["forward_kl_topk", "reverse_kl"])
def test_every_aggregation(mode, counts, loss_mode):
    made = settings(mode, 32 if counts["dp_size"] > 1 else None, loss_mode=loss_mode, loss_max_clamp=2.0)
    check(
        lambda b: distillation_loss(*made, b.outputs(), b.data(**counts))[0],
        lambda b: dense_loss(b, *made, **counts),
    )


@pytest.mark.parametrize("highest", [None, 0.3, 2.0])
@pytest.mark.parametrize("floor", [None, -3.0, -10.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_clamps_of_a_list(floor, highest, temperature):
    """Every clamp holds some tokens of the lists and leaves others."""
    made = settings(log_prob_min_clamp=floor, loss_max_clamp=highest)
    batch = Batch()
    log_q = (batch.hidden @ batch.weight.T / temperature).log_softmax(-1).gather(-1, batch.teacher_ids)
    raw = responses_of(list_losses(log_q, batch.teacher_logprobs, floor))[batch.mask]
    assert (
        (raw < 0).any()
        and (raw > 2).any()
        and ((raw > 0) & (raw < 0.3)).any()
        and (floor is None or (log_q < floor).any())
    )
    data = {"temperature": temperature}
    check(
        lambda b: distillation_loss(*made, b.outputs(), b.data(**data))[0],
        lambda b: dense_loss(b, *made, temperature=temperature),
        batch,
    )


@pytest.mark.parametrize("highest", [None, 1.0])
@pytest.mark.parametrize(
    "loss_mode, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2)]
)
def test_whole_teachers(loss_mode, beta, highest):
    made = settings("seq-mean-token-mean", loss_mode=loss_mode, jsd_beta=beta, loss_max_clamp=highest)
    check(
        lambda b: distillation_loss(*made, b.outputs(), b.data(temperature=1.5))[0],
        lambda b: dense_loss(b, *made, temperature=1.5),
    )


@pytest.mark.parametrize("loss_mode", ["forward_kl_topk", "reverse_kl"])
def test_bf16(loss_mode):
    """The truth is the dense loss of the rounded numbers; a list's log-probs stay fp32, as from a server."""
    made, batch = settings(loss_mode=loss_mode, log_prob_min_clamp=-4.0, loss_max_clamp=3.0), Batch()
    batch.hidden, batch.weight, batch.teacher_hidden, batch.teacher_weight = (
        x.bfloat16() for x in (batch.hidden, batch.weight, batch.teacher_hidden, batch.teacher_weight)
    )
    got = outcome(lambda b: distillation_loss(*made, b.outputs(), b.data())[0], batch)
    assert_on_target(got, outcome(lambda b: dense_loss(b, *made), batch.to(torch.float64)), "default")


@pytest.mark.parametrize("loss_mode", ["forward_kl_topk", "jsd"])
def test_layouts_are_one(loss_mode):
    """Nested batches, padded ones with packed model outputs, and dictionaries of either give one loss."""
    made = settings("seq-mean-token-sum", loss_mode=loss_mode)
    first, *others = (
        outcome(lambda b, x=x, y=y: distillation_loss(*made, b.outputs(x), b.data(y))[0], Batch())
        for x, y in [("nested",) * 2, ("packed", "padded")]
    )
    for other in others:
        assert_same_bits(other, first)


def test_tokens_outside_the_mask_may_hold_anything():
    made, batch = settings(), Batch()
    expected = distillation_loss(*made, batch.outputs(), batch.data())[0]
    reached = torch.zeros(batch.hidden.shape[0], dtype=torch.bool)
    reached[responses_of(torch.arange(batch.hidden.shape[0]))[batch.mask]] = True
    batch.hidden[~reached], batch.teacher_ids[~reached], batch.teacher_logprobs[~reached] = (
        torch.nan,
        V + 3,
        torch.nan,
    )
    assert_same_bits(distillation_loss(*made, batch.outputs(), batch.data())[0], expected)


def test_padding_of_a_list_counts_for_nothing():
    """A list entry of -inf adds nothing; verl floors it to a probability of exp(log_prob_min_clamp)."""
    made, batch, short = settings(log_prob_min_clamp=-3.0), Batch(), Batch()
    batch.teacher_logprobs, batch.teacher_ids = batch.teacher_logprobs[:, :4], batch.teacher_ids[:, :4]
    short.teacher_logprobs[:, 4:], short.teacher_ids[:, 4:] = -torch.inf, 10 * V
    expected = distillation_loss(*made, batch.outputs(), batch.data())[0]
    assert_one_rounding(distillation_loss(*made, short.outputs(), short.data())[0], expected, torch.float32)


@pytest.mark.parametrize("floor", [None, -3.0])
def test_an_id_that_comes_again_counts_once(floor):
    """The sampled token may stand in the list already: loss and masses are those of the list without it."""
    made, once, again = settings(log_prob_min_clamp=floor), Batch(), Batch()
    for name in ("teacher_ids", "teacher_logprobs"):
        entries = getattr(again, name)
        setattr(again, name, torch.cat([entries, entries[:, 1:2]], -1))
    results = [distillation_loss(*made, batch.outputs(), batch.data()) for batch in (again, once)]
    (loss, metrics), (expected, named) = results
    assert_one_rounding(loss, expected, torch.float32)
    for name, value in metrics.items():
        assert_one_rounding(value, named[name], torch.float32, magnitude=1.0, name=name)


def test_metrics():
    made, batch = settings(loss_max_clamp=0.5), Batch().to(torch.float64)
    _, metrics = distillation_loss(*made, batch.outputs(), batch.data())
    log_q = (batch.hidden @ batch.weight.T).log_softmax(-1).gather(-1, batch.teacher_ids)
    losses = responses_of(list_losses(log_q, batch.teacher_logprobs, -10.0).clamp_min(0.0))[batch.mask]
    masses = {"student": log_q.exp().sum(-1), "teacher": batch.teacher_logprobs.exp().sum(-1)}
    expected = {f"distillation/{side}_mass": responses_of(x)[batch.mask].mean() for side, x in masses.items()}
    expected |= {"distillation/loss_min": losses.min(), "distillation/loss_max": losses.max()}
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert not value.requires_grad
        assert_one_rounding(value, expected[name], torch.float32, magnitude=1.0, name=name)


@pytest.mark.parametrize("floor, temperature", [(None, 1.0), (-3.0, 0.7)])
def test_overlap_with_the_students_own_list(floor, temperature):
    """The two metrics by definition; loss and masses are those of a call without them."""
    made, batch = settings(log_prob_min_clamp=floor), Batch().to(torch.float64)
    data = batch.data(temperature=temperature)
    loss, metrics = distillation_loss(*made, batch.outputs(), data, overlap=True)
    plain, fewer = distillation_loss(*made, batch.outputs(), data)
    assert_one_rounding(loss, plain, torch.float32)
    log_q = (batch.hidden @ batch.weight.T / temperature).log_softmax(-1)
    at_list, log_p = log_q.gather(-1, batch.teacher_ids), batch.teacher_logprobs
    if floor is not None:
        at_list, log_p = at_list.clamp(min=floor), log_p.clamp(min=floor)
    own = log_q.topk(K).indices
    shared = torch.stack(
        [torch.isin(mine, other) for mine, other in zip(batch.teacher_ids, own, strict=True)]
    )
    terms = [
        (p.exp() * (q - p))[keep].mean() if keep.any() else torch.tensor(torch.nan, dtype=torch.float64)
        for q, p, keep in zip(at_list, log_p, shared, strict=True)
    ]
    valid, advantage = batch.mask, responses_of(torch.stack(terms)[:, None])[..., 0]
    expected = {
        "distillation/overlap_ratio": responses_of(shared.double())[valid].mean(),
        "distillation/overlap_token_advantage": advantage[valid].nanmean(),
    }
    assert set(metrics) == set(fewer) | set(expected) | {"distillation/student_mass"}
    assert 0.1 < expected["distillation/overlap_ratio"] < 0.9
    for name, value in expected.items():
        assert_one_rounding(metrics[name], value, torch.float32, magnitude=1.0, name=name)


def test_a_micro_batch_without_a_valid_token():
    made, batch = settings("seq-mean-token-mean"), Batch()
    batch.mask[:] = False
    got = outcome(lambda b: distillation_loss(*made, b.outputs(), b.data(), overlap=True)[0], batch)
    assert got.loss == 0 and (got.student_hidden == 0).all() and (got.student_weight == 0).all()


@pytest.mark.parametrize(
    "made, match",
    [
        (settings(use_policy_gradient=True), "use_policy_gradient: expected False"),
        (settings(loss_mode="k3"), "loss_mode: expected one of 'forward_kl_topk'"),
        (settings("mean"), "loss_agg_mode: expected one of 'token-mean'"),
    ],
)
def test_errors_name_the_setting(made, match):
    with pytest.raises(ValueError, match=match):
        distillation_loss(*made, Batch().outputs(), Batch().data())


@pytest.mark.parametrize(
    "floor, passes",
    [(None, ["linear_topk_divergence"]), (-3.0, ["linear_logprobs_at", "linear_topk_divergence"])],
)
def test_one_op_and_one_statistics_pass_for_a_floor(monkeypatch, floor, passes):
    seen = []
    ops = (
        "linear_logprobs",
        "linear_logprobs_at",
        "linear_topk",
        "linear_topk_divergence",
        "linear_divergence",
    )
    for name in ops:
        op = getattr(verl, name)
        monkeypatch.setattr(verl, name, lambda *a, name=name, op=op, **k: (seen.append(name), op(*a, **k))[1])
    distillation_loss(*settings(log_prob_min_clamp=floor), Batch().outputs(), Batch().data())
    assert seen == passes


# ---------------------------------------------------------------- the op of the fused engine


def dense_distill(hidden, weight, labels, ids, log_probs, temperature, floor) -> tuple[Tensor, ...]:
    log_q = (hidden @ weight.T / temperature).log_softmax(-1)
    at_list, valid = log_q.gather(-1, ids), labels != -100
    found = (
        log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0], -(log_q.exp() * log_q).sum(-1),
        list_losses(at_list, log_probs, floor),
        at_list.exp().sum(-1), log_probs.exp().sum(-1),
    )  # fmt: skip
    return tuple(torch.where(valid, x, 0.0) for x in found)


@pytest.mark.parametrize("floor", [None, -3.0])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_topk_distill(floor, shifted, temperature):
    """All five outputs, and the gradient of a mix of the three differentiable ones."""
    batch = Batch()
    labels = batch.labels[None].clone()
    labels[:, 3:7] = -100
    rolled = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)

    def mix(parts: tuple[Tensor, ...]) -> Tensor:
        ramp = torch.linspace(-1, 1, rolled.numel(), dtype=parts[0].dtype)[None]
        return torch.stack(
            [
                ramp * parts[0],
                ramp.flip(1) * parts[1],
                (ramp + 2) * parts[2],
                *(x.detach() for x in parts[3:]),
            ]
        )

    def ours(b: Batch) -> Tensor:
        args = (
            b.hidden[None],
            b.weight,
            labels,
            b.teacher_ids[None],
            b.teacher_logprobs[None],
            7,
            -100,
            rolled if shifted else None,
        )
        parts = topk_distill(*args, temperature, floor)
        assert all(x.shape == labels.shape for x in parts) and not (
            parts[3].requires_grad or parts[4].requires_grad
        )
        return mix(parts)

    check(
        ours,
        lambda b: mix(
            dense_distill(
                b.hidden[None],
                b.weight,
                rolled,
                b.teacher_ids[None],
                b.teacher_logprobs[None],
                temperature,
                floor,
            )
        ),
        batch,
    )


def test_topk_distill_fills_what_the_loss_aggregates():
    """Per-token losses of the forward, with verl's clamps and aggregation, equal `distillation_loss`."""
    made, batch = settings("seq-mean-token-sum", loss_max_clamp=1.0, log_prob_min_clamp=-4.0), Batch()

    def in_two_steps(b: Batch) -> Tensor:
        losses = topk_distill(
            b.hidden,
            b.weight,
            b.labels,
            b.teacher_ids,
            b.teacher_logprobs,
            shift_labels=b.labels,
            log_prob_min_clamp=-4.0,
        )[2]
        return agg_loss(responses_of(losses).clamp(0.0, 1.0), b.mask, "seq-mean-token-sum")

    one, two = (
        outcome(lambda b: distillation_loss(*made, b.outputs(), b.data())[0], batch),
        outcome(in_two_steps, batch),
    )
    truth = outcome(lambda b: dense_loss(b, *made), batch.to(torch.float64))
    assert_no_worse(one, two, truth)
    assert_no_worse(two, one, truth)


def test_pieces_of_the_gather_are_one(monkeypatch):
    batch = Batch()
    args = (batch.hidden, batch.weight, batch.labels, batch.teacher_ids, batch.teacher_logprobs)
    whole = topk_distill(*args, log_prob_min_clamp=-3.0)
    monkeypatch.setattr(verl, "GATHERED", 3 * (K + 1) * H)
    for piece, all_at_once in zip(topk_distill(*args, log_prob_min_clamp=-3.0), whole, strict=True):
        assert_one_rounding(piece, all_at_once, torch.float32, magnitude=math.log(V) * 10)


# ---------------------------------------------------------------- verl's own code


def loss_of_verl(
    theirs: verl_source.Theirs, batch: Batch, config, distillation, temperature: float, **counts
) -> tuple[Tensor, dict]:
    data, masks = batch.data(**counts), [row[:n] for row, n in zip(batch.mask, RESPONSES, strict=True)]
    data["response_mask"] = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    distillation.distillation_loss.topk = K
    return theirs.loss((batch.hidden @ batch.weight.T / temperature)[None], data, config, distillation)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory) -> verl_source.Theirs:
    """verl's functions, from the directory in VERL_SOURCE or a wheel that pip downloads."""
    try:
        root = Path(os.environ.get("VERL_SOURCE") or verl_source.download(tmp_path_factory.mktemp("verl")))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no wheel of verl {verl_source.VERSION}: pip download failed ({type(error).__name__})")
    return verl_source.Theirs(root / "verl")


@pytest.mark.parametrize("mode", AGG_MODES)
@pytest.mark.parametrize("counts", GLOBAL, ids=["local", "global"])
@pytest.mark.parametrize(
    "floor, highest, temperature", [(None, None, 1.0), (-3.0, 0.3, 0.7), (-10.0, 10.0, 1.0)]
)
def test_is_verls(theirs, mode, counts, floor, highest, temperature):
    """verl's code from logits to the aggregated loss gives our loss and the metrics that both have."""
    made = settings(
        mode, 32 if counts["dp_size"] > 1 else None, log_prob_min_clamp=floor, loss_max_clamp=highest
    )
    batch, data = Batch(), {"temperature": temperature, **counts}
    truth = outcome(
        lambda b: dense_loss(b, *made, temperature=temperature, **counts), batch.to(torch.float64)
    )
    expected = outcome(lambda b: loss_of_verl(theirs, b, *made, temperature, **counts)[0], batch)
    assert_no_worse(
        outcome(lambda b: distillation_loss(*made, b.outputs(), b.data(**data))[0], batch), expected, truth
    )
    ours, metrics = (
        distillation_loss(*made, batch.outputs(), batch.data(**data), overlap=True)[1],
        loss_of_verl(theirs, batch, *made, temperature, **counts)[1],
    )
    assert ours.keys() <= metrics.keys()
    for name, value in ours.items():
        assert_one_rounding(value, torch.as_tensor(metrics[name]), torch.float32, magnitude=10.0, name=name)


# ---------------------------------------------------------------- the page and the example


def test_the_page_runs():
    """The page's example computes the dense loss."""
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "integrations-verl.md").read_text(), re.DOTALL
    )
    assert len(block.strip().splitlines()) <= 20
    batch = Batch()
    session = {
        "batch": batch.data(),
        "hidden": batch.outputs()["hidden_states"],
        "lm_head": SimpleNamespace(weight=batch.weight),
    }
    exec(block, session)
    expected = dense_loss(batch.to(torch.float64), *settings("seq-mean-token-mean"))
    assert_one_rounding(session["loss"], expected, torch.float32, magnitude=1.0)


def test_the_example_runs(capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(ROOT / "examples" / "verl_loss.py"), run_name="__main__")
    first, *_, last = (float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out))
    assert last < first / 2
