"""Define `cache_forward_kl` and `linear_cached_forward_kl`: a forward KL to a teacher that is gone.

The formula is at the top of `_core/forward_cache.py`.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ._core.autograd import cached_forward_kl
from ._core.forward_cache import Parts, forward_kl_parts
from ._core.library import check_all
from ._core.problem import Problem, Side, checked, of_one_side
from ._core.reductions import RowWeigher, reads_logprobs, row_scale
from .quantized import QuantizedHead
from .spec import Adapter, LogitTransform, check_number, expect
from .weights import TokenWeighting

SAMPLE = 1024  # entries of the head by which another one is recognised


@dataclass(frozen=True)
class ForwardKLCache:
    """Hold a teacher's part of the forward KL to a student with a frozen head.

    Four tensors of the tokens' shape (...), in fp32 (fp64 for fp64 inputs), H_s + 3 numbers a token. Index it
    like them: `cache[rows]` holds some of the tokens. `save` and `load` keep it in a file.
    """

    mean: Tensor  # (..., H_s): the teacher's mean of the head's rows, minus the row of `token`
    bias: Tensor  # (...): the same of the student's bias
    negative_entropy: Tensor  # (...), nats, of the teacher
    token: Tensor  # (...) int64: the teacher's most likely token, -1 at masked ones
    sample: Tensor  # (SAMPLE,): entries of the student's head
    temperature: float
    vocab_size: int
    has_bias: bool
    group_size: int  # ranks over which the head was split

    def __getitem__(self, rows: Any) -> ForwardKLCache:
        """Return the cache of some of the tokens, by any index of the leading dimensions."""
        parts = {name: getattr(self, name)[rows] for name in PER_TOKEN[1:]}
        each = rows if isinstance(rows, tuple) else (rows,)
        ends = any(index is Ellipsis for index in each)  # the hidden dimension follows what it stands for
        return replace(self, mean=self.mean[(*each, slice(None)) if ends else rows], **parts)

    def to(self, device: torch.device | str) -> ForwardKLCache:
        """Return the cache with its tensors on `device`."""
        tensors = (*PER_TOKEN, "sample")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, as a dict of tensors and numbers by `torch.save`."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ForwardKLCache:
        """Read a cache that `save` wrote. Raises ValueError for a file of something else."""
        with open(path, "rb") as file:
            archive = zipfile.is_zipfile(file)
        try:
            held: Any = torch.load(path, map_location=device, weights_only=True) if archive else None
        except pickle.UnpicklingError:  # objects of other classes
            held = None
        names = {field.name for field in fields(cls)}
        good = isinstance(held, dict) and set(held) == names
        expect(good, "path", "a file that ForwardKLCache.save wrote", f"another one, {os.fspath(path)}")
        return cls(**held)


PER_TOKEN = ("mean", "bias", "negative_entropy", "token")


def cache_forward_kl(
    teacher_hidden: Tensor,  # (..., H_t)
    teacher_weight: Tensor | QuantizedHead,  # (V_t, H_t)
    student_weight: Tensor | QuantizedHead,  # (V_s, H_s), frozen
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_lora: Adapter | None = None,
    student_lora: Adapter | None = None,  # frozen
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> ForwardKLCache:
    """Keep all that the forward KL to a student with a frozen head needs of a teacher.

    A student trained below a frozen head (LoRA on the trunk, a draft model on the target's head) sees the
    same teacher in every epoch. The forward KL needs of it the mean of the head's rows under the teacher's
    distribution, and its entropy. `linear_cached_forward_kl` takes them in place of the teacher: two GEMM
    passes, not three, and no teacher in memory.

    The options are those of `linear_divergence`; the cache belongs to this `temperature`, `student_weight`,
    `student_bias` and `student_lora`. Two GEMM passes over fp32 logits, the second in fp32 (fp64) for a
    16-bit head too; never more than `workspace_bytes` of logits. A quantised student head is rounded to the
    dtype of `teacher_hidden`, as the student's GEMM rounds it to that of its rows. No gradient. Masked tokens
    hold zeros.

    Raises ValueError or TypeError as `linear_divergence` does.
    """
    name = "temperature" if teacher_temperature is None else "teacher_temperature"
    given = temperature if teacher_temperature is None else teacher_temperature
    number = check_number("temperature", temperature, positive=True)
    transform = LogitTransform.parse("teacher", teacher_logit_scale, teacher_softcap, name, given)
    problem = of_one_side(
        Side(teacher_hidden, teacher_weight, teacher_bias, teacher_lora), transform,
        mask=mask, vocab_size=vocab_size, workspace_bytes=workspace_bytes, backend=backend,
        group=group, prefixes=("teacher_", ""),
    )  # fmt: skip
    head = _frozen_head(problem, Side(teacher_hidden, student_weight, student_bias, student_lora), vocab_size)
    parts = forward_kl_parts(problem, head)
    leading = teacher_hidden.shape[:-1]
    shaped = {
        name: getattr(parts, name).reshape((*leading, *getattr(parts, name).shape[1:])) for name in PER_TOKEN
    }
    return ForwardKLCache(
        **shaped, sample=_sample(head), temperature=number, vocab_size=problem.vocab,
        has_bias=head.bias is not None, group_size=_ranks(problem),
    )  # fmt: skip


def linear_cached_forward_kl(
    student_hidden: Tensor,  # (..., H_s)
    student_weight: Tensor | QuantizedHead,  # (V_s, H_s), frozen
    cache: ForwardKLCache,  # of tokens (...)
    *,
    temperature: float | None = None,
    student_bias: Tensor | None = None,
    student_lora: Adapter | None = None,  # frozen
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | TokenWeighting | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: object | None = None,
) -> Tensor:
    """Compute KL(teacher || student) in nats from a cached teacher, for a student with a frozen head.

    Equal to `linear_divergence(divergence="forward_kl")` on the teacher of the cache, in two GEMM passes (one
    without a gradient). The gradient flows to `student_hidden` alone, for any upstream gradient per token.
    Mask, token weights of scope "index", reductions and `normalizer` are those of `linear_divergence`; a
    token that the cache was masked at must be masked here too. In 16 bits the rounding of the gradient is
    that of the student's distribution, not of its difference from the teacher's: in bf16 an error of 2 % at
    .1 nats from the teacher and 8 % at .01 nats, where `linear_divergence` keeps .3 %.

    Refused by name: a head that requires a gradient, another head than the cache's (by its shape and a sample
    of 1024 entries), another `temperature` or `vocab_size`, a bias where the cache has none or the reverse,
    and a softcap, which bends the logits, so that the mean of the head's rows no longer gives their mean.
    Raises ValueError or TypeError for these and other bad arguments.
    """
    expect(isinstance(cache, ForwardKLCache), "cache", "a ForwardKLCache", type(cache).__name__, TypeError)
    expected = "None: a softcap bends the logits, whose mean a cache cannot hold"
    expect(student_softcap is None, "student_softcap", expected, student_softcap)
    if temperature is not None:
        same = check_number("temperature", temperature) == cache.temperature
        expect(same, "temperature", f"{cache.temperature}, that of the cache", temperature)
    transform = LogitTransform.parse("student", student_logit_scale, None, "temperature", cache.temperature)
    given = checked("student_", Side(student_hidden, student_weight, student_bias, student_lora), None)
    problem = of_one_side(
        given, transform, mask=mask, vocab_size=cache.vocab_size if vocab_size is None else vocab_size,
        workspace_bytes=workspace_bytes, backend=backend, group=group, prefixes=("student_", ""),
    )  # fmt: skip
    leading = student_hidden.shape[:-1]
    _check_cache(problem, cache, leading, given)
    problem = replace(problem, rows=replace(problem.rows, labels=cache.token.reshape(-1)))
    reads_logprobs(token_weights, None)
    scale = row_scale(reduction, normalizer, student_hidden, problem.rows.valid)
    weigher = RowWeigher(problem, leading, token_weights, scale, None, 0.0)
    expected = "a tensor, or a weighting of scope 'index': there are no statistics of the teacher"
    expect(weigher.scope == "index", "token_weights", expected, f"one of scope {weigher.scope!r}")
    parts = Parts(
        *(getattr(cache, name).reshape(-1, *getattr(cache, name).shape[len(leading) :]) for name in PER_TOKEN)
    )
    return cached_forward_kl(problem, parts, transform.scale / cache.temperature, weigher)


def _frozen_head(problem: Problem, side: Side, vocab_size: int | None) -> Side:
    """Check the student's head against the teacher's problem, and return it detached."""
    side = checked("student_", side, None)
    weight, bias, lora = side.weight, side.bias, side.lora
    rows, columns = problem.student.weight.shape[0], problem.vocab
    columns = columns if problem.shard is None else problem.shard.stop - problem.shard.start
    good = weight.dim() == 2 and (weight.shape[0] >= columns if vocab_size else weight.shape[0] == rows)
    expected = f"shape ({columns} or more, H)" if vocab_size else f"shape ({rows}, H), or vocab_size"
    expect(good, "student_weight", expected, tuple(weight.shape))
    device = problem.student.hidden.device
    for name, value in (("student_weight", weight), ("student_bias", bias)):
        if value is None:
            continue
        numbers = value.is_floating_point() or (value is weight and side.quantised is not None)
        expect(numbers, name, "a floating-point tensor", value.dtype, TypeError)
        expect(value.device == device, name, f"a tensor on {device}, as teacher_hidden", value.device)
    if bias is not None:
        expect(
            bias.shape == weight.shape[:1], "student_bias", f"shape ({weight.shape[0]},)", tuple(bias.shape)
        )
    if lora is not None:
        lora.check("student_lora", weight.shape, weight.device)
    return side.detach()


def _check_cache(problem: Problem, cache: ForwardKLCache, leading: torch.Size, head: Side) -> None:
    """Raise ValueError for a call that the cache does not belong to. `head` is the student's, as given."""
    weight, bias, lora = head.weight, head.bias, head.lora
    same = cache.token.shape == leading
    expect(same, "cache", f"tokens of shape {tuple(leading)}, as student_hidden", tuple(cache.token.shape))
    device = problem.student.hidden.device
    expect(cache.token.device == device, "cache", f"tensors on {device}", cache.token.device)
    names = ("student_weight", "student_bias", "student_lora A", "student_lora B")
    for name, leaf in zip(names, head.leaves[1:], strict=False):
        trains = torch.is_grad_enabled() and leaf is not None and leaf.requires_grad
        expected = "no gradient: the cache holds a product with the head"
        expect(not trains, name, expected, "a tensor that requires one")
    expect(
        problem.vocab == cache.vocab_size,
        "vocab_size",
        f"{cache.vocab_size}, that of the cache",
        problem.vocab,
    )
    H = cache.mean.shape[-1]
    expect(weight.shape[1] == H, "student_weight", f"hidden size {H}, that of the cache", weight.shape[1])
    came = "none" if bias is None else "one"
    expected = "the bias that the cache was made with" if cache.has_bias else "None, as in the cache"
    expect((bias is not None) == cache.has_bias, "student_bias", expected, came)
    ranks = _ranks(problem)
    expect(ranks == cache.group_size, "group", f"{cache.group_size} ranks, as for the cache", ranks)
    mine, text = _sample(head), "the head that the cache was made with"
    check_all("student_weight", f"{text}, with its adapter" if lora else text, mine, mine == cache.sample)
    held, valid = cache.token.reshape(-1), problem.rows.valid
    known = held >= 0 if valid is None else (held >= 0) | ~valid
    check_all("mask", "0 at tokens that the cache was masked at", held, known)


def _ranks(problem: Problem) -> int:
    """Return the number of ranks over which the head is split."""
    return 1 if problem.shard is None else problem.shard.group.size()


def _sample(head: Side) -> Tensor:
    """Return SAMPLE entries of the head, (SAMPLE,), spread over its rows, columns, bias and adapter."""
    weight, bias, lora = head.weight, head.bias, head.lora
    steps = torch.arange(SAMPLE, device=weight.device)
    rows, columns = steps * weight.shape[0] // SAMPLE, steps * 7919 % weight.shape[1]
    if head.quantised is not None:
        sample = head.quantised.entries(rows, columns)
    else:
        sample = weight.detach()[rows, columns].float()
    if lora is not None:
        factors = lora.B.detach()[rows].float() * lora.A.detach().t()[columns].float()
        sample = sample + lora.scaling * factors.sum(1)
    return sample if bias is None else sample + torch.nan_to_num(bias.detach()[rows].float())
