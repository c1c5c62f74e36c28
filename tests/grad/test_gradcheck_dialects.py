"""Run gradcheck in float64 on clips, supports, mixes, weights and the sibling functions."""

import pytest
import torch

from opsd_kernels import linear_divergence, linear_logprobs, linear_topk_divergence, objectives, weights
from opsd_kernels.spec import KIND_NAMES, TAILS

B, T, V, H = 2, 3, 11, 3
LABELS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
CLIPS = {
    "entry": {"entry_clip": 0.1},
    "token": {"token_clip": 0.6},
    "both": {"entry_clip": 0.2, "token_clip": 0.9},
}
# The first in `make test`.
SOME_TAILS = [TAILS[0], *(pytest.param(tail, marks=pytest.mark.slow) for tail in TAILS[1:])]
NAMES = ("student_hidden", "student_weight", "student_bias")


def tensors() -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    shapes = {
        "student_hidden": (B, T, H),
        "student_weight": (V, H),
        "student_bias": (V,),
        "teacher_hidden": (B, T, H),
        "teacher_weight": (V, H),
    }
    return {name: torch.randn(shape, generator=gen, dtype=torch.float64) for name, shape in shapes.items()}


def check(op, names=NAMES) -> None:
    made = tensors()

    def loss(*leaves):
        return op(**{**made, **dict(zip(names, leaves, strict=True))})

    torch.autograd.gradcheck(loss, [made[name].clone().requires_grad_() for name in names], fast_mode=False)


def divergence_with(**options):
    return lambda **heads: linear_divergence(**heads, **{"mask": MASK, "labels": LABELS, **options})


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize(
    "clip", ["both", *(pytest.param(c, marks=pytest.mark.slow) for c in ("entry", "token"))]
)
@pytest.mark.parametrize("backward", ["in_forward", pytest.param("recompute", marks=pytest.mark.slow)])
def test_clips(backend, divergence, clip, backward):
    check(
        divergence_with(
            divergence=divergence, backward=backward, backend=backend, workspace_bytes=900, **CLIPS[clip]
        )
    )


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("tail", SOME_TAILS)
@pytest.mark.parametrize("side", ["student", pytest.param("teacher", marks=pytest.mark.slow)])
def test_supports(backend, divergence, tail, side):
    for options in ({}, {"entry_clip": 0.1, "student_softcap": 3.0, "reduction": "none"}):
        check(
            divergence_with(
                divergence=divergence, topk=4, topk_tail=tail, topk_support=side, backend=backend, **options
            )
        )


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("tail", SOME_TAILS)
def test_listed_teachers(backend, divergence, tail):
    gen = torch.Generator().manual_seed(2)
    ids = torch.rand(B, T, V, generator=gen).argsort(-1)[..., :4]
    logprobs = torch.randn(B, T, 5, generator=gen, dtype=torch.float64).log_softmax(-1)[..., :4]

    def loss(student_hidden, student_weight, student_bias, **teacher):
        options = {
            "divergence": divergence,
            "tail": tail,
            "mask": MASK,
            "temperature": 0.8,
            "backend": backend,
        }
        return linear_topk_divergence(
            student_hidden, student_weight, ids, logprobs, student_bias=student_bias, **options
        )

    check(loss)


@pytest.mark.parametrize("names", [NAMES, ("student_hidden",), ("student_bias",)], ids=str)
def test_log_probs_and_entropy(backend, names):
    def loss(student_hidden, student_weight, student_bias, **teacher):
        return linear_logprobs(
            student_hidden,
            student_weight,
            LABELS,
            bias=student_bias,
            mask=MASK,
            softcap=4.0,
            return_entropy=True,
            backend=backend,
            workspace_bytes=900,
        )

    check(loss, names)


@pytest.mark.parametrize("names", [NAMES, ("student_hidden",)], ids=str)
def test_a_schedule_in_every_route(backend, names):
    """Weights from positions are constants, so finite differences give the gradient.

    Weights from statistics are detached, so they do not qualify.
    """
    for options in ({}, {"reduction": "none"}, {"backward": "recompute"}):
        check(
            divergence_with(
                token_weights=weights.FirstFraction(0.5) * weights.LinearDecay(0.2),
                divergence="jsd",
                backend=backend,
                **options,
            ),
            names,
        )


@pytest.mark.parametrize("share", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_policy_terms(backend, share):
    """Check terms whose loss depends on the log-prob alone; the reward of OPD is detached."""
    gen = torch.Generator().manual_seed(3)
    advantages, old = (
        torch.randn(B, 1, generator=gen, dtype=torch.float64),
        -3 * torch.rand(B, T, generator=gen, dtype=torch.float64),
    )
    for term in (
        objectives.PPOClip(advantages, old),
        objectives.PPOClip(advantages, old, low=0.05, high=0.4),
    ):

        def loss(term=term, **heads):
            return objectives.linear_policy_divergence(
                **heads,
                labels=LABELS,
                mask=MASK,
                policy=term,
                policy_weight=share,
                divergence="jsd",
                backend=backend,
                workspace_bytes=900,
            )

        check(loss)
