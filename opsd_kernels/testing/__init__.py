"""Hard inputs, numeric gates with all tolerances, and the memory of one call, for users' tests too.

case = hard_case(67, 1003, 48, torch.float32) truth, peer = evaluate(linear_divergence_reference,
case.double()), evaluate(linear_divergence_reference, case) assert_no_worse(evaluate(linear_divergence, case),
peer, truth)
"""

from .cases import LEAVES, Case, Outcome, evaluate, hard_case, plain_outcomes
from .gates import (
    FP32_ARITHMETIC,
    TARGETS,
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
    "TARGETS",
    "Case",
    "Outcome",
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
