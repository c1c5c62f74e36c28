"""Let each token have its teacher: checks of several teachers, and the order of rows in the loop.

The loop computes the tokens teacher by teacher, so that a teacher's rows are neighbours and one GEMM projects
them. The student's logits, dh and dW take whole chunks as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec import check_tensor, expect, of_tokens
from .planner import ChunkPlan
from .problem import ComputedRows, Problem, Side, Teachers
from .shard import shard_of

# May be one for each teacher
OPTIONS = ("teacher_bias", "teacher_lora", "teacher_logit_scale", "teacher_softcap")


def of_each_teacher(name: str, value: Any) -> bool:
    """Return True for a sequence of an option's values. An adapter is itself one, which starts with A."""
    several = isinstance(value, (tuple, list))
    return several and not (name == "teacher_lora" and value and isinstance(value[0], Tensor))


def options_of(options: dict[str, Any], k: int, count: int) -> dict[str, Any]:
    """Return the options of a call with teacher `k` of `count` alone."""
    told = {**options, "teacher_index": None}
    for name in OPTIONS:
        if of_each_teacher(name, told[name]):
            expect(len(told[name]) == count, name, f"{count} values, one per teacher", len(told[name]))
            told[name] = told[name][k]
    return told


def several(
    prepare: Callable[..., tuple[Problem, Any]],
    student: tuple[Tensor, Any],
    teacher: tuple[Any, Any],
    options: dict[str, Any],
    **further: Any,
) -> tuple[Problem, Any]:
    """Return the problem of several teachers and its weigher, from those of each teacher alone.

    `prepare` checks a call with one teacher. Raises ValueError or TypeError with the number of the teacher
    behind the argument's name.
    """
    hidden, weights, index = *teacher, options["teacher_index"]
    listed = isinstance(hidden, (tuple, list))
    if not listed or not all(isinstance(each, Tensor) for each in hidden) or not hidden:
        expected = "a sequence of K tensors, one per teacher, beside teacher_index, else a tensor"
        came = "" if not listed else " of no tensor" if not hidden else " of other things"
        raise TypeError(f"teacher_hidden: expected {expected}, got a {type(hidden).__name__}{came}")
    count, leading = len(hidden), check_tensor("student_hidden", student[0]).shape[:-1]
    expect(index is not None, "teacher_index", f"a tensor {tuple(leading)} of numbers in [0, {count})", None)
    of_each = ["teacher_hidden", *(name for name in OPTIONS if of_each_teacher(name, options[name]))]
    if isinstance(weights, (tuple, list)):
        of_each.append("teacher_weight")
    else:
        weights = [weights] * count
    expect(len(weights) == count, "teacher_weight", f"{count} tensors, one per teacher_hidden", len(weights))
    if options["group"] is not None:
        options = {**options, "group": shard_of(options["group"], student[1], "student_weight")}
    parts: list[tuple[Problem, Any]] = []
    for k in range(count):
        told = options_of(options, k, count)
        with _numbered(k, of_each):
            own = check_tensor("teacher_hidden", hidden[k])
            packed = own.dim() == 2 and own.shape[:-1] != leading
            # In place of packed rows a view without memory, whose shape is that of all tokens
            whole = own.new_zeros(own.shape[-1]).expand(*leading, own.shape[-1]) if packed else own
            parts.append(prepare(student, (whole, weights[k]), told, **further))
            if packed:
                rows = own.detach().to(_teacher(parts[k][0]).hidden.dtype)
                problem = replace(parts[k][0], teacher=replace(_teacher(parts[k][0]), hidden=rows))
                parts[k] = problem, parts[k][1]
    index = check_tensor("teacher_index", index)
    expect(index.dtype == torch.int64, "teacher_index", "dtype int64", index.dtype, TypeError)
    index = of_tokens("teacher_index", "a tensor", index, student[0], index.dtype)
    problem = _combined([problem for problem, _ in parts], index)
    weigher = parts[0][1]
    weigher.problem = problem
    return problem, weigher


@contextmanager
def _numbered(k: int, of_each: list[str]) -> Iterator[None]:
    """Name teacher k in errors of the arguments that it has alone: "teacher_weight[1]: expected ..."."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = re.sub(rf"^({'|'.join(of_each)})(?=[: ])", rf"\1[{k}]", str(error))
        raise type(error)(text) from None


def _teacher(problem: Problem) -> Side:
    assert problem.teacher is not None
    return problem.teacher


def _combined(parts: list[Problem], index: Tensor) -> Problem:
    """Return one problem. The student's head is the teachers' too if it is that of each."""
    first = parts[0]
    for part in parts:
        # A teacher may need the student's rows in a wider dtype.
        first = part if part.student.hidden.dtype.itemsize > first.student.hidden.dtype.itemsize else first
    shared, head = all(part.shared_head for part in parts), first.student.weight.detach()
    sides = tuple(
        replace(_teacher(part), weight=head) if part.shared_head else _teacher(part) for part in parts
    )
    transforms, dtype = [part.spec.teacher for part in parts], first.logits_dtype
    for part in parts:
        # As wide as the teacher with the widest needs it
        dtype = part.logits_dtype if part.logits_dtype.itemsize > dtype.itemsize else dtype
    return replace(
        first,
        teacher=sides[0],
        teachers=Teachers(
            index,
            sides,
            tuple(transform.scale for transform in transforms),
            tuple(transform.softcap for transform in transforms),
        ),
        shared_head=shared,
        logits_dtype=dtype,
        spec=replace(first.spec, difference=all(part.spec.difference for part in parts)),
    )


def one_of(problem: Problem, k: int, place: Tensor | None) -> Problem:
    """Return the problem of teacher `k` alone; `place` (N,) are the tokens' rows in packed hidden states."""
    teachers = problem.teachers
    assert teachers is not None
    transform = replace(problem.spec.teacher, scale=teachers.scales[k], softcap=teachers.softcaps[k])
    side = replace(teachers.sides[k], rows=place)
    if not len(side.hidden):
        # A teacher without a token may be asked for the row of an invalid one.
        side = replace(side, hidden=side.hidden.new_zeros(1, side.hidden.shape[1]))
    return replace(problem, teacher=side, spec=replace(problem.spec, teacher=transform), teachers=None)


def in_segments(problem: Problem, rows: ComputedRows, plan: ChunkPlan) -> ComputedRows:
    """Sort the rows of a call by teacher. Counts the segments on the host, which syncs with a GPU."""
    teachers, N = problem.teachers, problem.tokens
    assert teachers is not None
    count, index = len(teachers.sides), teachers.index
    positions = torch.arange(N, device=index.device) if rows.index is None else rows.index
    own = index[positions].clamp(0, count - 1)  # an invalid row may hold any number
    order = own.argsort(stable=True)
    chunk = torch.arange(len(own), device=index.device).div(plan.rows, rounding_mode="floor")
    sizes = (chunk * count + own[order]).bincount(minlength=plan.chunks * count).view(-1, count).tolist()
    places: list[Tensor | None] = []
    for k, side in enumerate(teachers.sides):
        packed = side.hidden.shape[0] != N
        places.append((index == k).cumsum(0).sub_(1).clamp_(min=0) if packed else None)
        if packed:
            found = int((index == k).sum())
            expected = f"{found} rows, those of the tokens of this teacher, or shape (..., H)"
            expect(side.hidden.shape[0] == found, f"teacher_hidden[{k}]", expected, side.hidden.shape[0])
    segments = [[(k, size) for k, size in enumerate(of) if size] for of in sizes]
    return replace(rows, index=positions[order], places=tuple(places), segments=segments)


def walks_of(walk: Any, rows: ComputedRows) -> Callable[[int, slice], list[tuple[Any, slice]]]:
    """Return a function that cuts a chunk into its segments, each with the loop.Walk of its teacher."""
    walks = [replace(walk, problem=one_of(walk.problem, k, place)) for k, place in enumerate(rows.places)]

    def cut(chunk: int, whole: slice) -> list[tuple[Any, slice]]:
        assert rows.segments is not None
        segments, start = [], whole.start
        for k, size in rows.segments[chunk]:
            segments.append((walks[k], slice(start, start + size)))
            start += size
        return segments

    return cut
