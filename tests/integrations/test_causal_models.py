"""Every causal language model of transformers: right to 1e-4, or refused in words before training."""

from collections import defaultdict

import pytest
import torch
from causal_models import ABSENT, CLASSES, NAMES, build

from opsd_kernels.integrations.transformers import check_head, distillation_loss
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.sampling import agreement

# Of transformers 5.24: 188 of 193 are right, 177 of these in the trainer too, 13 of them without padding.
RIGHT, SAMPLED = 186, 165
# Plain, tied, a softcap, a scale, a layer before the head, experts, a recurrence, latent attention.
HANDFUL = (
    "llama",
    "qwen3",
    "gemma2",
    "cohere",
    "modernbert-decoder",
    "mixtral",
    "mamba",
    "deepseek_v3",
    "mpt",
)
REFUSED = {
    "cpmant": "reads later tokens",
    "dory": "its head has a trained scale for each token, which the loss would not train",
    "musicgen": "several heads",
    "musicgen_melody": "several heads",
    "prophetnet": "a head over states of several tokens",
}
outcomes: dict[str, list[str]] = defaultdict(list)


def models():
    return [
        pytest.param(name, marks=[] if name in HANDFUL or name in REFUSED else pytest.mark.slow)
        for name in NAMES
    ]


def dense(student, teacher, tokens):
    """Return KL(student || teacher) of the models' own logits in fp32, averaged over tokens."""
    with torch.no_grad():
        log_p = teacher(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    log_q = student(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def gradients(model, loss):
    """Return the gradients of all trainable weights as one vector."""
    found = torch.autograd.grad(
        loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models())
def test_right_or_refused(name):
    student, teacher = build(name), build(name, seed=1)
    try:
        check_head(student, "student")
    except ValueError as error:
        assert name in REFUSED and str(error).startswith("student: expected "), error
        assert type(student).__name__ in str(error)
        outcomes["refused"].append(name)
        return
    assert name not in REFUSED
    tokens = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    expected, actual = (
        dense(student, teacher, tokens),
        distillation_loss(student, teacher, {"input_ids": tokens}, {"input_ids": tokens}, tokens),
    )
    assert abs(actual - expected) <= 1e-4 * max(1.0, expected.item())
    # Reformer has no backward in eval mode, and drops out in training mode.
    if name != "reformer":
        truth = gradients(student, expected)
        assert (gradients(student, actual) - truth).norm() <= 1e-3 * truth.norm()
    outcomes["right"].append(name)
    try:
        outcomes[agreement.batches(student, 0)].append(name)
    except ConfigError as error:
        assert type(student).__name__ in str(error)
        outcomes["not sampled"].append(name)


@pytest.mark.slow
def test_how_many(request):
    """Counts what the tests above found, where all of them ran."""
    print(
        {how: len(names) for how, names in outcomes.items()}, outcomes["one length"], outcomes["not sampled"]
    )
    assert set(ABSENT) <= set(CLASSES) and len(ABSENT) == 3
    if len(outcomes["right"]) + len(outcomes["refused"]) < len(NAMES):
        pytest.skip("some of the models did not run in this process")
    assert len(outcomes["right"]) >= RIGHT
    assert sum(len(outcomes[how]) for how in ("any", "one length", "alone")) >= SAMPLED
