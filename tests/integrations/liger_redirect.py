"""A pytest plugin that runs Liger's own tests on the shims: `-p liger_redirect` replaces Liger's JSD losses.

Tests that count calls of torch's nll_loss, to see whether the cross-entropy was computed, count the two
functions that compute it here. LIGER_REDIRECT_PLANT=beta plants a mistake: the shims take beta for 1 - beta.
"""

import importlib
import os
from types import SimpleNamespace

import torch

from opsd_kernels.integrations import liger

PLACES = {
    "LigerFusedLinearJSDLoss": ("chunked_loss", "chunked_loss.jsd_loss"),
    "LigerFusedLinearJSD": ("transformers", "transformers.fused_linear_jsd"),
}
calls = []


def counted(name: str, has_cross_entropy: bool):
    op = getattr(liger, name)

    def run(*args, **kwargs):
        calls.append(name)
        if has_cross_entropy:
            torch.nn.functional.nll_loss(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
        return op(*args, **kwargs)

    setattr(liger, name, run)


def pytest_configure(config):
    for name, has_cross_entropy in {
        "linear_divergence": False,
        "linear_logprobs": True,
        "linear_policy_divergence": True,
    }.items():
        counted(name, has_cross_entropy)
    if os.environ.get("LIGER_REDIRECT_PLANT") == "beta":
        right = liger._divergence
        liger._divergence = lambda name, beta: right(name, 1 - beta)
    places = [
        (f"liger_kernel.{module}", name, getattr(liger, name))
        for name, modules in PLACES.items()
        for module in modules
    ]
    chunked, kernel = liger.fused_linear_jsd_loss, liger.fused_linear_jsd
    places += [
        ("liger_kernel.chunked_loss.functional", "liger_fused_linear_jsd", chunked),
        ("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDFunction", SimpleNamespace(apply=chunked)),
        ("liger_kernel.transformers.functional", "liger_fused_linear_jsd", kernel),
        (
            "liger_kernel.ops",
            "LigerFusedLinearJSDFunction",
            SimpleNamespace(apply=lambda *args: kernel(*args[:9])),
        ),  # the last two name its kernels
    ]
    for module, name, ours in places:
        setattr(importlib.import_module(module), name, ours)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls of the shims' ops: {len(calls)}")
