"""Calls of every op, drawn by hypothesis from the cross product of its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from checked_call import ONE_HEAD, WITH_LOSS, Call
from hypothesis import strategies as st
from torch import Tensor

from opsd_kernels import weights
from opsd_kernels.spec import KIND_NAMES, TAILS
from opsd_kernels.testing import hard_case

NARROW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64,) * 6 + (torch.float32,) * 3 + NARROW
LEADING = ((12,), (3, 4), (3, 4), (2, 3, 2), (7,), (1, 1), (), (0,), (2, 0))
MASKS = ("both", "mask", "numbers", "labels", "none", "none", "nothing valid")
TEMPERATURES = ("one", "number", "numpy", "0-dim", "of tokens", "of sequences", "of positions")
TRAINABLE = (
    ("student_hidden", "student_weight", "student_bias", "A", "B"),
    ("student_hidden", "student_weight", "student_bias", "A", "B"),
    ("student_hidden",),
    ("student_hidden", "A", "B"),
    ("student_weight",),
    ("student_bias", "student_hidden"),
    (),
)


def _temperature(
    draw: Callable, leading: tuple[int, ...], gen: torch.Generator, kinds: tuple[str, ...]
) -> Any:
    kind = draw(st.sampled_from(kinds))
    shape = {
        "of tokens": leading,
        "of positions": leading[-1:],
        "of sequences": (*leading[:-1], 1)[-len(leading) :],
    }
    if kind in shape:
        shape_of = shape[kind] if leading else ()
        return 0.6 + torch.rand(shape_of, generator=gen, dtype=torch.float64)
    return {"one": 1.0, "number": 0.7, "numpy": np.float32(1.25), "0-dim": torch.tensor(1.5)}[kind]


def _valid(
    draw: Callable, case: Any, leading: tuple[int, ...], takes_labels: bool
) -> tuple[Any, dict[str, Any]]:
    """Return the case of the leading shape with some of its tokens masked, and the options that mask them."""
    n = math.prod(leading)
    names = ("student_hidden", "teacher_hidden", "mask", "labels", "token_weights")
    shaped = {x: getattr(case, x)[:n].reshape((*leading, *getattr(case, x).shape[1:])) for x in names}
    case = replace(case, **shaped)
    kind = draw(st.sampled_from(MASKS if takes_labels else ("mask", "numbers", "none", "nothing valid")))
    valid, labels = case.mask & (case.labels != -100), case.labels
    some = case.labels.clamp(min=0)
    options: dict[str, Any] = {}
    if kind == "both":
        options = {"mask": case.mask, "labels": labels}
    elif kind == "labels":
        ignore = draw(st.sampled_from((-100, -1)))
        options = {"labels": torch.where(valid, some, ignore), "ignore_index": ignore}
    elif kind in ("mask", "numbers"):
        options = {
            "mask": valid if kind == "mask" else valid.to(draw(st.sampled_from((torch.float32, torch.int64))))
        }
    elif kind == "nothing valid":
        options = {"mask": torch.zeros_like(valid)}
    if kind in ("none",):
        # Unequal, since at p = q the gradient of the total variation jumps
        clean = {
            name: torch.nan_to_num(getattr(case, name), value, value, value)
            for name, value in (("student_hidden", 0.1), ("teacher_hidden", -0.2))
        }
        case = replace(case, **clean, token_weights=torch.nan_to_num(case.token_weights, 0.5))
    if takes_labels and "labels" not in options and draw(st.booleans()):
        options["labels"] = some
    return case, options


def _loss_options(
    draw: Callable, exact: bool, leading: tuple[int, ...], case: Any, labels: bool
) -> dict[str, Any]:
    """Draw divergence, clips, z-loss, weights, reduction. Only an `exact` call has kinks and thresholds."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    narrow = case.student_weight.dtype in NARROW
    options = {
        "divergence": one(*KIND_NAMES),
        "beta": one(0.1, 0.5, 0.8),
        "z_loss": one(None, None, 0.03, 0.0),
        "entry_clip": one(None, None, 0.01, 0.2) if exact else None,
        "token_clip": one(None, None, 0.5) if exact else None,
        "reduction": one("mean", "sum", "none", "sequence_mean" if len(leading) == 2 else "mean"),
        "return_stats": one(False, True),
        "gradient_tolerance": one(None, None, None, 0.0),
        "logits_dtype": one("auto", "auto", "auto" if narrow else "input", torch.float32),
    }
    if not exact and options["divergence"] == "tvd":
        options["divergence"] = "jsd"
    if options["reduction"] == "mean":
        options["normalizer"] = one(None, None, 7.0, 0, torch.tensor(3.0))
    kind = one("none", "tensor", "first", *(("gate", "ratio", "prefix", "mean one") if exact else ()))
    flat = (math.prod(leading[:-1]), leading[-1]) if leading else (1, 1)
    old = torch.full(flat, -2.0, dtype=torch.float64)
    made = {
        "none": None,
        "tensor": case.token_weights,
        "first": weights.FirstFraction(0.5),
        "gate": weights.EntropyGate("student", above=0.7),
        "ratio": weights.ImportanceRatio(old) if labels else None,
        "prefix": weights.PrefixDiscrepancy(0.4, of="divergence"),
        "mean one": weights.MeanOne(weights.EntropyGate("student", below=1.5)),
    }
    options["token_weights"] = made[kind]
    return options


def _adapter(
    draw: Callable, weight: Tensor, gen: torch.Generator, scaling: float
) -> tuple[Tensor, Tensor, float]:
    rank, (V, H) = draw(st.sampled_from((1, 3))), weight.shape
    wide = torch.promote_types(weight.dtype, torch.float32)
    dtype = draw(st.sampled_from((weight.dtype, wide)))
    A, B = torch.randn(rank, H, generator=gen) / math.sqrt(H), torch.randn(V, rank, generator=gen) / 2
    return A.to(dtype), B.to(dtype), scaling


def _several(
    draw: Callable, case: Any, leading: tuple[int, ...], gen: torch.Generator, mask: dict
) -> tuple[list, dict]:
    """Draw K teachers: their hidden states and heads, and the options of each."""
    dtype, H, rows = case.student_hidden.dtype, case.student_hidden.shape[-1], case.student_weight.shape[0]
    K, shared, packed = (draw(st.sampled_from(x)) for x in ((1, 2, 3), (False, True), (False, True)))
    index = torch.randint(K, leading, generator=gen)
    valid = torch.ones(leading, dtype=torch.bool)
    if "mask" in mask:
        valid &= mask["mask"] != 0
    if "labels" in mask:
        valid &= mask["labels"] != mask.get("ignore_index", -100)
    hidden, heads = [], []
    for k, width in enumerate((H,) * K if shared else (3, 5, 9)[:K]):
        states = torch.where((index == k)[..., None], torch.randn(*leading, width, generator=gen), math.nan)
        hidden.append((states.reshape(-1, width)[index.reshape(-1) == k] if packed else states).to(dtype))
        head = torch.randn(rows, width, generator=gen).to(dtype)
        heads.append(case.student_weight if shared else head)
    options: dict[str, Any] = {"teacher_index": index if packed else torch.where(valid, index, -7)}
    if not shared and draw(st.booleans()):
        options["teacher_bias"] = [
            torch.randn(rows, generator=gen).to(dtype) if k else None for k in range(K)
        ]
        options["teacher_logit_scale"] = [1.0, 0.5, 1.3][:K]
        options["teacher_softcap"] = draw(st.sampled_from((None, 9.0, [None, 7.0, 11.0][:K])))
    return [hidden, heads], options


def _target(draw: Callable, case: Any, V: int, gen: torch.Generator) -> tuple[Tensor, dict]:
    """Draw rows over the vocabulary: with a removed entry, of some dtype, or with columns beyond it."""
    leading, form = case.student_hidden.shape[:-1], draw(st.sampled_from(("logits", "logprobs", "probs")))
    more = draw(st.sampled_from((0, 3))) if case.vocab_size else 0
    rows = 3 * torch.randn(*leading, V + more, generator=gen, dtype=torch.float64)
    if draw(st.booleans()) and V > 2:
        rows[..., V // 2] = -math.inf
    rows = {"logits": rows, "logprobs": rows.log_softmax(-1), "probs": rows.softmax(-1)}[form]
    dtype = draw(st.sampled_from((case.student_hidden.dtype, torch.float32, torch.float64)))
    return rows.to(dtype), {"target_is": form}


def _list(
    draw: Callable, leading: tuple[int, ...], V: int, gen: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ids and log-probs, (..., K) each, with padding and repeats; and the log-probs that count."""
    K = min(draw(st.sampled_from((2, 4, 9))), V)
    ids = torch.rand(*leading, V, generator=gen).argsort(-1)[..., :K]
    logprobs = torch.randn(*leading, V, generator=gen, dtype=torch.float64).log_softmax(-1)[..., :K]
    counted = logprobs
    if draw(st.booleans()):
        ids, logprobs = torch.cat([ids, ids[..., :1]], -1), torch.cat([logprobs, logprobs[..., :1] - 0.1], -1)
        counted = logprobs.clone()
        counted[..., -1] = -math.inf
    if draw(st.booleans()):
        gone = torch.rand(ids.shape, generator=gen) < 0.3
        # A repeat of a padded entry is the first that counts.
        gone[..., -1] = gone[..., 0] & (counted[..., -1] > -math.inf)
        ids, logprobs = torch.where(gone, -7, ids), torch.where(gone, -math.inf, logprobs)
        repeated = counted.shape[-1] > K
        counted = torch.where(gone, -math.inf, counted)
        if repeated:
            counted[..., -1] = torch.where(gone[..., 0], logprobs[..., -1], counted[..., -1])
    return ids, logprobs, counted


def _sides(
    draw: Callable, form: str, case: Any, gen: torch.Generator, scales: tuple, exact: bool
) -> dict[str, Any]:
    """Draw the options of the logits of both sides."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    prefix, leading = "" if form in ONE_HEAD else "student_", tuple(case.student_hidden.shape[:-1])
    softcaps = one((None, None), (None, None), (9.0, 9.0), (6.0, None))
    options = {f"{prefix}bias": case.student_bias, f"{prefix}logit_scale": scales[0]}
    options["vocab_size"] = case.vocab_size
    if form != "cached":
        options[f"{prefix}softcap"] = softcaps[0]
    kinds = TEMPERATURES[:3] if form == "cached" else TEMPERATURES
    options["temperature"] = _temperature(draw, leading, gen, kinds)
    if form in ("heads", "several", "cached", "target"):
        options["teacher_temperature"] = one(None, _temperature(draw, leading, gen, TEMPERATURES))
    if form in ("heads", "cached"):
        options |= {"teacher_bias": case.teacher_bias, "teacher_logit_scale": scales[1]}
        options["teacher_softcap"] = softcaps[1]
    if form in ("heads", "several", "target"):
        options["teacher_mix"] = one(0.0, 0.0, 0.3)
        if exact and one(False, True):
            k, tail = one(1, 4, 100), one(*TAILS)
            # One entry would be certain on both sides
            options["topk"] = 2 if tail == "renormalize" and k == 1 else k
            options |= {"topk_tail": tail, "topk_support": one("student", "teacher")}
    return options


def _beside_the_student(
    draw: Callable, form: str, case: Any, V: int, gen: torch.Generator, options: dict[str, Any]
) -> tuple[list[Any], dict[str, Any], dict[int, Any]]:
    """Draw the arguments after the student's, options of them, and what the reference gets in their place."""
    leading = tuple(case.student_hidden.shape[:-1])
    if form in ("heads", "cached"):
        return [case.teacher_hidden, case.teacher_weight], {}, {}
    if form == "several":
        return (*_several(draw, case, leading, gen, options), {})
    if form == "target":
        target, told = _target(draw, case, V, gen)
        return [target], told, {}
    if form == "listed":
        ids, logprobs, counted = _list(draw, leading, V, gen)
        return [ids, logprobs], {"tail": draw(st.sampled_from(TAILS))}, {3: counted}
    if form == "at ids":
        ids = torch.randint(-1, V, (*leading, draw(st.sampled_from((1, 6)))), generator=gen)
        ids[..., -1] = ids[..., 0]
        return [ids], {}, {}
    if form == "list":
        return [draw(st.sampled_from((1, min(5, V), V)))], {}, {}
    labels = options.pop("labels", case.labels.clamp(min=0))
    return [labels], {"return_entropy": draw(st.booleans())}, {}


def _adapters(draw: Callable, form: str, case: Any, gen: torch.Generator) -> dict[str, Any]:
    """Draw an adapter of the student, of the teacher, of each, or one for both."""
    one_head = case.teacher_weight is case.student_weight
    kinds = ("student", "teacher", "both", "one" if one_head else "both") if form == "heads" else ("student",)
    which, adapter = draw(st.sampled_from(kinds)), _adapter(draw, case.student_weight, gen, 0.7)
    options = {}
    if which != "teacher":
        options["lora" if form in ONE_HEAD else "student_lora"] = adapter
    if which in ("teacher", "both"):
        options["teacher_lora"] = _adapter(draw, case.teacher_weight, gen, 1.5)
    elif which == "one":
        options["teacher_lora"] = adapter
    return options


def _column(x: Any) -> Any:
    """Return a tensor as a view with gaps; anything else as it is."""
    return torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x


@st.composite
def calls(draw: Callable, backend: str, form: str) -> Call:
    """Draw a call of a form that its op accepts, but for `backward="in_forward"` where it cannot serve."""

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    dtype = one(*DTYPES)
    # Of a few numbers the largest error in fp32 is luck
    leading = one(*(LEADING if dtype == torch.float64 else LEADING[:4]))
    exact, narrow, takes_labels = dtype == torch.float64, dtype in NARROW, form in (*WITH_LOSS, "log-probs")
    V = one(*((67, 130) if narrow else (2, 7, 13, 33, 67) if exact else (33, 67)))
    H, seed = one(*((16,) if narrow else (1, 5, 8) if exact else (8, 12))), draw(st.integers(0, 10**6))
    gen = torch.Generator().manual_seed(seed)
    scales = one((1.0, 1.0), (1.0, 1.0), (1.3, 1.3), (1.3, 0.5), (-0.5, 1.0))
    case = hard_case(
        max(math.prod(leading), 1), V, H, dtype, seed=seed, padding=one(0, 3), views=one(False, True),
        shared_head=form in ("heads", "cached") and one(False, True), bias=one(False, True),
        near=None if V < 7 or not exact else one(None, None, 1e-2),
        largest_logit=4.0 if narrow else one(4.0, 12.0),
        # A negative factor of -inf would be no distribution
        masked_entry=None if min(scales) < 0 or narrow else one(None, "both"),
    )  # fmt: skip
    case, options = _valid(draw, case, leading, takes_labels)
    if form in WITH_LOSS:
        options |= _loss_options(draw, exact, leading, case, "labels" in options)
    elif form == "cached":
        options |= {"reduction": one("mean", "sum", "none"), "token_weights": one(None, case.token_weights)}
    options |= _sides(draw, form, case, gen, scales, exact)
    more, told, known = _beside_the_student(draw, form, case, V, gen, options)
    options |= told
    if form in ("heads", "several", "listed", "log-probs") and one(False, False, True):
        options |= _adapters(draw, form, case, gen)
    if one(False, True):  # per-token arguments that are columns of a larger tensor
        strided = {"labels", "mask", "token_weights", "teacher_index", "temperature", "teacher_temperature"}
        options |= {name: _column(x) for name, x in options.items() if name in strided}
        more = [_column(x) for x in more]
    trainable = one(*TRAINABLE)
    if form == "cached":
        trainable = trainable[:0] if not trainable else ("student_hidden",)
    elif form in (*WITH_LOSS, "log-probs"):
        options["backward"] = one("auto", "auto", "in_forward", "recompute")
    per_row = 8 * (2 * (V + 5) + 64) + 96 * (V + 9)
    options |= {"workspace_bytes": one(2, 6, 400) * per_row, "backend": backend}
    return Call(form, dtype, [case.student_hidden, case.student_weight, *more], options, trainable, known)


def refusals(call: Call) -> set[str]:
    """Return the arguments that a call without a flaw is refused for."""
    options = call.options
    late = options.get("reduction") == "none" or call.form == "log-probs"
    own = {"student_weight", *(("student_bias",) if options.get(f"{call.prefix}bias") is not None else ())}
    own |= {"A", "B"} if options.get(f"{call.prefix}lora") is not None else set()
    trains = bool(own & set(call.trainable)) or (call.form == "log-probs" and options["return_entropy"])
    trains = trains or (call.form == "log-probs" and "student_hidden" not in call.trainable)
    return {"backward"} if options.get("backward") == "in_forward" and late and trains else set()
