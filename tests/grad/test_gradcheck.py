"""Run torch.autograd.gradcheck in float64.

Finite differences of the op itself find errors that formula and reference share.
"""

import pytest
import torch

from opsd_kernels import linear_divergence
from opsd_kernels.spec import KIND_NAMES

OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": 0.7, "teacher_temperature": 1.6},
    "scales": {"student_logit_scale": 1.4, "teacher_logit_scale": 0.6},
    "negative scale": {"student_logit_scale": -0.8},
    "softcaps": {"student_softcap": 2.0, "teacher_softcap": 3.0},
    "everything": {
        "temperature": 1.3,
        "student_logit_scale": 1.4,
        "student_softcap": 2.5,
        "teacher_softcap": 2.5,
        "vocab_size": 9,
        "beta": 0.2,
    },
}
N, V, H = 5, 11, 3


def tensors(shared_head: bool, bias: bool, leading=(N,), seed: int = 0) -> dict[str, torch.Tensor | None]:
    gen = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    made = {
        "student_hidden": random(*leading, H),
        "student_weight": random(V, H),
        "teacher_hidden": random(*leading, H),
    }
    made["teacher_weight"] = made["student_weight"].clone() if shared_head else random(V, H)
    made["student_bias"], made["teacher_bias"] = (random(V), random(V)) if bias else (None, None)
    return made


def check(made: dict, names: tuple[str, ...], **options) -> None:

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        live = {**made, **dict(zip(names, leaves, strict=True))}
        positional = [
            live.pop(name)
            for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        ]
        return linear_divergence(*positional, **live, **options)

    torch.autograd.gradcheck(loss, [made[name].clone().requires_grad_() for name in names], fast_mode=False)


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backward", ["in_forward", pytest.param("recompute", marks=pytest.mark.slow)])
def test_options(backend, divergence, option, backward):
    names = ("student_hidden", "student_weight", "student_bias")
    check(
        tensors(False, True),
        names,
        divergence=divergence,
        backward=backward,
        backend=backend,
        **OPTIONS[option],
    )


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "sequence_mean"])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("student_hidden",), marks=pytest.mark.slow),
        ("student_hidden", "student_weight"),
        ("student_bias",),
    ],
    ids=str,
)
def test_reductions_with_weights_and_masks(backend, divergence, reduction, names):
    made = tensors(False, True, leading=(2, 3))
    rest = {
        "mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "token_weights": torch.tensor([[0.5, 2.0, 1.0], [0.0, -1.0, 3.0]], dtype=torch.float64),
    }
    check(made, names, divergence=divergence, reduction=reduction, backend=backend, **rest)


@pytest.mark.parametrize("divergence", KIND_NAMES)
@pytest.mark.parametrize("option", ["plain", "temperatures", "softcaps"])
def test_shared_head(backend, divergence, option):
    """Perturb the hidden states alone, so that the head stays one tensor and the difference form runs."""
    made = tensors(False, True)
    made["teacher_weight"], made["teacher_bias"] = made["student_weight"], made["student_bias"]
    check(
        made,
        ("student_hidden",),
        divergence=divergence,
        backend=backend,
        workspace_bytes=600,
        **OPTIONS[option],
    )


@pytest.mark.parametrize("divergence", KIND_NAMES)
def test_near_teacher(backend, divergence):
    if divergence == "tvd":
        pytest.skip("a kink at p = q, which is where these rows stand")
    made = tensors(True, False)
    made["teacher_hidden"] = made["student_hidden"] + 1e-2 * made["teacher_hidden"]
    check(made, ("student_hidden", "student_weight"), divergence=divergence, backend=backend)
