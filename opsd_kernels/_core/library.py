"""Run a problem: choose its rows, plan and backend, call the loop; register that as one graph node.

The only module with the flat form of a problem: schemas, implementations, fakes, `pack` and `unpack`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .. import env
from .._rows import backends
from .._rows.contract import Column, RowBackend
from ..quantized import QuantizedHead
from ..spec import TAILS, RowSpec, Support, expect
from . import loop, student_vocab
from .adapted import Adapters
from .loop import on_host
from .lora import Lora
from .merged_rows import ShardedRows
from .planner import SM_COUNT, ChunkPlan, held_dtype, plan
from .problem import ComputedRows, Outputs, Problem, RowSelection, Side, Teachers, repeated
from .reductions import RowWeigher, fp16_units
from .shard import VocabShard
from .sliced_head import HEADS
from .targets import Target
from .teachers import in_segments

NO_GRADIENTS = (False,) * 5


def arrange(
    problem: Problem, weigher: RowWeigher | None = None, listed: int = 0
) -> tuple[ChunkPlan, RowBackend, ComputedRows, list[slice] | None]:
    """Return the plan, the backend, the rows to compute, and the chunks where they follow sequences.

    The chunks are None where those of the plan serve. `listed` counts the entries that are returned for each
    token.

    Forward and backward get the same plan: saved statistics need the same logits again. The backend of a
    sharded head merges statistics across ranks.
    """
    hidden, teacher, shard = problem.student.hidden, problem.teacher, problem.shard
    target = problem.rows.target
    scope = "index" if weigher is None else weigher.scope
    sequences = [] if weigher is None or scope != "sequence" else weigher.lengths(packs(problem))
    rows = _computed_rows(problem, sum(sequences) if scope == "sequence" else None)
    on_cuda, sides = hidden.device.type == "cuda", [] if teacher is None else [teacher]
    if problem.teachers is not None:
        sides = list(problem.teachers.sides)
    plain = problem.vocab_ids is None and all(
        side.quantised is None
        and side.weight.dtype == side.hidden.dtype == hidden.dtype
        and side.weight.device == hidden.device
        for side in (problem.student, *sides)
    )
    ranks = [0 if side.lora is None else side.lora.A.shape[0] for side in (problem.student, *sides)]
    chunks = plan(
        rows.count,
        # The widest shard on every rank: all ranks use the same chunk boundaries.
        problem.vocab if shard is None else shard.widest,
        hidden.shape[1],
        max((side.hidden.shape[1] for side in sides), default=0),
        hidden.dtype,
        shared_head=problem.shared_head,
        trainable_head=problem.wants[1],
        grad=any(problem.wants),
        # As Problem.of has chosen.
        logits_dtype="input" if problem.logits_dtype == hidden.dtype else "float32",
        bias_grad=problem.wants[2],
        workspace_bytes=problem.workspace_bytes,
        device_type=hidden.device.type,
        weights_scope=scope,
        # Rows sorted by teacher are not those of sequences.
        longest_sequence=max(sequences, default=0) if problem.teachers is None else None,
        policy=weigher is not None and weigher.policy is not None,
        topk=0 if problem.support is None else problem.support.k,
        listed=listed,
        target_copied=target is not None
        and target.copied(problem.logits_dtype, rows.index is not None, problem.vocab_ids),
        one_sweep=problem.spec.one_sweep,
        gradient_tolerance=problem.gradient_tolerance,
        ranks=ranks,
        **({} if plain else _forms(problem, sides)),
        softcap=any(side.softcap is not None for side in (problem.spec.student, problem.spec.teacher)),
        sm_count=torch.cuda.get_device_properties(hidden.device).multi_processor_count
        if on_cuda
        else SM_COUNT,
    )
    if any(ranks):
        rows = replace(rows, adapters=Adapters)
    bounds = align(sequences, chunks.rows) if chunks.weighting == "aligned" else None
    if problem.teachers is not None:
        rows = in_segments(problem, rows, chunks)
    backend = backends.select(problem.backend, hidden.device, chunks.logits_dtype)
    return chunks, backend if shard is None else ShardedRows(backend, shard), rows, bounds


def _forms(problem: Problem, teachers: Sequence[Side]) -> dict[str, Any]:
    """Return the arguments of a plan whose heads are read by slices, or whose sides differ in dtype.

    Of several teachers the widest dtype and the costliest form.
    """
    hidden, forms, widest = problem.student.hidden, [0, 0], problem.student.hidden.dtype
    for k, side in enumerate((problem.student, *teachers)):
        dtype = problem.gemm_dtype(side, k > 0)
        whole = (side.weight.dtype, side.weight.device) == (dtype, hidden.device)
        whole = whole and (k == 0 or problem.vocab_ids is None)
        form = 2 if side.quantised is not None else 0 if whole else 1
        forms[k > 0] = max(forms[k > 0], form)
        widest = dtype if k > 0 and (k == 1 or dtype.itemsize > widest.itemsize) else widest
    return {"heads": tuple(HEADS[form] for form in forms), "teacher_dtype": widest}


def align(lengths: list[int], rows: int) -> list[slice]:
    """Return chunks of whole sequences, none above `rows` unless a single sequence is.

    `lengths` count the valid rows of each sequence.
    """
    bounds, start, stop = [], 0, 0
    for length in lengths:
        if stop > start and stop + length - start > rows:
            bounds.append(slice(start, stop))
            start = stop
        stop += length
    return [*bounds, slice(start, stop)] if stop > start else bounds


def run_weighted(problem: Problem, weigher: RowWeigher) -> tuple[Outputs, Tensor]:
    """Return losses, statistics and gradients where row factors depend on the statistics themselves.

    The gradients are in units of the second result.

    An operator's schema holds no weigher, so under torch.compile this function runs eagerly.
    """
    chunks, backend, rows, bounds = arrange(problem, weigher)
    if chunks.weighting == "own pass" or weigher.has_collectives:
        known = loop.run(replace(problem, wants=NO_GRADIENTS), chunks, backend, rows, metrics=True)
        with torch.autocast(problem.student.hidden.device.type, enabled=False):
            factor, slope = weigher(known, slice(None))
        factor, slope, unit = fp16_units(problem.student.hidden.dtype, factor, slope)
        problem = problem.with_factors(factor, slope)
        out = loop.run(problem, chunks, backend, rows, metrics=True)
        return out, weigher.unit if unit is None else weigher.unit * unit
    out = loop.run(problem, chunks, backend, rows, metrics=True, weigher=weigher, bounds=bounds)
    return out, weigher.unit


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function outside torch.compile. The compiler is not imported for this if it is not loaded."""
    compiling = "torch._dynamo" in sys.modules
    return (torch.compiler.disable(function) if compiling else function)(*args)


def packs(problem: Problem) -> bool:
    """Return True if invalid rows are left out of the GEMMs.

    Packing needs the number of valid rows on the host, which is not possible while a CUDA graph is captured.
    """
    valid = problem.rows.valid
    if valid is None or not env.pack():
        return False
    return valid.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _computed_rows(problem: Problem, count: int | None = None) -> ComputedRows:
    """Choose the rows to compute, and check labels and listed ids.

    Packing syncs with a GPU once, unless the `count` of valid rows is given.
    """
    rows, N = problem.rows, problem.student.hidden.shape[0]
    vocab = problem.vocab
    if problem.vocab_ids is not None:
        vocab = _check_vocab_ids(problem, problem.vocab_ids) or vocab
    if rows.labels is not None:
        check_entries("labels", " or ignore_index", rows.labels, rows.valid, vocab)
    if problem.teachers is not None:
        known = len(problem.teachers.sides)
        check_entries("teacher_index", " at valid tokens", problem.teachers.index, rows.valid, known)
    if rows.topk_ids is not None:
        listed = " wherever teacher_topk_logprobs is above -inf"  # elsewhere ids are 0
        check_entries("teacher_topk_ids", listed, rows.topk_ids, None, problem.vocab)
    if problem.spec.of_rows:
        _check_temperatures(problem.spec)
    if rows.valid is None or not packs(problem):
        return ComputedRows(N, valid=rows.valid)
    index = (rows.valid.nonzero() if count is None else rows.valid.nonzero_static(size=count)).squeeze(1)
    return ComputedRows(N) if index.shape[0] == N else ComputedRows(index.shape[0], index)


def check_entries(
    name: str, otherwise: str, entries: Tensor, valid: Tensor | None, stop: int, least: int = 0
) -> None:
    """Raise ValueError if a valid entry lies outside [least, stop): the vocabulary, or the teachers.

    On CUDA this is an asynchronous device-side assert: no host sync.
    """
    inside = (entries >= least) & (entries < stop)
    inside = inside if valid is None else inside | ~valid
    check_all(name, f"entries in [0, {stop}){otherwise}", entries, inside)


def _check_vocab_ids(problem: Problem, ids: Tensor) -> int | None:
    """Raise ValueError unless the ids are distinct ones of the teacher's vocabulary; return its size.

    That is the least of several teachers', and not known where the teacher is a list.
    """
    sides = [problem.teacher] if problem.teachers is None else problem.teachers.sides
    sizes = [side.weight.shape[0] for side in sides if side is not None]
    if problem.rows.target is not None:
        sizes.append(problem.rows.target.values.shape[1])
    if sizes:
        check_entries(student_vocab.NAME, "", ids, None, min(sizes))
    else:
        check_all(student_vocab.NAME, "ids of at least 0", ids, ids >= 0)
    distinct = "distinct ids (of offsets such as EAGLE-3's d2t: d2t + arange)"
    check_all(student_vocab.NAME, distinct, ids, ~repeated(ids[None])[0])
    return min(sizes, default=None)


def _check_temperatures(spec: RowSpec) -> None:
    """Raise ValueError unless all temperatures are positive and finite; on CUDA as `check_entries`."""
    shared = spec.teacher.temperature is spec.student.temperature
    for transform in (spec.student,) if shared else (spec.student, spec.teacher):
        if (of_rows := transform.of_rows) is not None:
            good = (of_rows > 0) & (of_rows < torch.inf)
            check_all(transform.temperature_name, "positive finite numbers", of_rows, good)


def check_all(name: str, expected: str, values: Tensor, good: Tensor) -> None:
    if on_host(values.device):
        expect(bool(good.all()), name, expected, values[~good][:1].tolist())
    else:
        torch._assert_async(good.all(), f"{name}: expected {expected}")


# ---------------------------------------------------------------- the flat form

PROBLEM = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? factor, Tensor? policy_slope, Tensor? valid, Tensor? labels, "
    "Tensor? topk_ids, Tensor? topk_logprobs, Tensor? target, bool target_probs, "
    "Tensor? temperature, Tensor? teacher_temperature, "
    "float[] spec, int[] support, "
    "bool shared_head, int vocab, ScalarType logits_dtype, int workspace_bytes, float? gradient_tolerance, "
    "str? backend, "
    "int[] shard, str? group, bool[] wants, float[] more_numbers, Tensor?[] more"
)
_NAMES = [argument.split()[1] for argument in PROBLEM.split(", ")]
_FACTOR, _LABELS, _SPEC, _LOGITS, WANTS, MORE = (
    _NAMES.index(name) for name in ("factor", "labels", "spec", "logits_dtype", "wants", "more")
)
_GRADIENTS = "Tensor dh, Tensor dW, Tensor dbias, Tensor dA, Tensor dB"  # empty where none is wanted
_SCHEMAS = (
    f"linear_divergence({PROBLEM}, bool metrics, bool recompute)"
    f" -> (Tensor loss, Tensor A, Tensor stats, Tensor logprobs, Tensor dropped, {_GRADIENTS})",
    f"linear_divergence_backward({PROBLEM}, Tensor stats, Tensor A) -> ({_GRADIENTS})",
)
_SIDES = ("student", "teacher", None)


def pack(problem: Problem) -> tuple[Any, ...]:
    """Flatten a problem into the leading arguments of both ops."""
    rows, spec, support = problem.rows, problem.spec, problem.support
    temperatures = [
        side.temperature if isinstance(side.temperature, Tensor) else None
        for side in (spec.student, spec.teacher)
    ]
    if temperatures[0] is temperatures[1]:
        # Once, so that both sides share one object again in `unpack`.
        temperatures[1] = None
    teacher: tuple[Tensor | None, ...] = (None, None, None)
    if problem.teacher is not None:
        teacher = (problem.teacher.hidden, problem.teacher.weight, problem.teacher.bias)
    shard, group = ([], None) if problem.shard is None else problem.shard.pack()
    sides = [side for side in (problem.student, problem.teacher) if side is not None]
    plain = all(side.lora is None and side.quantised is None for side in sides)
    plain = plain and problem.teachers is None and problem.vocab_ids is None
    numbers, more = ([], []) if plain else _pack_heads(problem)
    return (
        problem.student.hidden,
        problem.student.weight,
        problem.student.bias,
        *teacher,
        rows.factor,
        rows.policy_slope,
        rows.valid,
        rows.labels,
        rows.topk_ids,
        rows.topk_logprobs,
        None if rows.target is None else rows.target.values,
        rows.target is not None and rows.target.probs,
        *temperatures,
        [float(value) for value in (*spec.scalars(linear=False), spec.z_loss)],
        [] if support is None else [support.k, _SIDES.index(support.side), TAILS.index(support.tail)],
        problem.shared_head,
        problem.vocab,
        problem.logits_dtype,
        problem.workspace_bytes,
        problem.gradient_tolerance,
        problem.backend,
        shard,
        group,
        list(problem.wants),
        numbers,
        more,
    )


def _pack_heads(problem: Problem) -> tuple[list[float], list[Tensor | None]]:
    """Return numbers and tensors of adapters, quantised heads, the student's ids, and several teachers."""
    numbers: list[float] = []
    more: list[Tensor | None] = []
    for side in (problem.student, problem.teacher):
        _pack_head(side, numbers, more)
    more.append(problem.vocab_ids)
    if (teachers := problem.teachers) is not None:
        numbers += [*teachers.scales, *(softcap or 0.0 for softcap in teachers.softcaps)]
        more.append(teachers.index)
        # The first one is the problem's teacher.
        for side in teachers.sides[1:]:
            more += [side.hidden, side.weight, side.bias]
            _pack_head(side, numbers, more)
    return numbers, more


def _pack_head(side: Side | None, numbers: list[float], more: list[Tensor | None]) -> None:
    """Append scaling and block size to `numbers`, A, B, scales and zero points to `more`."""
    lora, head = (None, None) if side is None else (side.lora, side.quantised)
    numbers.append(0.0 if lora is None else lora.scaling)
    numbers += (0.0, 0.0) if head is None else head.block
    more += (None, None) if lora is None else (lora.A, lora.B)
    more += (None, None) if head is None else (head.scales, head.zero_points)


def _unpack_head(side: Side, numbers: Sequence[float], parts: Sequence[Any]) -> Side:
    """Return the side with the adapter and the quantised head of `_pack_head`."""
    A, B, scales, zero_points, *_ = parts
    scaling, *block = numbers[:3]
    lora = None if A is None else Lora(A, B, scaling)
    if scales is None:
        return replace(side, lora=lora)
    head = QuantizedHead(side.weight, scales, zero_points, (int(block[0]), int(block[1])))
    return replace(side, lora=lora, quantised=head)


def _unpack_heads(problem: Problem, numbers: Sequence[float], more: Sequence[Any]) -> Problem:
    """Return a problem with the adapters, quantised heads, ids and teachers of `_pack_heads`."""
    student, teacher = _unpack_head(problem.student, numbers, more), problem.teacher
    if teacher is not None:
        teacher = _unpack_head(teacher, numbers[3:], more[4:])
    problem = replace(problem, student=student, teacher=teacher, vocab_ids=more[8])
    if len(more) == 9 or teacher is None:
        return problem
    count = (len(more) - 10) // 7 + 1
    of_each, forms = numbers[6 : 6 + 2 * count], numbers[6 + 2 * count :]
    others = (
        _unpack_head(Side(*more[at : at + 3]), forms[3 * k :], more[at + 3 :])
        for k, at in enumerate(range(10, len(more), 7))
    )
    softcaps = tuple(softcap or None for softcap in of_each[count:])
    teachers = Teachers(more[9], (teacher, *others), tuple(of_each[:count]), softcaps)
    return replace(problem, teachers=teachers)


def unpack(flat: Sequence[Any]) -> Problem:
    """Rebuild a problem from the flat form of `pack`."""
    (h_s, W_s, b_s, h_t, W_t, b_t, factor, slope, valid, labels, ids, logprobs, values, *rest) = flat
    (probs, *rest) = rest
    target = None if values is None else Target(values, probs)
    (temperature_s, temperature_t, spec, support, shared_head, vocab, logits_dtype, *rest) = rest
    workspace_bytes, tolerance, backend, shard, group, wants, numbers, more = rest
    problem = Problem(
        student=Side(h_s, W_s, b_s),
        teacher=None if h_t is None else Side(h_t, W_t, b_t),
        rows=RowSelection(valid, labels, ids, logprobs, factor, slope, target),
        spec=RowSpec.from_scalars(spec, (temperature_s, temperature_t)),
        support=Support(support[0], _SIDES[support[1]], TAILS[support[2]]) if support else None,
        shared_head=shared_head,
        vocab=vocab,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        gradient_tolerance=tolerance,
        backend=backend,
        shard=None if group is None else VocabShard.unpack(shard, group),
        wants=tuple(wants),
    )
    return _unpack_heads(problem, numbers, more) if more else problem


def with_factors(flat: Sequence[Any], factor: Tensor, policy_slope: Tensor | None) -> tuple[Any, ...]:
    """Replace the row factors of a packed problem."""
    return (*flat[:_FACTOR], factor, policy_slope, *flat[_FACTOR + 2 :])


# ---------------------------------------------------------------- implementations


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *flat, metrics, recompute = args
    problem = unpack(flat)
    chunks, backend, rows, _ = arrange(problem)
    if recompute:
        problem = replace(problem, wants=NO_GRADIENTS)
    out = loop.run(problem, chunks, backend, rows, metrics)
    logprobs = out.stats.new_empty(0, 2) if out.logprobs is None else out.logprobs
    new = problem.student.hidden.new_empty
    gradients = (out.dh, out.dW, out.dbias, out.dA, out.dB)
    present = (new(0) if grad is None else grad for grad in gradients)
    return out.loss, out.A, out.stats, logprobs, out.dropped, *present


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *flat, stats, A = args
    problem = unpack(flat)
    chunks, backend, rows, _ = arrange(problem)
    out = loop.run(problem, chunks, backend, rows, metrics=False, saved=(stats, A))
    new = problem.student.hidden.new_empty
    gradients = (out.dh, out.dW, out.dbias, out.dA, out.dB)
    return tuple(new(0) if grad is None else grad for grad in gradients)


# ---------------------------------------------------------------- fakes


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    *flat, metrics, recompute = args
    hidden, labels = flat[0], flat[_LABELS]
    N, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    more = metrics or flat[_SPEC][-1] != 0  # as loop._allocate
    shapes = (N,), (N,), (N, len(Column)), (N if more or labels is not None else 0, 4 if more else 2)
    wants = [False] * len(flat[WANTS]) if recompute else flat[WANTS]
    vectors = (hidden.new_empty(shape, dtype=wide) for shape in shapes)
    return *vectors, hidden.new_empty((), dtype=wide), *fake_gradients(flat, wants)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    flat = args[:-2]
    return fake_gradients(flat, flat[WANTS])


def fake_gradients(flat: Sequence[Any], wants: Sequence[bool]) -> tuple[Tensor, ...]:
    hidden, held = flat[0], held_dtype(flat[0].dtype, flat[_LOGITS])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    leaves, dtypes = [*flat[:3], *(flat[MORE][:2] or (None, None))], (held, held, wide, wide, wide)
    wants = [*wants, False, False][: len(leaves)]
    return tuple(
        hidden.new_empty(leaf.shape, dtype=dtype) if want else hidden.new_empty(0)
        for leaf, dtype, want in zip(leaves, dtypes, wants, strict=True)
    )


_LIBRARY = Library("opsd_kernels", "FRAGMENT")


def register(schemas: Sequence[str], implementations: Sequence[Callable], fakes: Sequence[Callable]) -> None:
    """Register operators with their implementations and fakes."""
    for schema, implementation, fake in zip(schemas, implementations, fakes, strict=True):
        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        register_fake(f"opsd_kernels::{name}", fake, lib=_LIBRARY)


register(_SCHEMAS, (_forward, _backward), (_forward_fake, _backward_fake))

# (*pack(problem), metrics, recompute) -> loss, A, stats, logprobs, dropped, gradients; none with
# `recompute`.
op = torch.ops.opsd_kernels.linear_divergence
# (*pack(problem), stats, A) -> gradients.
op_backward = torch.ops.opsd_kernels.linear_divergence_backward
