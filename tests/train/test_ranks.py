"""Objects between ranks, in one process: a stand-in for the collective sees the arguments."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opsd_kernels import TokenStats
from opsd_kernels.train.distributed.ranks import Ranks, moved
from opsd_kernels.train.types import Prompt, Rollout, Verdict


def tensors(item):
    """Return every tensor inside an object."""
    if isinstance(item, Tensor):
        return [item]
    if dataclasses.is_dataclass(item):
        item = [getattr(item, field.name) for field in dataclasses.fields(item)]
    if isinstance(item, dict):
        item = list(item.values())
    return [found for each in item for found in tensors(each)] if isinstance(item, (list, tuple)) else []


def test_no_object_carries_a_tensor_of_a_gpu(monkeypatch):
    """A tensor that is pickled on its GPU would be unpickled on the sender's; here they are fake ones."""
    handed = []

    def gather(shares, mine, group=None):
        handed.extend(tensors(mine))
        shares[:] = [mine, mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with FakeTensorMode():
        a, b, c = (torch.empty(2, 3, device="cuda:1") for _ in range(3))
        stats = TokenStats(a, b, torch.empty(2), teacher_logprob=c)
        together = Ranks(0, 2).together([stats, {"nested": [(1, "x", a)]}, b, 7])
    assert len(handed) == 6 and {tensor.device.type for tensor in handed} == {"cpu"}
    assert len(together) == 8 and together[-1] == 7
    assert {tensor.device.type for tensor in tensors(together)} == {"cpu"}, "on the device of these ranks"


def test_they_arrive_on_the_device_of_the_rank(monkeypatch):
    def gather(shares, mine, group):
        shares[:] = [mine, mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    first, second = Ranks(0, 2, "meta").together([torch.ones(3)])
    assert first.device.type == second.device.type == "meta"


@pytest.mark.parametrize("item", [(1, 2), [None, "a"], {"a": 1.0}, torch.ones(2), {"a": [torch.ones(1)]}])
def test_an_object_of_the_cpu_is_unchanged(item):
    assert str(moved(item, "cpu")) == str(item)


def test_a_rollout_is_not_copied():
    rollout = Rollout(Prompt(0, "", ({"role": "user"},)), 0, 0, (1,) * 4000, (2,), "", Verdict(0.0))
    assert moved(rollout, "cpu") == rollout and moved(rollout, "cpu").prompt_tokens is rollout.prompt_tokens
