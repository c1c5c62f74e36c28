"""The implementations that are measured: this package, plain PyTorch, other libraries, the bare GEMMs.

A provider makes an op for a setting, `op(student_hidden, student_weight, teacher_hidden, teacher_weight,
labels=None) -> loss`: the mean over valid tokens, in mode `recompute` the loss of each token. `unsupported`
returns the reason why a provider cannot serve a setting, worded for a table, or None.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..divergence import linear_divergence
from ..logprobs import linear_logprobs
from ..spec import check_choice
from ..testing import Case
from .internals import backends
from .shapes import PEER_DIVERGENCES, Setting

# Of TRL and Liger; both treat the two ends as special cases.
PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
BASE, CACHED = "gemms", "opsd-cached"
# Chunk rows of the GEMMs that no planner has cut; larger chunks gain nothing.
WHOLE_ROWS = {"cpu": 1024, "cuda": 8192}
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation. Its gate is gate.py's.

    `exact`: held to this package's own gates; otherwise it has to compute the same function. `same_loss`:
    False for a yardstick that computes another loss.
    """

    name: str
    label: str
    make: Callable[[Setting], Op]
    unsupported: Callable[[Setting], str | None]
    exact: bool = False
    same_loss: bool = True


def installed(module: str) -> bool:
    """Return whether `module` can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _mean(losses: Tensor, labels: Tensor | None, setting: Setting) -> Tensor:
    """Reduce per-token losses as a user would: to the mean over valid tokens, or to 0 at the others."""
    recompute = setting.mode == "recompute"
    if labels is None:
        return losses if recompute else losses.mean()
    valid = labels != -100
    kept = torch.where(valid, losses, 0.0)
    return kept if recompute else kept.sum() / valid.sum()


# ---------------------------------------------------------------- this package


def _ours(**options: Any) -> Callable[[Setting], Op]:
    """Return the maker of this package's op with `options` of `linear_divergence`."""

    def make(setting: Setting) -> Op:
        chosen: dict[str, Any] = {"divergence": setting.divergence, **options}
        if setting.mode == "recompute":
            chosen |= {"reduction": "none", "backward": "recompute"}
        if setting.mode == "statistics":
            chosen |= {"return_stats": True}

        def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
            result = linear_divergence(h, W, t, Wt, labels=labels, **chosen)
            return result[0] if isinstance(result, tuple) else result

        return op

    return make


def _backend_reason(name: str) -> Callable[[Setting], str | None]:
    def reason(setting: Setting) -> str | None:
        if name == "triton" and setting.device == "cpu":
            return "Triton only interprets on a CPU"
        return backends.explain(setting.device)[name]

    return reason


# ---------------------------------------------------------------- plain PyTorch


def _kl(log_other: Tensor, log_own: Tensor) -> Tensor:
    """Shape (N,): KL(own || other) of each row, in nats."""
    return torch.nn.functional.kl_div(log_other, log_own, log_target=True, reduction="none").sum(-1)


def plain(setting: Setting, wide: torch.dtype = torch.float32) -> Op:
    """Return the op as plain PyTorch, with logits upcast to fp32 as in every trainer."""

    def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            log_p = (t @ Wt.t()).to(wide).log_softmax(-1)
        log_q = (h @ W.t()).to(wide).log_softmax(-1)
        if setting.divergence == "reverse_kl":
            losses = _kl(log_p, log_q)
        elif setting.divergence == "forward_kl":
            losses = _kl(log_q, log_p)
        else:
            two = torch.tensor(2.0, dtype=log_q.dtype, device=log_q.device)
            log_m = torch.logaddexp(log_p, log_q) - torch.log(two)
            losses = 0.5 * (_kl(log_m, log_p) + _kl(log_m, log_q))
        return _mean(losses, labels, setting)

    return op


def _compiled(setting: Setting) -> Op:
    # Without it the ninth shape of a run hits the recompilation limit and runs eagerly.
    torch._dynamo.reset()
    return torch.compile(plain(setting), dynamic=False)


# ---------------------------------------------------------------- other libraries


def _trl(setting: Setting) -> Op:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    beta = PEER_BETA[setting.divergence]
    return lambda h, W, t, Wt, labels=None: _mean(
        function.apply(h, W, None, t, Wt, None, beta)[0], labels, setting
    )


def _valid_labels(h: Tensor) -> Tensor:
    """Shape (N,): a label for each token, for losses that have to have them."""
    return torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)


def _liger_chunked(setting: Setting, compiled: bool | None = None) -> Op:
    loss = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss
    compiled = setting.device == "cuda" if compiled is None else compiled
    module = loss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[setting.divergence], compiled=compiled
    )
    return lambda h, W, t, Wt, labels=None: module(
        h, W, t, Wt, _valid_labels(h) if labels is None else labels
    )


def _liger_compiled(setting: Setting) -> Op:
    torch._dynamo.reset()
    return _liger_chunked(setting, compiled=True)


def _liger_triton(setting: Setting) -> Op:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=PEER_BETA[setting.divergence]
    )
    return lambda h, W, t, Wt, labels=None: module(
        h, W, t, Wt, _valid_labels(h) if labels is None else labels
    )


def _cut_cross_entropy(setting: Setting) -> Op:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    targets = torch.randint(setting.V, (setting.N,), device=setting.device)
    return lambda h, W, t, Wt, labels=None: function(
        h, W, targets[: h.shape[0]] if labels is None else labels
    )


def _unsloth_file() -> Path | None:
    """Return the file of unsloth-zoo's fused losses, found without an import of the package."""
    spec = importlib.util.find_spec("unsloth_zoo")
    found = spec.submodule_search_locations if spec is not None else None
    file = Path(next(iter(found))) / "fused_losses" / "fused_linear.py" if found else None
    return file if file is not None and file.is_file() else None


@functools.cache
def _unsloth_module() -> Any:
    """Load that file alone: the package needs a dozen others, and changes torch and transformers."""
    spec = importlib.util.spec_from_file_location("_unsloth_zoo_fused_linear", _unsloth_file())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unsloth(setting: Setting) -> Op:
    function, beta = _unsloth_module().fused_linear_jsd, PEER_BETA[setting.divergence]
    return lambda h, W, t, Wt, labels=None: function(h, W, t, Wt, labels=labels, beta=beta)


def _unsloth_reason(setting: Setting) -> str | None:
    if installed("unsloth_zoo") and _unsloth_file() is None:
        return "this unsloth_zoo has no fused_losses/fused_linear.py"
    return UNSLOTH_REASON(setting)


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


# ---------------------------------------------------------------- losses of labels


def _label_loss(setting: Setting) -> Op:
    def op(h: Tensor, W: Tensor, t: Tensor, Wt: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        logprobs = linear_logprobs(h, W, labels)
        assert isinstance(logprobs, Tensor)
        return -logprobs.mean()

    return op


def _plain_label_loss(setting: Setting) -> Op:
    return lambda h, W, t, Wt, labels=None: torch.nn.functional.cross_entropy((h @ W.t()).float(), labels)


def _torch_cross_entropy(setting: Setting) -> Op:
    """Return torch's chunked form: its `options=None` is a plain projection and cross-entropy."""
    nn: Any = torch.nn  # of torch >= 2.13
    function, options = nn.functional.linear_cross_entropy, nn.LinearCrossEntropyOptions()
    return lambda h, W, t, Wt, labels=None: function(h, W, labels, options=options)


def _torch_lce_reason(setting: Setting) -> str | None:
    known = hasattr(torch.nn.functional, "linear_cross_entropy")
    return None if known else "torch >= 2.13 is not installed: no linear_cross_entropy"


TRL_REASON = _peer_reason("trl", "trl.kernels.chunked_divergence", missing="trl >= 1.16")
LIGER_REASON = _peer_reason("liger_kernel", missing="liger-kernel", per_token=False)
LIGER_COMPILED_REASON = _peer_reason("liger_kernel", missing="liger-kernel", cpu_only=True, per_token=False)
LIGER_TRITON_REASON = _peer_reason(
    "liger_kernel", "triton", missing="liger-kernel", cuda_only=True, per_token=False
)
UNSLOTH_REASON = _peer_reason("unsloth_zoo", missing="unsloth_zoo", per_token=False)
CCE_REASON = _peer_reason("cut_cross_entropy", missing="cut-cross-entropy", cuda_only=True, per_token=False)
FP32_LOGITS = _ours(logits_dtype=torch.float32)
BY_BACKEND = [
    Provider(f"opsd-{name}", f"opsd_kernels, {name}", _ours(backend=name), _backend_reason(name), exact=True)
    for name in backends.NAMES
]
PROVIDERS = {
    p.name: p
    for p in (
        Provider("opsd", "opsd_kernels", _ours(), lambda setting: None, exact=True),
        *BY_BACKEND,
        Provider("opsd-fp32", "opsd_kernels, fp32 logits", FP32_LOGITS, lambda setting: None, exact=True),
        Provider("torch", "plain PyTorch", plain, _only_reference_divergences),
        Provider("compiled", "torch.compile", _compiled, _only_reference_divergences),
        Provider("trl", "TRL ChunkedDivergenceFunction", _trl, TRL_REASON),
        Provider("liger-chunked", "Liger chunked JSD", _liger_chunked, LIGER_REASON),
        # Liger's default; on a CPU it compiles for half a minute to a minute per setting.
        Provider("liger-compiled", "Liger chunked JSD, compiled", _liger_compiled, LIGER_COMPILED_REASON),
        Provider("liger-triton", "Liger Triton JSD", _liger_triton, LIGER_TRITON_REASON),
        Provider("unsloth", "unsloth-zoo fused_linear_jsd", _unsloth, _unsloth_reason),
        Provider("cce", "cut-cross-entropy (another loss)", _cut_cross_entropy, CCE_REASON, same_loss=False),
    )
}
# Losses of one head, the mean of -log p(label): suite `logprobs`. Only student and labels are read.
LABEL_PROVIDERS = {
    p.name: p
    for p in (
        Provider("opsd-logprobs", "opsd_kernels linear_logprobs", _label_loss, lambda setting: None, True),
        Provider("torch-logprobs", "plain PyTorch, fp32 logits", _plain_label_loss, lambda setting: None),
        Provider("torch-lce", "torch linear_cross_entropy", _torch_cross_entropy, _torch_lce_reason),
    )
}
LABELS = {name: provider.label for name, provider in (PROVIDERS | LABEL_PROVIDERS).items()} | {
    CACHED: "opsd_kernels, cached",
    BASE: "bare GEMMs",
    "whole": "bare GEMMs, chunks as large as pays",
}
DEFAULT = (
    "opsd",
    "torch",
    "compiled",
    "trl",
    "liger-chunked",
    "liger-compiled",
    "liger-triton",
    "unsloth",
    "cce",
)
# Slow to compile, not to run: left out of the quick suite, where compilation would take most of the time.
SLOW = ("compiled", "liger-compiled")


def parse_providers(names: list[str] | None, quick: bool) -> list[Provider]:
    """Return the providers named, in that order; without names, the default ones."""
    for name in names or ():
        check_choice("provider", name, tuple(PROVIDERS))
    chosen = names or [name for name in DEFAULT if not (quick and name in SLOW)]
    return [PROVIDERS[name] for name in chosen]


# ---------------------------------------------------------------- running them


def stepper(op: Op, case: Case, setting: Setting) -> Callable[[], Tensor]:
    """Return a step: forward and backward from cleared gradients, as in training; the step returns the loss.

    In mode `statistics` a step is the forward pass alone.
    """
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


def bare_gemms(case: Case, setting: Setting, rows: int, *, teacher: bool = True) -> Callable[[], None]:
    """Return the GEMMs that no implementation can avoid, as plain torch.mm over chunks of `rows`.

    Their buffers are allocated and touched before. Without `teacher` one head is projected.
    """
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
                if teacher:
                    torch.mm(t[chunk], Wt.t(), out=S[:C])
                torch.mm(h[chunk], W.t(), out=S[:C])
            if dh is not None:
                torch.mm(S[:C], W, out=dh[chunk])
            if dW is not None:
                dW.addmm_(S[:C].t(), h[chunk])

    return run
