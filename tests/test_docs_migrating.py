"""Compare the `before` block of each section of docs/guides/migrating.md with its `after` block."""

import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from opsd_kernels.bench import providers
from opsd_kernels.testing import Outcome, assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "migrating.md"
# The package and version required by the first word of a heading
INSTALLED = {"TRL": ("trl", "1.16"), "Liger": ("liger_kernel", None), "torch": ("torch", "2.13")}


def load_unsloth(monkeypatch):
    """Make unsloth's file importable by its name without the package, which changes torch."""
    if providers._unsloth_file() is None:
        pytest.skip("unsloth_zoo is not installed")
    module = providers._unsloth_module()
    for name in ("unsloth_zoo", "unsloth_zoo.fused_losses"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "unsloth_zoo.fused_losses.fused_linear", module)


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def sections(page: str) -> dict[str, list[str]]:
    """Return the code blocks by heading, without sections that have none."""
    parts = re.split(r"^#{2,3} (.*)$", page, flags=re.MULTILINE)[1:]
    return {title: blocks(body) for title, body in zip(parts[::2], parts[1::2], strict=True) if blocks(body)}


SECTIONS = sections(PAGE.read_text())
SETUP = SECTIONS.pop("Setup")


def trainer(section: str) -> SimpleNamespace:
    """Return a stand-in with TRL's methods and their settings."""
    settings = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        temperature=1.0,
    )
    if "GRPO" in section:
        from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

        settings.importance_sampling_level, settings.loss_type = "token", "grpo"
        settings.epsilon_low = settings.epsilon_high = 0.2
        settings._compute_policy_loss = SDPOTrainer._compute_policy_loss.__get__(settings)
    if "IW-OPD" in section:
        from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

        settings.iw_opd_gamma, settings.iw_opd_epsilon = 0.5, 1e-8
        settings._compute_iw_opd_loss = IWOPDTrainer._compute_iw_opd_loss.__get__(settings)
    return settings


def outcome(section: str, block: str, name: str, dtype: str) -> Outcome:
    """Run the setup in `dtype` and then the block; return its variable `name` with the gradients."""
    setup = "\n".join(SETUP).replace("dtype = torch.float32", f"dtype = torch.{dtype}")
    assert f"torch.{dtype}" in setup
    with torch.random.fork_rng():
        session = {"trainer": trainer(section)}
        exec(setup, session)
        exec(block, session)
    loss = session[name]
    assert loss.dim() == 0
    grads = torch.autograd.grad(loss, (session["student_hidden"], session["student_head"]))
    return Outcome(loss.detach(), *grads)


def test_every_library_has_a_section():
    titles = " ".join(SECTIONS)
    assert all(
        name in titles
        for name in (
            "GKD",
            "DistillationTrainer",
            "SDPO",
            "IW-OPD",
            "Liger",
            "OPSD",
            "verl",
            "NeMo-RL",
            "GOLD",
            "SDFT",
            "ServerDistillation",
            "unsloth",
            "torch",
            "ms-swift",
            "Automodel",
            "fla",
            "orda",
            "SpecForge",
        )  # fmt: skip
    ), titles


@pytest.mark.parametrize("section", SECTIONS)
def test_ours_is_theirs(section, monkeypatch):
    needed, version = INSTALLED.get(section.split()[0], (None, None))
    if needed:
        pytest.importorskip(needed, minversion=version, reason=f"{needed} is not installed")
    if section.startswith("unsloth"):
        load_unsloth(monkeypatch)
    before, after = SECTIONS[section]
    assert before.startswith("# before") and after.startswith("# after")
    truth, plain = (outcome(section, before, "theirs", dtype) for dtype in ("float64", "float32"))
    assert all(value.abs().max() > 0 for _, value in truth.named())
    assert_no_worse(outcome(section, after, "ours", "float32"), plain, truth)
