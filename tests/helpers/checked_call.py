"""One call of an op with its arguments, run on the op or on its dense reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import (
    cache_forward_kl,
    linear_cached_forward_kl,
    linear_divergence,
    linear_divergence_to,
    linear_logprobs,
    linear_logprobs_at,
    linear_topk,
    linear_topk_divergence,
)
from opsd_kernels.testing.heads import with_dense_heads
from opsd_kernels.testing.reference import (
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference, linear_topk_reference
from opsd_kernels.testing.reference_rows import (
    linear_divergence_by_index_reference,
    linear_divergence_to_reference,
)

OF_EXECUTION = ("workspace_bytes", "backward", "backend", "logits_dtype", "gradient_tolerance")


def through_cache(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, **options: Any) -> Any:
    """Make a cache of the teacher, and return the loss of the student on it."""
    of_teacher = {name: options.pop(name) for name in list(options) if name.startswith("teacher_")}
    shared = ("student_bias", "mask", "vocab_size", "workspace_bytes", "backend", "temperature")
    made = {name: options[name] for name in shared if name in options}
    cache = cache_forward_kl(t, Wt, W, **of_teacher, **made)
    return linear_cached_forward_kl(h, W, cache, **options)


def forward_kl(*sides: Tensor, **options: Any) -> Any:
    return linear_divergence_reference(*sides, divergence="forward_kl", **options)


FORMS: dict[str, tuple[Callable, Callable]] = {
    "heads": (linear_divergence, with_dense_heads(linear_divergence_reference)),
    "several": (linear_divergence, with_dense_heads(linear_divergence_by_index_reference)),
    "target": (linear_divergence_to, linear_divergence_to_reference),
    "listed": (linear_topk_divergence, with_dense_heads(linear_topk_divergence_reference)),
    "log-probs": (linear_logprobs, with_dense_heads(linear_logprobs_reference)),
    "at ids": (linear_logprobs_at, linear_logprobs_at_reference),
    "list": (linear_topk, linear_topk_reference),
    "cached": (through_cache, forward_kl),
}
WITH_LOSS = ("heads", "several", "target", "listed")
ONE_HEAD = ("log-probs", "at ids", "list")


@dataclass(frozen=True, repr=False)
class Call:
    """One call: its arguments, and what the reference gets in place of some of them."""

    form: str
    dtype: torch.dtype
    arguments: list[Any]
    options: dict[str, Any]
    trainable: tuple[str, ...]
    known: dict[int, Any] = field(default_factory=dict)  # the reference's arguments by position

    def __repr__(self) -> str:
        """Show tensors by their shapes."""

        def shown(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return [shown(each) for each in x]
            return f"{str(x.dtype)[6:]}{tuple(x.shape)}" if isinstance(x, Tensor) and x.numel() != 1 else x

        options = {name: shown(x) for name, x in self.options.items() if x is not None}
        return f"{self.form}({shown(self.arguments)}, {options}, trainable={self.trainable})"

    @property
    def prefix(self) -> str:
        return "" if self.form in ONE_HEAD else "student_"

    def run(self, reference: bool = False, wide: bool = False, **how: Any) -> dict[str, Any]:
        """Return results, statistics and gradients by name, of the op or of the reference."""
        done: dict[int, Tensor] = {}  # by identity: a shared head stays shared

        def cast(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(cast, x))
            if not isinstance(x, Tensor) or not x.is_floating_point() or not wide:
                return x
            return done.setdefault(id(x), x.double())

        arguments = [self.known.get(i, x) if reference else x for i, x in enumerate(self.arguments)]
        arguments, options = cast(arguments), {name: cast(x) for name, x in self.options.items()}
        leaves = self._leaves(arguments, options)
        if reference:
            options = {name: x for name, x in options.items() if name not in OF_EXECUTION}
        result = FORMS[self.form][reference](*arguments, **options, **how)
        return self._named(result, leaves)

    def flipped(self) -> tuple[Call, Callable[[dict[str, Any]], dict[str, Any]]]:
        """Return the call with vocabulary and hidden units in reverse, and a function that restores results.

        In fp32 its sums round in another way.
        """
        V = self.options.get("vocab_size") or self.arguments[1].shape[0]
        done: dict[tuple[int, bool, bool], Tensor] = {}

        def turn(x: Any, rows: bool = False, units: bool = False) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(turn(each, rows, units) for each in x)
            if not isinstance(x, Tensor):
                return x
            turned = torch.cat([x[:V].flip(0), x[V:]]) if rows else x
            return done.setdefault((id(x), rows, units), turned.flip(-1) if units else turned)

        def ids(x: Tensor) -> Tensor:
            return torch.where(x >= 0, V - 1 - x, x)

        def lora(x: Any) -> Any:
            return x and (turn(x[0], units=True), turn(x[1], rows=True), x[2])

        arguments = [turn(self.arguments[0], units=True), turn(self.arguments[1], True, True)]
        rest = [self.known.get(i + 2, x) for i, x in enumerate(self.arguments[2:])]
        if self.form in ("heads", "several", "cached"):
            arguments += [turn(rest[0], units=True), turn(rest[1], True, True)]
        elif self.form == "target":
            arguments.append(torch.cat([rest[0][..., :V].flip(-1), rest[0][..., V:]], -1))
        else:
            arguments += [ids(x) if isinstance(x, Tensor) and x.dtype == torch.int64 else x for x in rest]
        options = dict(self.options)
        for name, x in options.items():
            if name.endswith("bias"):
                options[name] = turn(x, rows=True)
            elif name.endswith("lora"):
                options[name] = lora(x)
            elif name == "labels":
                options[name] = ids(x)

        def restore(found: dict[str, Any]) -> dict[str, Any]:
            of = {
                "student_hidden": (False, True),
                "student_weight": (True, True),
                "student_bias": (True, False),
            }
            of |= {"A": (False, True), "B": (True, False)}
            grads = {f"gradient of {name}": how for name, how in of.items()}
            return {name: turn(x, *grads[name]) if name in grads else x for name, x in found.items()}

        return replace(self, arguments=arguments, options=options, known={}), restore

    def _leaves(self, arguments: list[Any], options: dict[str, Any]) -> dict[str, Tensor]:
        """Put trainable leaves in place of the tensors of that name."""
        bias, lora = f"{self.prefix}bias", f"{self.prefix}lora"
        leaves = {}
        for name in self.trainable:
            at = {"student_hidden": 0, "student_weight": 1}.get(name)
            if at is not None:
                leaf = arguments[at].detach().requires_grad_()
                for i, x in enumerate(arguments):
                    if x is arguments[at] and i != at:  # the teacher's head is the student's
                        arguments[i] = leaf
                    elif isinstance(x, list) and x and x[0] is arguments[at]:
                        arguments[i] = [leaf for _ in x]
                arguments[at] = leaf
            elif name == "student_bias" and options.get(bias) is not None:
                leaf = options[bias].detach().requires_grad_()
                if options.get("teacher_bias") is options[bias]:
                    options["teacher_bias"] = leaf
                options[bias] = leaf
            elif name in ("A", "B") and options.get(lora) is not None:
                both = options.get("teacher_lora") is options[lora]
                given = list(options[lora])
                leaf = given["AB".index(name)].detach().requires_grad_()
                given["AB".index(name)] = leaf
                options[lora] = tuple(given)
                if both:
                    options["teacher_lora"] = options[lora]
            else:
                continue
            leaves[name] = leaf
        return leaves

    def _named(self, result: Any, leaves: dict[str, Tensor]) -> dict[str, Any]:
        results = list(result) if isinstance(result, tuple) else [result]
        stats = {}
        if self.form in WITH_LOSS and len(results) == 2:
            stats = results.pop()
            stats = (
                stats if isinstance(stats, dict) else {k: v for k, v in vars(stats).items() if v is not None}
            )
        found = {f"result {i}": x.detach() for i, x in enumerate(results)}
        if leaves and self.form != "list":
            upstream = [
                (3 * torch.linspace(0.25, 1.0, max(x.numel(), 1), dtype=torch.float64)[: x.numel()])
                .view(x.shape)
                .to(x.dtype)
                for x in results
            ]
            grads = torch.autograd.grad(results, list(leaves.values()), upstream)
            found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {**found, **{f"statistic {name}": x for name, x in stats.items()}}
