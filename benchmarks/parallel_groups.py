"""Vocabulary shards in one process: process groups without processes, and the gate of losses over shards."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import VocabShard, linear_divergence
from opsd_kernels.bench.measure.gate import CHECKED_ROWS, TOKENS, outcome_of, reference
from opsd_kernels.bench.shapes import Setting, make_case
from opsd_kernels.testing import (
    Case,
    Outcome,
    assert_no_worse,
    assert_on_target,
    assert_same_bits,
    evaluate,
    relative_error,
)


class EchoGroup(dist.ProcessGroup):
    """One rank of `size` without the others: a gather returns its own numbers, a reduction its own part.

    `sent` lists the collectives, as (kind, numbers sent).
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.sent: list[tuple[str, int]] = []

    @property
    def group_name(self) -> str:
        return f"{type(self).__name__} {id(self)}"

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: object = None) -> None:
        self.sent.append(("gather", inputs[0].numel()))
        for output, received in zip(outputs[0], self._exchange(inputs[0]), strict=True):
            output.copy_(received)

    def allreduce(self, tensors: list[Tensor], options: object = None) -> None:
        self.sent.append(("reduce", tensors[0].numel()))

    def _exchange(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks."""
        return [own] * self.size()


class ThreadGroup(EchoGroup):
    """A rank that is a thread, which exchanges with the threads that share its `barrier` and `slots`."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Tensor]) -> None:
        super().__init__(rank, barrier.parties)
        self._barrier, self._slots = barrier, slots

    def allreduce(self, tensors: list[Tensor], options: object = None) -> None:
        every = torch.stack(self._exchange(tensors[0]))
        largest = getattr(options, "reduceOp", dist.ReduceOp.SUM) == dist.ReduceOp.MAX
        tensors[0].copy_(every.amax(0) if largest else every.sum(0))

    def _exchange(self, own: Tensor) -> list[Tensor]:
        self._slots[self.rank()] = own.clone()
        self._barrier.wait()
        received = list(self._slots)
        self._barrier.wait()  # the next exchange may overwrite the slots only after all ranks have read them
        return received


def cut(case: Case, shard: VocabShard) -> Case:
    """Return this rank's shard of a case without biases."""
    weight = case.student_weight[shard.start : shard.stop]
    shared = case.teacher_weight is case.student_weight
    return replace(
        case,
        student_weight=weight,
        teacher_weight=weight if shared else case.teacher_weight[shard.start : shard.stop],
    )


def merged(parts: list[Outcome]) -> Outcome:
    """Merge the outcomes of all ranks, with the rows of dW that gate.outcome_of keeps.

    Raises AssertionError unless the ranks agree bit for bit on loss and hidden gradient.
    """
    for part in parts[1:]:
        assert_same_bits(replace(part, student_weight=None), replace(parts[0], student_weight=None))
    weight = torch.cat([part.student_weight for part in parts])
    return replace(parts[0], student_weight=weight[:: max(1, weight.shape[0] // CHECKED_ROWS)])


def emulated(case: Case, divergence: str, ranks: int) -> Outcome:
    """Run the op on all shards at once, one thread per rank. Raises the first exception of a rank."""
    barrier = threading.Barrier(ranks, timeout=60)
    slots: list[Tensor] = [torch.empty(0)] * ranks
    parts: dict[int, Outcome] = {}
    errors: list[Exception] = []

    def run(rank: int) -> None:
        shard = VocabShard.from_vocab(case.student_weight.shape[0], ThreadGroup(rank, barrier, slots))
        try:
            parts[rank] = evaluate(linear_divergence, cut(case, shard), divergence=divergence, group=shard)
        except Exception as error:  # raised below; the barrier must not keep the other ranks waiting
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return merged([parts[rank] for rank in range(ranks)])


class Gate:
    """The float64 outcome of a setting on the whole vocabulary, at TOKENS tokens, and its bounds."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting.at(N=TOKENS)
        self.case = make_case(self.setting)
        op = reference(self.setting)
        self._truth, self._plain = outcome_of(op, self.case.double()), outcome_of(op, self.case)

    def errors(self, actual: Outcome) -> dict[str, float]:
        """Return relative errors of loss and gradients. Raises AssertionError if one exceeds its bound."""
        if self.setting.torch_dtype.itemsize == 2:
            assert_on_target(actual, self._truth, "default")
        else:
            assert_no_worse(actual, self._plain, self._truth)
        off = {name: relative_error(value, dict(self._truth.named())[name]) for name, value in actual.named()}
        return {"loss_error": off.pop("loss"), "gradient_error": max(off.values())}
