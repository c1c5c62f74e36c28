"""Parse the setting `token_weights`: schemes of opsd_kernels.weights, numbers and products of them.

An example is `MeanOne(PrefixDiscrepancy(0.5)) * FirstFraction(0.3)`. `ImportanceRatio(clip)` takes the
rollout policy's log-probs and `SegmentMean(inner)` the boundaries of segments from the batch. The text is
parsed and never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_kernels import weights
from opsd_kernels.train.config.values import ConfigError, nearest

PLAIN = (
    "Constant",
    "EntropyGate",
    "ExponentialDecay",
    "FirstFraction",
    "LastFraction",
    "LinearDecay",
    "MeanOne",
    "PrefixDiscrepancy",
    "Sigmoid",
    "TrustGate",
)
FROM_THE_BATCH = ("ImportanceRatio", "SegmentMean")
# Bounds the depth of the syntax tree.
MAX_LENGTH = 500


class TokenData(NamedTuple):
    """The data of a batch that a scheme may need besides the statistics.

    Without `old_logprobs_BT` the student is the policy that sampled.
    """

    old_logprobs_BT: Tensor | None
    boundaries_BT: Tensor | None


Builder = Callable[[TokenData], Any]
EXAMPLE = TokenData(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))


def parse_weights(text: str) -> Builder:
    """Return a function from a batch's data to token weights.

    Raises ConfigError for an invalid expression.
    """
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"at most {MAX_LENGTH} signs")
        builder = _node(ast.parse(text, mode="eval").body)
        weighting = builder(EXAMPLE)
    except SyntaxError:
        raise ConfigError(f"token_weights: expected a product of weightings, got {text!r}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"token_weights: {error}, in {text!r}") from error
    return builder if not isinstance(weighting, float) else lambda data: weights.Constant(weighting)


def _node(node: ast.expr) -> Builder:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _node(node.left), _node(node.right)
        return lambda data: left(data) * right(data)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node.func.id, node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _node(node.operand)
        return lambda data: -inner(data)
    # Not isinstance() alone, since a bool is an int.
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, (int, float))
        and not isinstance(node.value, bool)
    ):
        number = float(node.value)
        return lambda data: number
    raise ValueError(f"expected a weighting, a number or a product, got {ast.unparse(node)!r}")


def _call(name: str, node: ast.Call) -> Builder:
    known = (*PLAIN, *FROM_THE_BATCH)
    if name not in known:
        raise ValueError(f"expected one of {', '.join(sorted(known))}, got {name!r}{nearest(name, known)}")
    arguments = [_argument(argument) for argument in node.args]
    keywords = {str(keyword.arg): _argument(keyword.value) for keyword in node.keywords}
    scheme = getattr(weights, name)

    def build(data: TokenData) -> Any:
        positional = [argument(data) for argument in arguments]
        named = {key: argument(data) for key, argument in keywords.items()}
        if name == "ImportanceRatio":
            if data.old_logprobs_BT is None:
                # Of the policy that sampled to itself.
                example = scheme(torch.zeros(1), *positional, **named)
                return weights.Constant(min(1.0, example.clip))
            return scheme(data.old_logprobs_BT, *positional, **named)
        if name == "SegmentMean":
            return scheme(*positional, data.boundaries_BT, **named)
        return scheme(*positional, **named)

    return build


def _argument(node: ast.expr) -> Builder:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
        return lambda data: text
    return _node(node)
