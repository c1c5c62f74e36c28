"""The testing module: gates that fail, the promises of the hard case, peak memory, the reference by hand."""

import inspect
import math

import pytest
import torch

import opsd_kernels
from opsd_kernels.testing import (
    Outcome,
    assert_no_growth,
    assert_no_worse,
    assert_on_target,
    assert_one_rounding,
    assert_same_bits,
    evaluate,
    hard_case,
    peak_bytes,
)
from opsd_kernels.testing.gates import FP64_ARITHMETIC
from opsd_kernels.testing.reference import (
    LACKING,
    linear_divergence_reference,
    linear_logprobs_reference,
    linear_topk_divergence_reference,
)
from opsd_kernels.testing.reference_lists import linear_logprobs_at_reference, linear_topk_reference
from opsd_kernels.testing.reference_rows import linear_divergence_to_reference

# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_takes_the_nearest_number_and_refuses_the_one_after_the_next(dtype):
    truth = torch.linspace(-3, 3, 41, dtype=torch.float64) * 100
    nearest = truth.to(dtype)
    assert_one_rounding(nearest, truth, dtype)
    off = nearest.clone()
    off[7] = truth[7] * (1 + 1.1 * torch.finfo(dtype).eps) + 3e-6 * truth[7]
    with pytest.raises(AssertionError, match=r"output: 1 of 41 .* worst at \(7,\): got .*, truth .*, bound"):
        assert_one_rounding(off, truth, dtype)


def test_one_rounding_of_the_interpreter_allows_truncation_of_bf16_alone():
    truth = torch.tensor([1 + 2**-7 - 2**-12], dtype=torch.float64)
    truncated = torch.tensor([1.0], dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_one_rounding(truncated, truth, torch.bfloat16)
    assert_one_rounding(truncated, truth, torch.bfloat16, interpreter=True)
    with pytest.raises(AssertionError):
        assert_one_rounding(torch.tensor([1.0]), truth, torch.float32, interpreter=True)


@pytest.mark.parametrize(
    "actual, truth",
    [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (math.inf, -math.inf), (3e38, math.inf)],
)
def test_gates_do_not_forgive_what_is_not_finite(actual, truth):
    actual, truth = torch.tensor([0.0, actual]), torch.tensor([0.0, truth])
    for gate in (
        lambda: assert_one_rounding(actual, truth, torch.float32),
        lambda: assert_no_worse(actual, truth, truth),
        lambda: assert_on_target(actual, truth, "default"),
    ):
        with pytest.raises(AssertionError, match=r"differ in being finite; at \(1,\)"):
            gate()


def test_equal_infinities_and_nans_pass():
    same = torch.tensor([math.inf, -math.inf, math.nan, 2.0])
    assert_one_rounding(same, same.double(), torch.float32)
    assert_same_bits(same, same.clone())


def test_magnitude_is_what_the_absolute_part_scales_with():
    truth = torch.zeros(2, 3)
    assert_one_rounding(truth + 1.5e-6, truth, torch.float32)
    with pytest.raises(AssertionError, match=r"worst at \(1, 0\)"):
        assert_one_rounding(truth + 1.5e-6, truth, torch.float32, magnitude=torch.tensor([[1.0], [0.5]]))


def test_no_worse_compares_with_plain_pytorch():
    truth = torch.linspace(1, 2, 10, dtype=torch.float64)
    assert_no_worse(truth + 1.9e-3, truth + 1e-3, truth)
    with pytest.raises(AssertionError, match="error 2.1.*bound 2.0"):
        assert_no_worse(truth + 2.1e-3, truth + 1e-3, truth)


def test_same_bits_tells_zero_from_minus_zero():
    with pytest.raises(AssertionError, match=r"1 of 2 .* first at \(1,\)"):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    with pytest.raises(AssertionError, match="float32"):
        assert_same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_no_growth_compares_relative_errors():
    truth = torch.ones(4, dtype=torch.float64)
    assert_no_growth(truth * 1.0014, truth * 1.001, truth)
    with pytest.raises(AssertionError, match="many chunks"):
        assert_no_growth(truth * 1.0016, truth * 1.001, truth)


def test_outcomes_are_compared_by_name():
    one, two = Outcome(torch.tensor(1.0), torch.ones(2)), Outcome(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="gradient of student_hidden"):
        assert_same_bits(one, two)
    with pytest.raises(AssertionError, match="gradient of student_hidden: 1 of 2"):
        assert_same_bits(one, Outcome(torch.tensor(1.0), torch.tensor([1.0, 2.0])))


# ---------------------------------------------------------------- hard case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_hard_case_is_hard(dtype):
    case = hard_case(67, 1003, 48, dtype, padding=5)
    valid = (case.mask != 0) & (case.labels != -100)
    assert (
        (~valid).sum() == 2
        and case.student_hidden[~valid].isinf().all()
        and case.teacher_hidden[~valid].isnan().all()
    )
    logits = case.student_hidden[valid].double() @ case.student_weight[:1003].double().T
    assert 38 < logits.abs().max() < 42
    assert (logits.softmax(-1).amax(-1) > 0.99).any() and (logits.softmax(-1).amax(-1) < 0.1).any(), (
        "peaked and flat rows"
    )
    padded = case.student_hidden[valid].double() @ case.student_weight[1003:].double().T
    assert (padded.amax(-1) > logits.amax(-1)).float().mean() > 0.8, "padded columns would win"
    assert case.student_bias.isinf().sum() == case.teacher_bias.isinf().sum() == 1
    assert (
        (case.token_weights == 0).sum() == 1
        and not case.student_hidden.is_contiguous()
        and case.student_weight.storage_offset() > 0
    )
    assert case.upstream == 3.0


@pytest.mark.parametrize("kl", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(
    "made", [{"shared_head": True}, {}, {"teacher_width": 61}, {"shared_head": True, "padding": 3}], ids=str
)
def test_a_near_teacher_is_as_near_as_asked(kl, made):
    case = hard_case(29, 211, 24, near=kl, **made)
    stats = evaluate(
        linear_divergence_reference, case.double(), divergence="forward_kl", return_stats=True
    ).stats["divergence"]
    stats = stats[stats != 0]
    assert ((stats / kl - 1).abs() < 0.02).all(), stats / kl


def test_a_shared_head_stays_shared():
    case = hard_case(5, 7, 3, shared_head=True)
    for changed in (case, case.double(), case.to("cpu"), case.leaves()):
        assert changed.student_weight.data_ptr() == changed.teacher_weight.data_ptr()
    assert hard_case(5, 7, 3).student_weight.data_ptr() != hard_case(5, 7, 3).teacher_weight.data_ptr()


# ---------------------------------------------------------------- memory

HOLDS = """
def make(before, peak, after):
    import torch
    held = torch.ones(before, dtype=torch.uint8)

    def call():
        temporary = torch.ones(peak - after, dtype=torch.uint8)
        kept = torch.ones(after, dtype=torch.uint8)
        return held[0] + temporary[0], kept

    return call
"""


@pytest.fixture(params=["fresh", "forked"])
def process(request):
    """A process as users measure in, and one as test_memory.py does."""
    if request.param == "forked":
        request.getfixturevalue("forked_peaks")


def test_peak_bytes_counts_what_comes_on_top(process):
    mib = 1 << 20
    peak = peak_bytes(HOLDS, 50 * mib, 120 * mib, 40 * mib)
    assert 119 * mib < peak < 124 * mib, peak / mib


def test_peak_bytes_reports_a_failing_call(process):
    with pytest.raises(RuntimeError, match="(?s)status 1.*so far.*no such luck"):
        peak_bytes("def make():\n    print('so far')\n    raise OSError('no such luck')")


def test_peak_bytes_reports_a_process_that_is_killed(process):
    with pytest.raises(RuntimeError, match="status -9"):
        peak_bytes("def make():\n    import os\n    os.kill(os.getpid(), 9)")


# ---------------------------------------------------------------- reference


def two_tokens(divergence, beta=0.5):
    """The values at q = (1/4, 3/4) and p = (1/2, 1/2), through an identity head."""
    eye = torch.eye(2, dtype=torch.float64)
    student, teacher = torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    return linear_divergence_reference(student, eye, teacher, eye, divergence=divergence, beta=beta).item()


def test_textbook_values():
    q, p, log = (0.25, 0.75), (0.5, 0.5), math.log

    def kl(a, b):
        return sum(x * log(x / y) for x, y in zip(a, b, strict=True))

    m = tuple(0.3 * y + 0.7 * x for x, y in zip(q, p, strict=True))  # beta = 0.3 on the teacher
    expected = {
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        "skew_reverse_kl": kl(q, m),
        "skew_forward_kl": kl(p, m),
        "tvd": 0.25,
        "mixed_kl": 0.3 * kl(p, q) + 0.7 * kl(q, p),
    }
    for name, value in expected.items():
        assert abs(two_tokens(name, 0.3) - value) <= FP64_ARITHMETIC, name


def test_the_logit_transform_has_its_order():
    """softcap(scale * (z + bias)) / T with z = 1, bias = 1, scale = 2, cap = 3, T = 4 on the first entry."""
    one, head = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    options = {
        "temperature": 4.0,
        "student_logit_scale": 2.0,
        "student_softcap": 3.0,
        "student_bias": torch.tensor([1.0, 0.0], dtype=torch.float64),
    }
    logit = 3 * math.tanh(4 / 3) / 4
    q = 1 / (1 + math.exp(-logit))
    loss = linear_divergence_reference(one, head, 0 * one, head, divergence="tvd", **options)
    assert abs(loss.item() - (q - 0.5)) <= FP64_ARITHMETIC


ROWS, COLUMNS = torch.randn(3, 2), torch.randn(5, 2)
IDS = torch.zeros(3, dtype=torch.int64)
# ops, their references, and the arguments without a default
REFERENCES = {
    "linear_divergence": (linear_divergence_reference, (ROWS, COLUMNS, ROWS, COLUMNS)),
    "linear_divergence_to": (linear_divergence_to_reference, (ROWS, COLUMNS, torch.randn(3, 5))),
    "linear_topk_divergence": (
        linear_topk_divergence_reference,
        (ROWS, COLUMNS, IDS[:, None], -torch.ones(3, 1)),
    ),
    "linear_logprobs": (linear_logprobs_reference, (ROWS, COLUMNS, IDS)),
    "linear_topk": (linear_topk_reference, (ROWS, COLUMNS, 2)),
    "linear_logprobs_at": (linear_logprobs_at_reference, (ROWS, COLUMNS, IDS[:, None])),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_has_the_arguments_of_its_op(name):
    """It takes the op's names and defaults, changes nothing by HOW, and says what it lacks."""
    op, (reference, inputs) = getattr(opsd_kernels, name), REFERENCES[name]
    parameters, own = (inspect.signature(function).parameters for function in (op, reference))
    assert list(own)[: len(inputs)] == list(parameters)[: len(inputs)]
    every = {key: x.default for key, x in parameters.items() if x.default is not x.empty}
    for key in every.keys() & own.keys():
        assert own[key].default == every[key], key
    given = {"gradient_tolerance": 0.1, "backward": "recompute", "workspace_bytes": 1000}
    for told in (every, every | {key: value for key, value in given.items() if key in every}):
        loss, expected = reference(*inputs, **told), reference(*inputs)
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (loss, expected)), strict=True):
            assert_same_bits(one, other)
    for key in LACKING.keys() & parameters.keys():
        with pytest.raises(ValueError, match=f"^{key}: expected None, since the reference lacks it: .*, got"):
            reference(*inputs, **{key: object()})
    for key in (LACKING.keys() - parameters.keys()) | {"chunk"}:
        with pytest.raises((TypeError, ValueError), match=f"^{key}: expected"):
            reference(*inputs, **{key: object()})


def test_the_reference_refuses_unknown_names():
    with pytest.raises(TypeError, match="chunk"):
        linear_divergence_reference(
            torch.ones(1, 1), torch.ones(2, 1), torch.ones(1, 1), torch.ones(2, 1), chunk=3
        )
