"""A transformers model as arguments of the op: its final hidden states, and its LM head.

    check_head(model)                                  # once, before training
    loss = distillation_loss(student, teacher, student_inputs, teacher_inputs, labels, divergence="jsd")

or in two steps, where the rows of a loss are chosen in between:

    hidden, head = hidden_states(model, input_ids=tokens), Head.of(model)
    sides = {"student": (hidden, head), "teacher": (teacher_hidden, Head.of(teacher))}
    loss = on_heads(linear_divergence, sides, labels=labels)

`hidden_states` is the input of the model's output embedding, so it needs no name of a trunk. No logits are
computed. `check_head` compares both with the model's own log-probs and raises ValueError for a model that
this module does not read right. transformers itself is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from opsd_kernels.divergence import linear_divergence
from opsd_kernels.spec import expect

# Config entries that multiply the logits: Cohere, Muse Glimmer, Falcon-H1.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Granite and MiniCPM3 divide by this one, HyperCLOVAX multiplies.
DIVISOR = "logits_scaling"
# Config entries of a softcap: Gemma, RecurrentGemma.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# Entries that a model's own forward does not read.
UNREAD = {"mpt": ("logit_scale",)}
# Largest error of a log-prob in nats, on top of the roundings of the logits in the model's dtype.
AGREE = 1e-4
# The check also runs with hidden states scaled up until a logit reaches this: a softcap of 30 bends it.
LARGE = 60.0


@dataclass(frozen=True)
class Head:
    """The LM head of a model: weight and bias, with the scale and softcap of its config."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Module) -> Head:
        """Read the head of a causal language model, inside a peft model too.

        A sharded (DTensor) weight is gathered, one that accelerate offloaded is loaded as in the model's own
        forward. Raises ValueError if the output head is not a plain linear map (a head with an adapter of its
        own, a quantised one, several heads), and for a scale or softcap in the config that is no number.
        """
        inner = without_adapter(model)
        module = output_embedding(inner)
        kind = type(inner).__name__
        scale, softcap = _logit_scale(inner), _number(inner, *SOFTCAPS)
        with _loaded(module):
            weight, bias = (_plain(kind, name, getattr(module, name, None)) for name in ("weight", "bias"))
        # ds_shape is the whole shape of a parameter that ZeRO-3 partitions.
        linear = weight is not None and len(getattr(weight, "ds_shape", weight.shape)) == 2
        if weight is None or not linear or hasattr(module, "base_layer"):
            raise ValueError(
                "model: expected a causal language model with a linear head that has no adapter of its own, "
                f"got {kind} with {type(module).__name__}"
            )
        return cls(weight, bias, scale, softcap)

    def options(self, side: str = "") -> dict[str, Any]:
        """Return the keyword arguments of linear_divergence for `side`, "student" or "teacher".

        Without a side they are those of linear_logprobs.
        """
        prefix = side and f"{side}_"
        return {
            f"{prefix}bias": self.bias,
            f"{prefix}logit_scale": self.logit_scale,
            f"{prefix}softcap": self.softcap,
        }

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Shape (..., V): log-probs of hidden states (..., H), for checks on a few tokens."""
        logits = F.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias)
        logits = _float(logits) * self.logit_scale
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(-1)


def on_heads(
    op: Callable[..., Any],
    sides: dict[str, tuple[Tensor, Head]],
    *tensors: Tensor,
    **options: Any,
) -> Any:
    """Call `op`, linear_divergence or a sibling, on hidden states and their heads.

    `sides` maps "student" and "teacher", or "" alone, to hidden states (..., H) and the head that projects
    them. `tensors` are further positional arguments of `op`. `options` override the heads' own.
    """
    settings = {
        name: value for side, (_, head) in sides.items() for name, value in head.options(side).items()
    }
    operands = [operand for hidden, head in sides.values() for operand in (hidden, head.weight)]
    return op(*operands, *tensors, **{**settings, **options})


def without_adapter(model: Module) -> Any:
    """Return the transformers model inside a peft model; its layers still hold the adapter."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model


def output_embedding(model: Module) -> Any:
    """Return the module that projects hidden states to logits. Raises ValueError if there is not one."""
    inner = without_adapter(model)
    found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(found, Module):
        raise ValueError(
            "model: expected a causal language model with one output embedding (get_output_embeddings), "
            f"got {type(inner).__name__} with {type(found).__name__}"
        )
    return found


def hidden_states(model: Module, **inputs: Any) -> Tensor:
    """Shape (B, L, H): the final hidden states of any causal language model, without logits.

    `inputs` are those of the model's forward, e.g. `input_ids` (B, L) and `attention_mask` (B, L). `Head.of`
    projects the result. Not for calls from several threads on one model. Raises ValueError if the model does
    not call its output embedding once.
    """
    return forward_to_head(model, inputs)[0]


def forward_to_head(
    model: Module, inputs: Mapping[str, Any], forward: Callable[..., Any] | None = None
) -> tuple[Tensor, Any]:
    """Run the model, and return what enters its output embedding (B, L, H), and the output of its forward.

    The output embedding computes nothing: the logits of the output are empty, the rest is as ever.
    `use_cache` is False unless `inputs` say otherwise. `forward` is what is called, by default the model;
    give `model.forward` where the model's own hooks run already.
    """
    inner, entered = without_adapter(model), []
    module = output_embedding(inner)

    def no_logits(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(hidden)
        return hidden.new_empty(*hidden.shape[:-2], 0, rows)

    rows = int(getattr(inner.config.get_text_config(), "vocab_size", 0) or 1)
    own = vars(module).get("forward")
    # In place of the head's forward, not a hook that raises: the hooks of FSDP, DeepSpeed and accelerate
    # around the modules above it then find their usual end.
    module.forward = no_logits
    try:
        output = (forward or model)(**_without_cache(inner, inputs))
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    if len(entered) != 1:
        raise ValueError(
            f"model: expected a forward that calls its output embedding once, "
            f"got {type(inner).__name__}, which calls it {len(entered)} times"
        )
    return entered[0], output


def _without_cache(inner: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(inner.forward).parameters
    extra = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {**({"use_cache": False} if extra or "use_cache" in accepted else {}), **inputs}


@contextmanager
def scoring(model: Module) -> Iterator[None]:
    """Put the model in eval mode, without dropout, and restore the mode of each of its modules."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def distillation_loss(
    student: Module,
    teacher: Module,
    student_inputs: Mapping[str, Any],  # input_ids (B, L_s), attention_mask (B, L_s), ...
    teacher_inputs: Mapping[str, Any],  # input_ids (B, L_t), ...
    labels: Tensor,  # (B, T) int64
    **options: Any,
) -> Any:
    """Return `linear_divergence` between two models at `labels`, in nats, without logits.

    `labels` are the tokens at the last T positions of both inputs, -100 where there is no loss: prompts of
    different lengths are padded on the left. A label's distribution is that of the row before it; with T the
    whole length of an input the first label has none and is left out. `options` are those of
    linear_divergence. The teacher runs in eval mode without a gradient; it may be the student itself.

    A student whose config has `output_router_logits` adds its router's auxiliary loss, times the coefficient
    of its config; `reduction` is not "none" then.

    Raises ValueError for labels that are not at the end of both inputs, and for a head that `Head.of`
    refuses. Call `check_head` on both models once before.
    """
    lengths = [_check_labels(side, labels) for side in (student_inputs, teacher_inputs)]
    rows = min(labels.shape[1], *(length - 1 for length in lengths))
    with torch.no_grad(), scoring(teacher):
        theirs = forward_to_head(teacher, teacher_inputs)[0][:, -rows - 1 : -1], Head.of(teacher)
    hidden, output = forward_to_head(student, student_inputs)
    sides = {"student": (hidden[:, -rows - 1 : -1], Head.of(student)), "teacher": theirs}
    shifted = labels[:, labels.shape[1] - rows :].to(hidden.device)
    result = on_heads(linear_divergence, sides, **{"labels": shifted, **options})
    coefficient = router_coefficient(student) if routes_by_config(student) else 0.0
    if not coefficient:
        return result
    expect(
        options.get("reduction") != "none",
        "reduction",
        "one that gives a single loss, as the config of the student adds the router's",
        "'none'",
    )
    loss = result[0] if isinstance(result, tuple) else result
    loss = loss + coefficient * router_loss(output)
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def _check_labels(inputs: Mapping[str, Any], labels: Tensor) -> int:
    """Return the length of the inputs. Raises ValueError unless the labels are their last tokens."""
    given = inputs.get("input_ids")
    expect(labels.dim() == 2, "labels", "a tensor (B, T)", f"shape {tuple(labels.shape)}")
    if given is None:
        length = inputs["inputs_embeds"].shape[1]
        same = torch.ones((), dtype=torch.bool)
    else:
        length = given.shape[1]
        last = given[:, -labels.shape[1] :].to(labels.device)
        expect(
            len(given) == len(labels) and last.shape == labels.shape,
            "labels",
            f"the last tokens of input_ids {tuple(given.shape)}",
            f"shape {tuple(labels.shape)}",
        )
        same = ((labels == -100) | (labels == last)).all()
    message = "labels: expected -100 or the tokens at the end of input_ids, in the student's and the teacher's"
    if same.device.type == "cpu":
        expect(bool(same), "labels", message.partition("expected ")[2], "other tokens")
    else:
        # An asynchronous device-side assert on CUDA: no host sync.
        torch._assert_async(same, message)
    return length


def routes_by_config(model: Module) -> bool:
    """True if the model's config adds its router's auxiliary loss (`output_router_logits`)."""
    return bool(getattr(without_adapter(model).config.get_text_config(), "output_router_logits", False))


def router_coefficient(model: Module) -> float:
    """Return the factor of a mixture-of-experts model's auxiliary loss, or 0 if it has none."""
    inner = without_adapter(model)
    # JetMoe and Dbrx name it otherwise in their configs.
    for owner in (inner, inner.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            value = getattr(owner, name, None)
            if value is not None:
                return float(value)
    return 0.0


def router_loss(output: Any) -> Tensor:
    """Return the auxiliary loss, 0-dim, that a forward with `output_router_logits=True` put in its output."""
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "model: expected an output with the router's auxiliary loss (aux_loss), as its config asks for, "
            f"got {type(output).__name__} without; set router_aux_loss_coef=0 in the config"
        )
    return loss


@contextmanager
def _loaded(module: Module) -> Iterator[None]:
    """Load the weights of a module that accelerate offloaded, as the module's own forward does."""
    with _aligned(module):
        yield


def _aligned(module: Module) -> Any:
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _plain(kind: str, name: str, tensor: Any) -> Tensor | None:
    """Gather a DTensor; return any other plain tensor as it is. Raises ValueError for a quantised one."""
    if tensor is None:
        return None
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    plain = type(tensor) in (Tensor, torch.nn.Parameter) or hasattr(tensor, "ds_shape")
    if not plain or not tensor.is_floating_point() or tensor.element_size() < 2:
        what = str(tensor.dtype) if plain else type(tensor).__name__
        raise ValueError(
            f"model: expected a head that is not quantised (leave it out of the quantisation), "
            f"got {kind} with a {name} of {what}"
        )
    if tensor.is_meta:
        raise ValueError(f"model: expected a head with values, got {kind} with a {name} on the meta device")
    return tensor


def _number(inner: Any, *names: str) -> float | None:
    """Return the first of these entries that the model's config sets. Raises ValueError for a non-number."""
    config = inner.config.get_text_config()
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"model: expected a number or None as {name} in the config of {type(inner).__name__}, "
                f"got {value!r}"
            )
        if name not in UNREAD.get(config.model_type, ()):
            return float(value)
    return None


def _logit_scale(inner: Any) -> float:
    scale, factor = _number(inner, *SCALES), _number(inner, DIVISOR)
    if scale is not None:
        return scale
    if factor is None:
        return 1.0
    return factor if inner.config.get_text_config().model_type == "hyperclovax" else 1.0 / factor


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def check_head(model: Module, name: str = "model") -> None:
    """Compare hidden states and head with the model's own log-probs on a small batch.

    Raises ValueError, with `name` as the argument's name, for a model whose log-probs are not those of its
    hidden states under its head to 1e-4 (and the roundings of its dtype): one that bends its logits in a way
    its config does not say. Raises it too for a model that reads later tokens, and for a head that `Head.of`
    refuses. The model's training mode is restored.
    """
    inner = without_adapter(model)
    with scoring(model):
        try:
            head = Head.of(model)
            tokens = _probe(inner, head.weight.shape[0])
            hidden = hidden_states(model, input_ids=tokens)
            if hidden.shape[:2] != tokens.shape:
                raise ValueError(
                    f"model: expected hidden states for {tuple(tokens.shape)} tokens, "
                    f"got {tuple(hidden.shape)} of {type(inner).__name__}"
                )
            _compare(inner, "as they are", _own_logits(model, tokens, 1.0), hidden, head)
            largest = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).abs().max().item()
            if 0 < largest < LARGE:
                factor = LARGE / largest
                _compare(inner, "scaled up", _own_logits(model, tokens, factor), hidden * factor, head)
            _check_causal(inner, head.logprobs(hidden))
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('model: ')}") from error


def _probe(inner: Any, rows: int) -> Tensor:
    """Shape (2, 8): token ids without special ones. The two rows differ in the last token alone."""
    config = inner.config
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if "token" in name and isinstance(value, int)
    }
    usual = [token for token in range(rows) if token not in special][: 9 * max(1, rows // 9) : max(1, rows // 9)]
    usual = (usual * 9)[:9]
    return torch.tensor([usual[:8], [*usual[:7], usual[8]]], device=_device(inner))


def _device(inner: Any) -> torch.device:
    """Return the device of the model's inputs; accelerate moves them where it offloaded weights."""
    device = inner.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _own_logits(model: Module, tokens: Tensor, factor: float) -> Tensor:
    """Shape (B, L, V): the logits of the model's own forward, with `factor` times the hidden states."""
    inner = without_adapter(model)
    hook = output_embedding(inner).register_forward_pre_hook(
        lambda module, args: (args[0] * factor, *args[1:]), prepend=True
    )
    try:
        logits = getattr(model(**_without_cache(inner, {"input_ids": tokens})), "logits", None)
    finally:
        hook.remove()
    if not isinstance(logits, Tensor):
        raise ValueError(f"model: expected a forward that returns logits, got {type(inner).__name__}")
    return logits


def _compare(inner: Any, how: str, logits: Tensor, hidden: Tensor, head: Head) -> None:
    expected, actual = _float(logits).log_softmax(-1), head.logprobs(hidden)
    if expected.shape == actual.shape:
        error = (actual - expected.to(actual.device)).abs()
        # Equal infinities, of a bias of -inf.
        error = torch.where(actual == expected.to(actual.device), 0.0, error).max().item()
        rounding = torch.finfo(logits.dtype).eps if logits.dtype.itemsize < 4 else 0.0
        finite = _float(logits)[logits.isfinite()]
        if error <= AGREE + 2 * rounding * (finite.abs().max().item() if len(finite) else 0.0):
            return
        off = f"log-probs are off by {error:.2g} nats (hidden states {how})"
    else:
        off = f"logits have shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
    raise ValueError(
        "model: expected logits that are a linear head over hidden states, scaled and softcapped as the "
        f"config says, got {type(inner).__name__}, whose {off}"
    )


def _check_causal(inner: Any, logprobs: Tensor) -> None:
    before, spread = logprobs[:, :-1], logprobs[logprobs.isfinite()]
    change = torch.where(before[0] == before[1], 0.0, (before[0] - before[1]).abs()).max().item()
    # Rows of one product may round differently where experts are grouped by token.
    if not change <= 0.05 * (spread.max() - spread.min()).item():
        raise ValueError(
            "model: expected a causal language model, whose hidden states do not depend on later tokens "
            f"(is_decoder=True in some configs), got {type(inner).__name__}, whose log-probs change by "
            f"{change:.2g} nats with a later token"
        )
