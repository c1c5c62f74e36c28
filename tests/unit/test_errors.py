"""Check that bad input raises an error with the argument's name, the expected and the actual value."""

import pytest
import torch

from opsd_kernels import VocabShard, linear_divergence, linear_logprobs, plan, weights
from opsd_kernels.testing import hard_case

N, V, H = 5, 11, 4


def call(*, drop=(), **changes):
    """Call linear_divergence on valid tensors, with some arguments replaced."""
    gen = torch.Generator().manual_seed(0)
    arguments = {
        "student_hidden": torch.randn(N, H, generator=gen),
        "student_weight": torch.randn(V, H, generator=gen),
        "teacher_hidden": torch.randn(N, H, generator=gen),
        "teacher_weight": torch.randn(V, H, generator=gen),
    }
    arguments.update(changes)
    tensors = [
        arguments.pop(name)
        for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    ]
    return linear_divergence(*tensors, **arguments)


def ids(cases):
    return [f"{next(iter(changes))}-{index}" for index, (changes, *_) in enumerate(cases)]


LABELS = torch.zeros(N, dtype=torch.int64)


# (changed arguments, type of the error, what its message contains)
class Weighting:
    """Stand for a user's own weighting."""

    def __init__(self, scope, weights=lambda mask: mask.float()):
        self.scope, self.weights = scope, weights

    def __call__(self, stats, mask):
        return self.weights(mask)


BAD = [
    ({"student_hidden": [1.0]}, TypeError, ["student_hidden", "tensor", "list"]),
    ({"teacher_weight": None}, TypeError, ["teacher_weight", "tensor", "NoneType"]),
    ({"student_hidden": torch.zeros(N, H + 1)}, ValueError, ["student_hidden", str(H), str((N, H + 1))]),
    ({"student_weight": torch.zeros(V, H, 1)}, ValueError, ["student_weight", "(V, H)", str((V, H, 1))]),
    ({"student_weight": torch.zeros(0, H)}, ValueError, ["student_weight", str((0, H))]),
    ({"student_hidden": torch.zeros(())}, ValueError, ["student_hidden", "()"]),
    ({"teacher_hidden": torch.zeros(N + 1, H)}, ValueError, ["teacher_hidden", str((N,)), str((N + 1,))]),
    ({"teacher_hidden": torch.zeros(N, H + 2)}, ValueError, ["teacher_hidden", str(H), str((N, H + 2))]),
    ({"student_bias": torch.zeros(V + 1)}, ValueError, ["student_bias", str((V,)), str((V + 1,))]),
    ({"teacher_bias": torch.zeros(V, 1)}, ValueError, ["teacher_bias", str((V,)), str((V, 1))]),
    ({"teacher_weight": torch.zeros(V + 1, H)}, ValueError, ["vocab_size", str(V), str(V + 1)]),
    ({"vocab_size": V + 1}, ValueError, ["vocab_size", str(V), str(V + 1)]),
    ({"vocab_size": 0}, ValueError, ["vocab_size", "0"]),
    ({"vocab_size": 3.5}, TypeError, ["vocab_size", "int", "float"]),
    (
        {"student_hidden": torch.zeros(N, H, dtype=torch.int64)},
        TypeError,
        ["student_hidden", "float32", "int64"],
    ),
    (
        {"student_weight": torch.zeros(V, H, dtype=torch.int8)},
        TypeError,
        ["student_weight", "float32", "QuantizedHead", "int8"],
    ),
    (
        {"teacher_weight": torch.zeros(V, H, dtype=torch.float8_e4m3fn)},
        TypeError,
        ["teacher_weight", "float32", "QuantizedHead", "float8_e4m3fn"],
    ),
    (
        {"teacher_hidden": torch.zeros(N, H, dtype=torch.int16)},
        TypeError,
        ["teacher_hidden", "float32", "int16"],
    ),
    ({"teacher_weight": torch.zeros(V, H, device="meta")}, ValueError, ["teacher_weight", "cpu", "meta"]),
    ({"mask": torch.ones(N, device="meta")}, ValueError, ["mask", "cpu", "meta"]),
    ({"student_bias": torch.zeros(V, dtype=torch.int32)}, TypeError, ["student_bias", "int32"]),
    ({"labels": LABELS[:2]}, ValueError, ["labels", str((N,)), str((2,))]),
    ({"labels": LABELS.int()}, TypeError, ["labels", "int64", "int32"]),
    ({"labels": [0] * N}, TypeError, ["labels", "tensor", "list"]),
    ({"labels": LABELS + V}, ValueError, ["labels", f"[0, {V})", str(V)]),
    ({"labels": LABELS - 1}, ValueError, ["labels", f"[0, {V})", "-1"]),
    ({"labels": LABELS + 9, "vocab_size": 9}, ValueError, ["labels", "[0, 9)", "9"]),
    ({"ignore_index": 0.5, "labels": LABELS}, TypeError, ["ignore_index", "int", "float"]),
    ({"mask": torch.ones(N, 1)}, ValueError, ["mask", str((N,)), str((N, 1))]),
    ({"token_weights": torch.ones(N + 2)}, ValueError, ["token_weights", str((N,)), str((N + 2,))]),
    ({"token_weights": torch.ones(N, dtype=torch.int64)}, TypeError, ["token_weights", "float", "int64"]),
    ({"token_weights": 0.5}, TypeError, ["token_weights", "tensor", "float"]),
    ({"divergence": "kl"}, ValueError, ["divergence", "'reverse_kl'", "'tvd'", "'kl'"]),
    ({"divergence": 3}, ValueError, ["divergence", "'forward_kl'", "3"]),
    ({"reduction": "batchmean"}, ValueError, ["reduction", "'mean'", "'sequence_mean'", "'batchmean'"]),
    ({"reduction": "sequence_mean"}, ValueError, ["sequence_mean", "(B, T, H)", str((N, H))]),
    ({"backward": "twice"}, ValueError, ["backward", "'recompute'", "'twice'"]),
    ({"logits_dtype": torch.float64}, ValueError, ["logits_dtype", "float32", "float64"]),
    ({"logits_dtype": "fp8"}, ValueError, ["logits_dtype", "'auto'", "'fp8'"]),
    ({"temperature": -1.0}, ValueError, ["temperature", "positive", "-1.0"]),
    ({"temperature": 0.0}, ValueError, ["temperature", "positive", "0.0"]),
    ({"temperature": "hot"}, TypeError, ["temperature", "number", "'hot'"]),
    ({"teacher_temperature": -2}, ValueError, ["teacher_temperature", "positive", "-2"]),
    ({"teacher_temperature": float("nan")}, ValueError, ["teacher_temperature", "positive", "nan"]),
    ({"student_softcap": 0.0}, ValueError, ["student_softcap", "positive", "0.0"]),
    ({"teacher_softcap": float("inf")}, ValueError, ["teacher_softcap", "finite", "inf"]),
    ({"student_logit_scale": float("inf")}, ValueError, ["student_logit_scale", "finite", "inf"]),
    ({"teacher_logit_scale": None}, TypeError, ["teacher_logit_scale", "number", "None"]),
    ({"divergence": "jsd", "beta": 0.0}, ValueError, ["beta", "between 0 and 1", "forward_kl", "0.0"]),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, ["beta", "between 0 and 1", "reverse_kl", "1.0"]),
    ({"divergence": "jsd", "beta": -0.1}, ValueError, ["beta", "between 0 and 1", "-0.1"]),
    ({"divergence": "skew_forward_kl", "beta": 1.0}, ValueError, ["beta", "skew_forward_kl", "1.0"]),
    ({"divergence": "mixed_kl", "beta": 1.5}, ValueError, ["beta", "[0, 1]", "mixed_kl", "1.5"]),
    ({"divergence": "mixed_kl", "beta": -0.5}, ValueError, ["beta", "[0, 1]", "mixed_kl", "-0.5"]),
    ({"divergence": "skew_reverse_kl", "beta": 1.5}, ValueError, ["beta", "skew_reverse_kl", "1.5"]),
    ({"normalizer": -3.0}, ValueError, ["normalizer", "positive", "-3.0"]),
    ({"normalizer": torch.ones(2)}, ValueError, ["normalizer", "0-dim", "(2,)"]),
    ({"normalizer": "all"}, TypeError, ["normalizer", "number", "'all'"]),
    ({"normalizer": 4.0, "reduction": "sum"}, ValueError, ["normalizer", "mean", "sum"]),
    ({"workspace_bytes": 10}, ValueError, ["workspace_bytes", "10"]),
    ({"workspace_bytes": 0}, ValueError, ["workspace_bytes", "positive", "0"]),
    ({"workspace_bytes": 1e9}, TypeError, ["workspace_bytes", "int", "float"]),
    ({"backend": "numpy"}, ValueError, ["backend", "'torch'", "'triton'", "'numpy'"]),
    ({"entry_clip": 0.0}, ValueError, ["entry_clip", "positive", "0.0"]),
    ({"token_clip": "1"}, TypeError, ["token_clip", "number", "'1'"]),
    ({"teacher_mix": 1.0}, ValueError, ["teacher_mix", "[0, 1)", "1.0"]),
    ({"teacher_mix": -0.1}, ValueError, ["teacher_mix", "[0, 1)", "-0.1"]),
    ({"topk": 0}, ValueError, ["topk", "at least 1", "0"]),
    ({"topk": 2.0}, TypeError, ["topk", "int", "float"]),
    ({"topk": 2, "topk_support": "both"}, ValueError, ["topk_support", "'teacher'", "'both'"]),
    ({"topk": 2, "topk_tail": "drop"}, ValueError, ["topk_tail", "'renormalize'", "'drop'"]),
    ({"token_weights": lambda stats, mask: mask}, TypeError, ["token_weights", "scope", "function"]),
    ({"token_weights": Weighting("token")}, ValueError, ["token_weights.scope", "'row'", "'token'"]),
    (
        {"token_weights": Weighting("row", lambda mask: mask)},
        TypeError,
        ["token_weights", "floating-point", "bool"],
    ),
    (
        {"token_weights": Weighting("index", lambda mask: torch.ones(3))},
        ValueError,
        ["token_weights", "(1, 5)", "(3,)"],
    ),
    ({"token_weights": weights.TrustGate(0.5)}, ValueError, ["labels", "TrustGate"]),
    (
        {
            "token_weights": weights.ImportanceRatio(torch.zeros(7)),
            "labels": torch.zeros(5, dtype=torch.int64),
        },
        ValueError,
        ["old_logprobs", "(1, 5)", "(7,)"],
    ),
    ({"backend": "cuda"}, ValueError, ["backend", "cuda"]),
]


@pytest.mark.parametrize("changes, error, parts", BAD, ids=ids(BAD))
def test_bad_arguments(changes, error, parts):
    with pytest.raises(error) as caught:
        call(**changes)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


def test_a_group_is_a_process_group_or_a_shard():
    with pytest.raises(
        TypeError, match="group: expected a torch.distributed process group, a VocabShard or None, got object"
    ):
        call(group=object())


ALONE = torch.distributed.ProcessGroup(0, 1)  # no collective is reached


@pytest.mark.parametrize("group", [ALONE, VocabShard((0, V), ALONE)], ids=["group", "shard"])
@pytest.mark.parametrize(
    "weight, error, got",
    [([1.0], TypeError, "list"), (None, TypeError, "NoneType"), (torch.tensor(1.0), ValueError, r"\(\)")],
)
def test_a_head_of_a_group_is_a_tensor(weight, error, got, group):
    with pytest.raises(error, match=f"^student_weight: expected .*, got {got}$"):
        call(student_weight=weight, group=group)
    several = {"teacher_hidden": [torch.ones(N, H)] * 2, "teacher_index": LABELS}
    with pytest.raises(error, match=f"^student_weight: expected .*, got {got}$"):
        call(student_weight=weight, group=group, **several)
    with pytest.raises(error, match=f"^weight: expected .*, got {got}$"):
        linear_logprobs(torch.ones(N, H), weight, LABELS, group=group)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: VocabShard((0, 3), None), TypeError, "group: expected a .* process group, got NoneType"),
        (lambda: VocabShard.from_vocab(3, "all"), TypeError, "group: expected a .* process group, got str"),
        (lambda: VocabShard.from_vocab("3", ALONE), TypeError, "V: expected an int, got str"),
        (lambda: VocabShard("ab", ALONE), TypeError, "bounds: expected ints, got 'ab'"),
        (lambda: VocabShard((0, 3.5), ALONE), TypeError, r"bounds: expected ints, got \(0, 3.5\)"),
        (lambda: VocabShard((1, 3), ALONE), ValueError, "bounds: expected ascending numbers from 0"),
        (lambda: VocabShard((), ALONE), ValueError, "bounds: expected 2 numbers for a group of 1 ranks"),
    ],
)
def test_bad_shards(make, error, match):
    with pytest.raises(error, match=f"^{match}"):
        make()


def test_in_forward_cannot_know_a_later_gradient():
    head = torch.randn(V, H, requires_grad=True)
    with pytest.raises(ValueError, match="backward.*recompute"):
        call(student_weight=head, reduction="none", backward="in_forward")


def test_an_absent_backend_says_why(monkeypatch):
    from opsd_kernels._rows import backends

    broken = tuple(
        backends.Backend(b.name, b.rows, lambda device, dtype: "no compiler was there")
        if b.name == "cpp"
        else b
        for b in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", broken)
    with pytest.raises(ValueError, match=r"backend.*'cpp'.*no compiler was there"):
        call(backend="cpp")
    assert backends.explain("cpu")["cpp"] == "no compiler was there"
    backends._warn_of_missing_kernels.cache_clear()
    with pytest.warns(backends.SlowBackendWarning, match="no compiler was there"):
        assert call().isfinite(), "without a name the next backend serves"


def test_ignored_labels_may_hold_anything_outside_the_vocabulary():
    labels = torch.tensor([0, -100, 3, V + 50, 1])
    mask = torch.tensor([1, 1, 1, 0, 1])
    assert call(labels=labels, mask=mask).isfinite()
    with pytest.raises(ValueError, match="labels"):
        call(labels=labels)


@pytest.mark.parametrize(
    "changes, error, parts",
    [
        ({"N": -1}, ValueError, ["N", "-1"]),
        ({"V": 0}, ValueError, ["V", "0"]),
        ({"H_student": 2.5}, ValueError, ["H_student", "2.5"]),
        ({"H_student": 0}, ValueError, ["H_student", "1", "0"]),
        ({"H_teacher": -1}, ValueError, ["H_teacher", "0", "-1"]),
        ({"N": True}, ValueError, ["N", "True"]),
        ({"dtype": torch.int8}, TypeError, ["dtype", "bfloat16", "int8"]),
        ({"backward": "none"}, ValueError, ["backward", "'none'"]),
        ({"logits_dtype": "fp8"}, ValueError, ["logits_dtype", "'fp8'"]),
        ({"workspace_bytes": 100}, ValueError, ["workspace_bytes", "100"]),
    ],
    ids=str,
)
def test_plan_refuses_what_no_call_could_be(changes, error, parts):
    arguments = {"N": 8, "V": 1000, "H_student": 16, **changes}
    with pytest.raises(error) as caught:
        plan(**arguments)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"masked_entry": "student"}, "masked_entry"),
        ({"shared_head": True, "teacher_width": 9}, "teacher_width"),
    ],
)
def test_hard_case_refuses_what_it_cannot_make(options, expected):
    with pytest.raises(ValueError, match=expected):
        hard_case(4, 7, 3, **options)
