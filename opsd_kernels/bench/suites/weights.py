"""What each dialect of the token loss costs over the same call with a plain tensor of weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import weights as schemes
from ..._core.planner import plan
from ...divergence import linear_divergence
from ...objectives import OnPolicyDistillation, PolicyGradient, PPOClip, linear_policy_divergence
from ...testing import TARGETS, Case, relative_error
from ...testing.reference import linear_divergence_reference
from ..gate import TOKENS
from ..measure import Context, Task, blank, describe, free, part_row
from ..results import Row
from ..shapes import SHAPES, Setting, make_case
from ..timing import Variant, interleave, reason_of

B = 4  # sequences
STATED_AT = SHAPES[
    "cpu"
]  # the size that the limits are meant for: at smaller ones what a call costs whatever its size weighs more
LIMITS = {"row weights": 1.05, "aligned sequence weights": 1.10, "GRPO mix": 1.05, "top-k": 1.60}
BASE = "tensor weights"


@dataclass(frozen=True)
class Dialect:
    """`kind` names the limit it stands under, if any."""

    kind: str | None
    op: Callable[..., Tensor]
    options: dict[str, object]


def own_pass_budget(setting: Setting) -> int | None:
    """The largest budget, by doubling, under which no chunk holds a sequence; None where every budget does."""

    def own_pass(budget: int) -> bool:
        try:
            chosen = plan(
                setting.N, setting.V, setting.H, dtype=setting.torch_dtype, workspace_bytes=budget, device_type=setting.device,
                weights_scope="sequence", longest_sequence=setting.N // B,
            )  # fmt: skip
        except ValueError:  # does not hold a row
            return False
        return chosen.weighting == "own pass"

    return max((budget for budget in (1 << bits for bits in range(20, 40)) if own_pass(budget)), default=None)


def dialects(setting: Setting) -> dict[str, Dialect]:
    T, gen = setting.N // B, torch.Generator().manual_seed(1)

    def on(tensor: Tensor) -> Tensor:
        return tensor.to(setting.device)

    labels = on(torch.randint(setting.V, (B, T), generator=gen))
    old, advantages = on(-6 * torch.rand(B, T, generator=gen)), on(torch.randn(B, 1, generator=gen))
    base = {"divergence": setting.divergence, "labels": labels}
    plain = {**base, "token_weights": on(0.5 + torch.rand(B, T, generator=gen))}
    # The gate stands above every entropy: among them it jumps, and a row that rounding takes across it would count as a wrong gradient.
    importance, entropy = (
        schemes.ImportanceRatio(old),
        schemes.EntropyGate("teacher", below=math.log(2 * setting.V)),
    )
    prefix = {**base, "token_weights": schemes.PrefixDiscrepancy()}

    def mix(policy: object) -> dict[str, object]:
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
        "entry_clip": Dialect(None, linear_divergence, {**plain, "entry_clip": 0.05}),
        "token_clip": Dialect(None, linear_divergence, {**plain, "token_clip": 5.0}),
        "teacher_mix": Dialect(None, linear_divergence, {**plain, "teacher_mix": 0.3}),
        "statistics": Dialect(
            None, lambda *heads, **options: linear_divergence(*heads, **options, return_stats=True)[0], plain
        ),
    }
    return (
        made
        if made["PrefixDiscrepancy, own pass"].options["workspace_bytes"]
        else {k: d for k, d in made.items() if "own pass" not in k}
    )


def stepper(case: Case, op: Callable[..., Tensor], options: dict[str, object]) -> Callable[[], Tensor]:
    live = case.leaves()
    T = live.student_hidden.shape[0] // B

    def step() -> Tensor:
        live.student_hidden.grad = live.student_weight.grad = None
        h, t = (x.unflatten(0, (B, T)) for x in (live.student_hidden, live.teacher_hidden))
        loss = op(h, live.student_weight, t, live.teacher_weight, **options)
        loss.backward()
        return live.student_hidden.grad

    return step


def by_definition(options: dict[str, object]) -> Callable[..., Tensor]:
    """The dialect in plain torch; float64 in, float64 out."""
    policy, share = options.get("policy"), options.get("policy_weight", 0.0)
    rest = {
        name: value
        for name, value in options.items()
        if name not in ("policy", "policy_weight", "workspace_bytes")
    }

    def op(*heads: Tensor) -> Tensor:
        loss, stats = linear_divergence_reference(*heads, **rest, return_stats=True)
        if policy is None:
            return loss
        logprob = (heads[0] @ heads[1].T).log_softmax(-1).gather(-1, options["labels"][..., None])[..., 0]
        seen = type("Stats", (), {name: value.detach() for name, value in stats.items()})
        return (1 - share) * loss + share * policy(
            logprob, seen, torch.ones_like(logprob, dtype=torch.bool)
        ).mean()

    return op


def failures(setting: Setting) -> dict[str, str]:
    """Dialects whose gradient is wrong, of 64 tokens: bf16 within the default target of docs/numerics.md, fp32 within that of fp32 logits.

    A support is chosen by logits that bf16 has rounded: where the k-th and the next are that close, either is right, so top-k is judged in fp32 alone.
    """
    small = setting.at(N=TOKENS)
    case, bound = make_case(small), TARGETS["default" if setting.dtype == "bfloat16" else "fp32_logits"]
    found = {}
    for name, dialect in dialects(small).items():
        if "topk" in dialect.options and setting.torch_dtype.itemsize == 2:
            continue
        try:
            error = gradient_error(case, dialect)
        except Exception as problem:
            found[name] = reason_of(problem)
            continue
        if not error <= bound:
            found[name] = f"wrong, so no number: gradient error {error:.2e}, bound {bound:.0e}"
    return found


def gradient_error(case: Case, dialect: Dialect) -> float:
    """Against the definition in float64. The budget of a large call does not hold for a small one."""
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in dialect.options.items()
    }
    truth = stepper(case.double(), by_definition(wide), {})()
    options = {key: value for key, value in dialect.options.items() if key != "workspace_bytes"}
    return relative_error(stepper(case, dialect.op, options)(), truth)


def compare_dialects(setting: Setting, effort: dict[str, object]) -> list[Row]:
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
        row = blank("weights", "opsd", setting, variant=name, target=limits.get(dialect.kind))
        rows.append(
            replace(row, reason=wrong[name], target=None)
            if name in wrong
            else part_row(row, variants, name, BASE)
        )
    del variants, case
    free()
    return rows


def weights(context: Context) -> list[Task]:
    wanted = [("bfloat16", "reverse_kl")] + (
        [] if context.quick else [("bfloat16", "jsd"), ("float32", "reverse_kl")]
    )
    settings = [
        context.setting(shape, dtype, divergence=divergence)
        for shape in context.centre()
        for dtype, divergence in wanted
    ]
    settings = [s for s in settings if not context.dtypes or s.dtype in context.dtypes]
    return [
        Task(describe(s), lambda s=s: compare_dialects(s, context.effort(3 if context.quick else 5)))
        for s in settings
    ]
