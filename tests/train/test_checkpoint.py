"""Checkpoints: complete or absent, and restored bit for bit."""

import copy
import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opsd_kernels.testing import assert_same_bits
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.optimizer import masters_of
from opsd_kernels.train.records import checkpoint, durable
from opsd_kernels.train.records.checkpoint import RunState
from opsd_kernels.train.step import make_optimizer
from opsd_kernels.train.teacher import Copy


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def state(request, model, encoder, config):
    """Make a state whose optimiser has moments and whose teacher differs from its student."""
    # Not the rotary embedding's buffer, which loading leaves in fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(request.param)
    teacher = Copy(model, 0.3)
    optimizer = make_optimizer(model, config)
    for step in range(2):
        model(torch.tensor([[3, 10 + step, 4]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(model, masters_of(optimizer))
    return RunState(
        model,
        encoder.tokenizer,
        teacher,
        None,
        optimizer,
        4,
        {"held_out_accuracy_before": 0.1 + 0.2, "seconds": 3.5},
    )


def fresh(path, config, state):
    config = dataclasses.replace(config, dtype=str(state.model.dtype).removeprefix("torch."))
    model, tokenizer = pretrained.load_pretrained(path, config)
    return RunState(model, tokenizer, Copy(model, 0.3), None, make_optimizer(model, config), 0, {})


def tensors(state):
    masters = [masters_of(state.optimizer).get(p, p) for p in state.model.parameters()]
    moments = [state.optimizer.state[p][key] for p in masters for key in ("step", "exp_avg", "exp_avg_sq")]
    return [
        *(p.detach() for p in masters),
        *state.teacher.state().values(),
        *(p.detach() for p in state.model.parameters()),
        *(p.detach() for p in state.teacher.model.parameters()),
        *moments,
    ]


def test_everything_comes_back(tmp_path, state, config):
    torch.manual_seed(7), np.random.seed(8), random.seed(9)
    path = checkpoint.save(tmp_path, state, 1234)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    loaded = fresh(checkpoint.latest(tmp_path), config, state)
    assert checkpoint.restore(path, loaded) == 1234
    assert (loaded.step, loaded.facts) == (state.step, state.facts)
    for actual, expected in zip(tensors(loaded), tensors(state), strict=True):
        assert_same_bits(actual, expected)
    assert (
        torch.rand(3).equal(drawn[0])
        and (np.random.rand(3) == drawn[1]).all()
        and random.random() == drawn[2]
    )


@pytest.mark.parametrize("devices", [0, 1, 3])
def test_generators_of_devices_that_are_not_here_are_left_out(tmp_path, state, config, monkeypatch, devices):
    """A checkpoint of two GPUs on machines with none, one and three of them."""
    path = checkpoint.save(tmp_path, state, 0)
    file = path / "random.safetensors"
    saved = {f"cuda_{index}": torch.full((16,), index, dtype=torch.uint8) for index in range(2)}
    save_file(load_file(file) | saved, file)
    restored = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)

    def set_rng_state(value, device):
        assert device < devices, "invalid device ordinal"
        restored[device] = value

    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)
    checkpoint.restore(path, fresh(path, config, state))
    assert restored.keys() == set(range(min(devices, 2)))
    assert all(value.eq(index).all() for index, value in restored.items())


def test_optimiser_goes_on_as_if_nothing_happened(tmp_path, state, config):
    checkpoint.save(tmp_path, state, 0)
    loaded = fresh(checkpoint.latest(tmp_path), config, state)
    checkpoint.restore(checkpoint.latest(tmp_path), loaded)
    for run in (state, loaded):
        run.model(torch.tensor([[3, 15, 4]])).logits.square().mean().backward()
        run.optimizer.step()
    for actual, expected in zip(tensors(loaded), tensors(state), strict=True):
        assert_same_bits(actual, expected)


def test_only_the_newest_stays(tmp_path, state):
    for state.step in (2, 4, 10):
        checkpoint.save(tmp_path, state, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000010"]
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt")), "no pickle"


WRITES = [
    "model.save_pretrained",
    "tokenizer.save_pretrained",
    "save_file 1",
    "save_file 2",
    "save_file 3",
    "_random_record",
    "_sync",
    "rename",
]


@pytest.mark.parametrize("moment", WRITES)
def test_a_crash_between_writes_leaves_the_last_checkpoint(tmp_path, state, config, monkeypatch, moment):
    checkpoint.save(tmp_path, state, 10)
    old = copy.deepcopy([t.clone() for t in tensors(state)])
    state.model.lm_head.weight.data.add_(1)
    state.step = 6
    crash_at(monkeypatch, state, moment)
    with pytest.raises(MemoryError, match="the power went"):
        checkpoint.save(tmp_path, state, 20)
    path = checkpoint.latest(tmp_path)
    assert path.name == "step_000004"
    loaded = fresh(path, config, state)
    assert checkpoint.restore(path, loaded) == 10
    for actual, expected in zip(tensors(loaded), old, strict=True):
        assert_same_bits(actual, expected)


def crash_at(monkeypatch, state, moment):
    """Make the n-th call fail without any cleanup, as after a SIGKILL."""
    name, _, count = moment.partition(" ")
    targets = {
        "model.save_pretrained": (state.model, "save_pretrained"),
        "tokenizer.save_pretrained": (state.tokenizer, "save_pretrained"),
    }
    targets |= {"save_file": (checkpoint, "save_file"), "_random_record": (checkpoint, "_random_record")}
    targets |= {"_sync": (durable, "_sync"), "rename": (durable.os, "rename")}
    owner, attribute = targets[name]
    original, calls = getattr(owner, attribute), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(count or 1):
            raise MemoryError("the power went")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, failing)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)


def test_leftovers_are_ignored_and_cleared(tmp_path, state):
    checkpoint.save(tmp_path, state, 0)
    half = tmp_path / ".pending-step_000006-abc"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_000004"
    assert not half.exists() and (tmp_path / "notes").exists()


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_checkpoint_is_a_model_directory(tmp_path, state, config):
    path = checkpoint.save(tmp_path, state, 0)
    loaded = fresh(path, config, state)
    model, tokenizer = loaded.model, loaded.tokenizer
    assert_same_bits(model.lm_head.weight.detach(), state.model.lm_head.weight.detach())
    assert tokenizer.get_vocab() == state.tokenizer.get_vocab()
    assert tokenizer.chat_template == state.tokenizer.chat_template
    assert "model.embed_tokens.weight" in load_file(path / "model.safetensors")


def test_another_format_is_an_error(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    path = checkpoint.save(tmp_path, state, 0)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(ValueError, match="checkpoint: expected format 2"):
        checkpoint.restore(path, state)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    durable.write_file(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            durable.write_file(path, "new")
    assert path.read_text() == "old"


def test_the_first_of_two_writers_wins(tmp_path):
    target = tmp_path / "cache"

    def fill(pending):
        (pending / "value").write_text("second")
        target.mkdir()
        (target / "value").write_text("first")

    durable.write_directory(target, fill)
    assert (target / "value").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
