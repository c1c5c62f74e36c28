"""Who computes the loss: this package by backend, plain PyTorch, the other libraries, and the bare GEMMs, which bound them all.

A provider makes an op for a setting, `op(student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None) -> loss`: the mean over valid
tokens, in mode `recompute` the loss of each token. Where it cannot, `unsupported` says why, in words for a table.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._rows import backends
from ..divergence import linear_divergence
from ..spec import check_choice
from ..testing import Case
from .shapes import PEER_DIVERGENCES, Setting

PEER_BETA = {
    "forward_kl": 0.0,
    "jsd": 0.5,
    "reverse_kl": 1.0,
}  # TRL's and Liger's; both take the two ends as special cases
BASE = "gemms"
WHOLE_ROWS = {"cpu": 1024, "cuda": 8192}  # of the GEMMs that no planner has cut; above, they gain nothing
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """`exact`: held to this package's own gates; else to computing the same function (gate.py). `same_loss`: False for a yardstick of another loss."""

    name: str
    label: str
    make: Callable[[Setting], Op]
    unsupported: Callable[[Setting], str | None]
    exact: bool = False
    same_loss: bool = True


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _mean(losses: Tensor, labels: Tensor | None, setting: Setting) -> Tensor:
    """The reduction that a user writes around a loss per token."""
    if setting.mode == "recompute":
        return losses
    if labels is None:
        return losses.mean()
    valid = labels != -100
    return torch.where(valid, losses, 0.0).sum() / valid.sum()


# ---------------------------------------------------------------- this package


def _ours(**options: object) -> Callable[[Setting], Op]:
    def make(setting: Setting) -> Op:
        chosen = {"divergence": setting.divergence, **options}
        if setting.mode == "recompute":
            chosen |= {"reduction": "none", "backward": "recompute"}
        if setting.mode == "statistics":
            return lambda h, W, t, Wt, labels=None: linear_divergence(
                h, W, t, Wt, labels=labels, return_stats=True, **chosen
            )[0]
        return lambda h, W, t, Wt, labels=None: linear_divergence(h, W, t, Wt, labels=labels, **chosen)

    return make


def _backend_reason(name: str) -> Callable[[Setting], str | None]:
    def reason(setting: Setting) -> str | None:
        if name == "triton" and setting.device == "cpu":
            return "Triton only interprets on a CPU"
        return backends.explain(setting.device)[name]

    return reason


# ---------------------------------------------------------------- plain PyTorch


def plain(setting: Setting, wide: torch.dtype = torch.float32) -> Op:
    """What a user writes in PyTorch; logits upcast to fp32 as every trainer does."""

    def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            log_p = (t @ Wt.t()).to(wide).log_softmax(-1)
        log_q = (h @ W.t()).to(wide).log_softmax(-1)
        if setting.divergence == "reverse_kl":
            losses = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
        elif setting.divergence == "forward_kl":
            losses = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        else:
            log_m = torch.logaddexp(log_p, log_q) - torch.log(
                torch.tensor(2.0, dtype=log_q.dtype, device=log_q.device)
            )
            losses = 0.5 * sum(
                torch.nn.functional.kl_div(log_m, x, log_target=True, reduction="none").sum(-1)
                for x in (log_p, log_q)
            )
        return _mean(losses, labels, setting)

    return op


def _compiled(setting: Setting) -> Op:
    torch._dynamo.reset()  # else the ninth shape of a run would hit the recompilation limit and run eagerly
    return torch.compile(plain(setting), dynamic=False)


# ---------------------------------------------------------------- other libraries


def _trl(setting: Setting) -> Op:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    beta = PEER_BETA[setting.divergence]
    return lambda h, W, t, Wt, labels=None: _mean(
        function.apply(h, W, None, t, Wt, None, beta)[0], labels, setting
    )


def _no_labels(h: Tensor) -> Tensor:
    return torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)


def _liger_chunked(setting: Setting, compiled: bool | None = None) -> Op:
    loss = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    compiled = setting.device == "cuda" if compiled is None else compiled
    module = loss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[setting.divergence], compiled=compiled
    )
    return lambda h, W, t, Wt, labels=None: module(h, W, t, Wt, _no_labels(h) if labels is None else labels)


def _liger_compiled(setting: Setting) -> Op:
    torch._dynamo.reset()
    return _liger_chunked(setting, compiled=True)


def _liger_triton(setting: Setting) -> Op:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=PEER_BETA[setting.divergence]
    )
    return lambda h, W, t, Wt, labels=None: module(h, W, t, Wt, _no_labels(h) if labels is None else labels)


def _cut_cross_entropy(setting: Setting) -> Op:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    targets = torch.randint(setting.V, (setting.N,), device=setting.device)
    return lambda h, W, t, Wt, labels=None: function(
        h, W, targets[: h.shape[0]] if labels is None else labels
    )


def _peer_reason(
    *modules: str, missing: str, cuda_only: bool = False, cpu_only: bool = False, per_token: bool = True
) -> Callable[[Setting], str | None]:
    def reason(setting: Setting) -> str | None:
        if setting.divergence not in PEER_DIVERGENCES:
            return f"has no {setting.divergence}"
        if setting.mode == "recompute" and not per_token:
            return "has no loss per token"
        if cuda_only and setting.device != "cuda":
            return "needs an NVIDIA GPU"
        if cpu_only and setting.device == "cuda":
            return "on a GPU liger-chunked is compiled"
        return None if all(map(installed, modules)) else f"{missing} is not installed"

    return reason


def _only_reference_divergences(setting: Setting) -> str | None:
    return None if setting.divergence in PEER_DIVERGENCES else f"not written for {setting.divergence}"


PROVIDERS = {
    p.name: p
    for p in (
        Provider("opsd", "opsd_kernels", _ours(), lambda setting: None, exact=True),
        *(Provider(f"opsd-{name}", f"opsd_kernels, {name}", _ours(backend=name), _backend_reason(name), exact=True) for name in backends.NAMES),
        Provider("opsd-fp32", "opsd_kernels, fp32 logits", _ours(logits_dtype=torch.float32), lambda setting: None, exact=True),
        Provider("torch", "plain PyTorch", plain, _only_reference_divergences),
        Provider("compiled", "torch.compile", _compiled, _only_reference_divergences),
        Provider("trl", "TRL ChunkedDivergenceFunction", _trl, _peer_reason("trl", "trl.kernels.chunked_divergence", missing="trl >= 1.16")),
        Provider("liger-chunked", "Liger chunked JSD", _liger_chunked, _peer_reason("liger_kernel", missing="liger-kernel", per_token=False)),
        Provider(  # Liger's default; on a CPU half a minute to a minute of compiling for each setting
            "liger-compiled", "Liger chunked JSD, compiled", _liger_compiled,
            _peer_reason("liger_kernel", missing="liger-kernel", cpu_only=True, per_token=False),
        ),
        Provider(
            "liger-triton", "Liger Triton JSD", _liger_triton, _peer_reason("liger_kernel", "triton", missing="liger-kernel", cuda_only=True, per_token=False)
        ),
        Provider(
            "cce", "cut-cross-entropy (another loss)", _cut_cross_entropy,
            _peer_reason("cut_cross_entropy", missing="cut-cross-entropy", cuda_only=True, per_token=False), same_loss=False,
        ),
    )
}  # fmt: skip
LABELS = {name: provider.label for name, provider in PROVIDERS.items()} | {
    BASE: "bare GEMMs",
    "whole": "bare GEMMs, chunks as large as pays",
}
DEFAULT = ("opsd", "torch", "compiled", "trl", "liger-chunked", "liger-compiled", "liger-triton", "cce")
SLOW = (
    "compiled",
    "liger-compiled",
)  # to start, not to run: left out of the quick suite, where it would take most of the time


def parse_providers(names: list[str] | None, quick: bool) -> list[Provider]:
    """In the order given; without any, the default ones."""
    for name in names or ():
        check_choice("provider", name, tuple(PROVIDERS))
    chosen = names or [name for name in DEFAULT if not (quick and name in SLOW)]
    return [PROVIDERS[name] for name in chosen]


# ---------------------------------------------------------------- running them


def stepper(op: Op, case: Case, setting: Setting) -> Callable[[], Tensor]:
    """Forward and backward over fresh gradients, as in a training step; the loss. In mode `statistics`, forward alone."""
    live = case.leaves()
    options = {} if case.labels is None else {"labels": case.labels}
    upstream = torch.rand(setting.N, device=setting.device) + 0.5 if setting.mode == "recompute" else None

    def step() -> Tensor:
        if setting.mode == "statistics":
            with torch.no_grad():
                return op(*live.inputs(), **options)
        live.student_hidden.grad = live.student_weight.grad = None
        loss = op(*live.inputs(), **options)
        loss.backward(upstream if loss.dim() else None)
        return loss.detach()

    return step


def bare_gemms(case: Case, setting: Setting, rows: int) -> Callable[[], None]:
    """The GEMMs that no implementation can avoid, in the library's own form, over chunks of `rows` and into buffers allocated and touched before."""
    h, W, t, Wt = (x.detach() for x in case.inputs())
    S = torch.ones(min(rows, setting.N), setting.V, dtype=h.dtype, device=h.device)
    dh = torch.ones_like(h) if setting.mode != "statistics" else None
    dW = torch.ones_like(W) if setting.trainable else None
    projections = 2 if setting.mode == "recompute" else 1

    def run() -> None:
        for start in range(0, setting.N, rows):
            chunk = slice(start, start + rows)
            C = h[chunk].shape[0]
            for _ in range(projections):
                torch.mm(t[chunk], Wt.t(), out=S[:C])
                torch.mm(h[chunk], W.t(), out=S[:C])
            if dh is not None:
                torch.mm(S[:C], W, out=dh[chunk])
            if dW is not None:
                dW.addmm_(S[:C].t(), h[chunk])

    return run
