"""Hard inputs, numeric gates with all tolerances, and the memory of one call, for users' tests too.

case = hard_case(67, 1003, 48, torch.float32)
truth = evaluate(linear_divergence_reference, case.double())
peer = evaluate(linear_divergence_reference, case)
assert_no_worse(evaluate(linear_divergence, case), peer, truth)
assert_invariant(linear_divergence, case)
"""

from .cases import LEAVES, Case, Outcome, evaluate, hard_case, plain_outcomes
from .gates import (
    FP32_ARITHMETIC,
    LOGPROB_NATS,
    LOGSUMEXP_NATS,
    TARGETS,
    assert_invariant,
    assert_no_growth,
    assert_no_worse,
    assert_on_target,
    assert_one_rounding,
    assert_same_bits,
    relative_error,
)
from .memory import peak_bytes

__all__ = [
    "FP32_ARITHMETIC",
    "LEAVES",
    "LOGPROB_NATS",
    "LOGSUMEXP_NATS",
    "TARGETS",
    "Case",
    "Outcome",
    "assert_invariant",
    "assert_no_growth",
    "assert_no_worse",
    "assert_on_target",
    "assert_one_rounding",
    "assert_same_bits",
    "evaluate",
    "hard_case",
    "peak_bytes",
    "plain_outcomes",
    "relative_error",
]
