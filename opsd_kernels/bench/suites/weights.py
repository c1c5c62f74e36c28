"""Cost of each dialect of the token loss over the same call with a plain tensor of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import weights as schemes
from ...divergence import linear_divergence
from ...objectives import OnPolicyDistillation, PolicyGradient, PPOClip, linear_policy_divergence
from ...spec import CLIPS
from ...testing import TARGETS, Case, relative_error
from ...testing.reference import linear_divergence_reference
from ..internals import plan
from ..measure.context import Context, Effort, Task, blank, describe, free
from ..measure.gate import TOKENS
from ..measure.rows import part_row
from ..measure.timing import Variant, interleave, reason_of
from ..report.results import Row
from ..shapes import SHAPES, Setting, make_case

B = 4  # sequences
# The size that the limits are stated at: at smaller sizes the constant cost of a call has a larger share.
STATED_AT = SHAPES["cpu"]
LIMITS = {"row weights": 1.05, "aligned sequence weights": 1.10, "GRPO mix": 1.05, "top-k": 1.60}
LIMITS |= {"mixed KL": 1.05}
BASE = "tensor weights"


@dataclass(frozen=True)
class Dialect:
    """One call to time: an op of the public API and its options. `kind` names its limit in LIMITS, if any."""

    kind: str | None
    op: Callable[..., Any]
    options: dict[str, Any]


def own_pass_budget(setting: Setting) -> int | None:
    """Return the largest power-of-two budget under which no chunk holds a sequence; None if there is none."""

    def own_pass(budget: int) -> bool:
        try:
            chosen = plan(
                setting.N,
                setting.V,
                setting.H,
                dtype=setting.torch_dtype,
                workspace_bytes=budget,
                device_type=setting.device,
                weights_scope="sequence",
                longest_sequence=setting.N // B,
            )
        except ValueError:  # the budget does not hold a row
            return False
        return chosen.weighting == "own pass"

    return max((budget for budget in (1 << bits for bits in range(20, 40)) if own_pass(budget)), default=None)


def dialects(setting: Setting) -> dict[str, Dialect]:
    """Return the calls to time, by name; the first is BASE."""
    T, gen = setting.N // B, torch.Generator().manual_seed(1)

    def on(tensor: Tensor) -> Tensor:
        return tensor.to(setting.device)

    labels = on(torch.randint(setting.V, (B, T), generator=gen))
    old, advantages = on(-6 * torch.rand(B, T, generator=gen)), on(torch.randn(B, 1, generator=gen))
    base: dict[str, Any] = {"divergence": setting.divergence, "labels": labels}
    plain = {**base, "token_weights": on(0.5 + torch.rand(B, T, generator=gen))}
    importance = schemes.ImportanceRatio(old)
    # The threshold is above every entropy. Among the entropies the weight jumps there, and a row that
    # rounding moves across it would count as a wrong gradient.
    entropy = schemes.EntropyGate("teacher", below=math.log(2 * setting.V))
    prefix = {**base, "token_weights": schemes.PrefixDiscrepancy()}

    def mix(policy: object) -> dict[str, Any]:
        return {**plain, "policy": policy, "policy_weight": 0.3}

    made = {
        BASE: Dialect(None, linear_divergence, plain),
        "ImportanceRatio": Dialect("row weights", linear_divergence, {**base, "token_weights": importance}),
        "EntropyGate": Dialect("row weights", linear_divergence, {**base, "token_weights": entropy}),
        "PrefixDiscrepancy": Dialect("aligned sequence weights", linear_divergence, prefix),
        "MeanOne(ImportanceRatio)": Dialect(
            "aligned sequence weights",
            linear_divergence,
            {**base, "token_weights": schemes.MeanOne(importance)},
        ),
        "PrefixDiscrepancy, own pass": Dialect(
            None, linear_divergence, {**prefix, "workspace_bytes": own_pass_budget(setting)}
        ),
        "GRPO on policy": Dialect("GRPO mix", linear_policy_divergence, mix(PPOClip(advantages))),
        "GRPO with old log-probs": Dialect(
            "GRPO mix", linear_policy_divergence, mix(PPOClip(advantages, old))
        ),
        "REINFORCE": Dialect("GRPO mix", linear_policy_divergence, mix(PolicyGradient(advantages))),
        "OPD mix": Dialect(None, linear_policy_divergence, mix(OnPolicyDistillation())),
        "top 20 of the student": Dialect("top-k", linear_divergence, {**plain, "topk": 20}),
        "top 100 of the student": Dialect("top-k", linear_divergence, {**plain, "topk": 100}),
        "top 100 of the teacher": Dialect(
            "top-k", linear_divergence, {**plain, "topk": 100, "topk_support": "teacher"}
        ),
        **{
            clip: Dialect(None, linear_divergence, {**plain, clip: bound})
            for clip, bound in zip(CLIPS, (0.05, 5.0), strict=True)
        },
        "teacher_mix": Dialect(None, linear_divergence, {**plain, "teacher_mix": 0.3}),
        "mixed_kl": Dialect("mixed KL", linear_divergence, {**plain, "divergence": "mixed_kl"}),
        "z_loss": Dialect(None, linear_divergence, {**plain, "z_loss": 1e-3}),
        "statistics": Dialect(None, linear_divergence, {**plain, "return_stats": True}),
    }
    if made["PrefixDiscrepancy, own pass"].options["workspace_bytes"] is None:
        del made["PrefixDiscrepancy, own pass"]
    return made


def stepper(case: Case, op: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Tensor]:
    """Return a step over B sequences: forward and backward; the step returns the hidden gradient."""
    live = case.leaves()
    T = live.student_hidden.shape[0] // B

    def step() -> Tensor:
        live.student_hidden.grad = live.student_weight.grad = None
        h, t = (x.unflatten(0, (B, T)) for x in (live.student_hidden, live.teacher_hidden))
        result = op(h, live.student_weight, t, live.teacher_weight, **options)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        gradient = live.student_hidden.grad
        assert gradient is not None
        return gradient

    return step


def by_definition(options: dict[str, Any]) -> Callable[..., Tensor]:
    """Return the dialect in plain torch; float64 inputs give a float64 loss."""
    policy, share = options.get("policy"), options.get("policy_weight", 0.0)
    ours_alone = ("policy", "policy_weight", "workspace_bytes", "return_stats")
    rest = {name: value for name, value in options.items() if name not in ours_alone}

    def op(*heads: Tensor) -> Tensor:
        loss, stats = linear_divergence_reference(*heads, **rest, return_stats=True)
        assert isinstance(stats, dict)
        if policy is None:
            return loss
        logprob = (heads[0] @ heads[1].T).log_softmax(-1).gather(-1, options["labels"][..., None])[..., 0]
        seen = SimpleNamespace(**{name: value.detach() for name, value in stats.items()})
        term = policy(logprob, seen, torch.ones_like(logprob, dtype=torch.bool))
        return (1 - share) * loss + share * term.mean()

    return op


def failures(setting: Setting) -> dict[str, str]:
    """Return the dialects with a wrong gradient at TOKENS tokens, each with the reason.

    The bound is that of fp32 logits, but for bf16 logits the default target.
    """
    small = setting.at(N=TOKENS)
    case, found = make_case(small), {}
    for name, dialect in dialects(small).items():
        checked = as_checked(dialect, setting)
        rounded = setting.dtype == "bfloat16" and checked is dialect
        bound = TARGETS["default" if rounded else "fp32_logits"]
        try:
            error = gradient_error(case, checked)
        except Exception as problem:
            found[name] = reason_of(problem)
            continue
        if not error <= bound:
            found[name] = f"wrong, so no number: gradient error {error:.2e}, bound {bound:.0e}"
    return found


def as_checked(dialect: Dialect, setting: Setting) -> Dialect:
    """Return the call to check: top-k with fp32 logits, of 16-bit inputs too.

    It selects entries by their logits. Those of 16 bits tie at the k-th entry, where either is right.
    """
    if "topk" not in dialect.options or setting.torch_dtype.itemsize > 2:
        return dialect
    return replace(dialect, op=partial(dialect.op, logits_dtype=torch.float32))


def gradient_error(case: Case, dialect: Dialect) -> float:
    """Return the relative error against float64, without the workspace budget of a large call."""
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in dialect.options.items()
    }
    truth = stepper(case.double(), by_definition(wide), {})()
    options = {key: value for key, value in dialect.options.items() if key != "workspace_bytes"}
    return relative_error(stepper(case, dialect.op, options)(), truth)


def compare_dialects(setting: Setting, effort: Effort) -> list[Row]:
    """Time all dialects that pass their check in turn."""
    wrong = failures(setting)
    made, case = dialects(setting), make_case(setting)
    variants = {
        name: Variant(stepper(case, d.op, d.options))
        for name, d in made.items()
        if name not in wrong or name == BASE
    }
    interleave(variants, BASE, setting.device, **effort)
    limits = LIMITS if (setting.N, setting.H, setting.V) == (STATED_AT.N, STATED_AT.H, STATED_AT.V) else {}
    rows = []
    for name, dialect in made.items():
        row = blank("weights", "opsd", setting, variant=name, target=limits.get(dialect.kind or ""))
        rows.append(
            replace(row, reason=wrong[name], target=None)
            if name in wrong
            else part_row(row, variants, name, BASE)
        )
    del variants, case
    free()
    return rows


def weights(context: Context) -> list[Task]:
    """Return a task for each dtype and divergence."""
    wanted = [("bfloat16", "reverse_kl")] + (
        [] if context.quick else [("bfloat16", "jsd"), ("float32", "reverse_kl")]
    )
    settings = [
        context.setting(shape, dtype, divergence=divergence)
        for shape in context.centre()
        for dtype, divergence in wanted
    ]
    settings = [s for s in settings if not context.dtypes or s.dtype in context.dtypes]
    times = 3 if context.quick else 5
    return [Task(describe(s), partial(compare_dialects, s, context.effort(times))) for s in settings]
