"""The setting `gradient_tolerance`: it reaches every divergence, and its metric is the largest share."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opsd_kernels import TokenStats
from opsd_kernels.train import loop, objective
from opsd_kernels.train import step as steps
from opsd_kernels.train.distributed.ranks import Ranks, moved
from opsd_kernels.train.records.log import read_metrics

CLOCK = {"seconds", "tokens_per_second"}
# At 1e-3 the random distributions of this vocabulary of 29 need more than three quarters of its columns.
LARGE = 0.2


def numbers(out):
    lines = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


@pytest.mark.parametrize("tolerance", [None, 1e-3, LARGE])
def test_each_step_records_its_share(config, tmp_path, tolerance):
    loop.train(replace(config, steps=3, gradient_tolerance=tolerance), tmp_path / "run")
    lines = numbers(tmp_path / "run")
    assert len(lines) == 3
    if tolerance is None:
        assert all("gradient_dropped" not in line for line in lines)
    else:
        assert all(0 <= line["gradient_dropped"] <= tolerance for line in lines)
        assert tolerance < LARGE or all(line["gradient_dropped"] > 0 for line in lines)


def test_a_run_with_it_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    """A run that fails in its fourth step continues from the checkpoint of the second."""
    config = replace(config, steps=5, gradient_tolerance=LARGE)
    loop.train(config, tmp_path / "whole")
    original = loop.one_step

    def fails(run):
        if run.state.step == 3:
            raise OSError("stopped")
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "one_step", fails)
        with pytest.raises(OSError, match="stopped"):
            loop.train(config, tmp_path / "hurt")
    assert not (tmp_path / "hurt" / "summary.json").exists()
    loop.train(config, tmp_path / "hurt", resume=True)
    assert numbers(tmp_path / "hurt") == numbers(tmp_path / "whole")
    for name in ("model", "teacher", "optimizer"):
        file = f"checkpoint/step_000005/{name}.safetensors"
        assert (tmp_path / "hurt" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    "changes, calls, drops",
    [
        ({"context": "positive", "topk": 5}, True, True),
        ({"objective": "sampled_token"}, True, True),
        ({"policy_weight": 0.5}, True, True),
        # Rehearsal alone: in the first step the student is its reference.
        ({"policy_weight": 1.0}, True, False),
        ({"policy_weight": 1.0, "rehearsal_prompts": 0}, False, False),
    ],
    ids=str,
)
def test_every_divergence_gets_it(config, tmp_path, monkeypatch, changes, calls, drops):
    given = []

    def watched(op):
        def call(*args, **options):
            given.append(options["gradient_tolerance"])
            return op(*args, **options)

        return call

    for name in ("linear_divergence", "linear_policy_divergence"):
        monkeypatch.setattr(objective, name, watched(getattr(objective, name)))
    loop.train(replace(config, steps=1, gradient_tolerance=LARGE, **changes), tmp_path / "run")
    assert bool(given) is calls and set(given) <= {LARGE}
    assert [0 < line["gradient_dropped"] <= LARGE for line in numbers(tmp_path / "run")] == [drops]


def test_the_largest_share_counts(monkeypatch):
    """Over micro-batches, ranks, rehearsal and the updates of a step; a 0-dim tensor of 0 passes through."""
    token = torch.zeros(2, 3)
    shares = [None, 0.0, 0.25, 0.125]
    stats = [
        TokenStats(token, token, token, gradient_dropped=None if share is None else torch.tensor(share))
        for share in shares
    ]
    assert [steps.largest_dropped([(None, [part])]) for part in stats] == [0.0, 0.0, 0.25, 0.125]
    assert steps.largest_dropped([(None, stats[:2]), (None, stats[2:])]) == 0.25
    assert moved(stats[1], "meta").gradient_dropped.shape == ()

    def gather(gathered, mine, group):
        gathered[:] = [mine, stats[2:3]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    together = Ranks(0, 2).together(stats[1:2])
    assert [float(part.gradient_dropped) for part in together] == [0.0, 0.25]

    updates = iter([0.125, 0.25, 0.0])
    made = steps.Update(1.0, 1.0, tuple(stats))
    monkeypatch.setattr(steps, "optimisation_step", lambda *_: replace(made, gradient_dropped=next(updates)))
    monkeypatch.setattr(steps.objective, "needs_old_logprobs", lambda _: False)
    trainer = SimpleNamespace(student=None, ranks=Ranks())
    update = steps.update_on(trainer, None, SimpleNamespace(updates_per_batch=3, policy_weight=1.0), 1)
    assert update == replace(made, gradient_dropped=0.25)
