"""The sizes of real model heads, and one setting of the op with its inputs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..spec import KIND_NAMES, check_choice, expect
from ..testing import Case
from .internals import ChunkPlan, plan

HEADS = ("shared", "two heads")
MODES = ("trainable", "frozen", "recompute", "statistics")
PEER_DIVERGENCES = ("forward_kl", "jsd", "reverse_kl")  # implemented by other libraries as well
DEVICES = ("cpu", "cuda")
PASSES = {"trainable": 4, "frozen": 3, "recompute": 6, "statistics": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes of one head, with a name for `--shape`."""

    name: str
    N: int  # tokens
    H: int  # hidden
    V: int  # vocabulary


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", 8192, 1024, 151936),
        Shape("qwen3-8b", 8192, 4096, 151936),
        Shape("llama3-8b", 8192, 4096, 128256),
        Shape("gemma2-2b", 8192, 2304, 256000),
        Shape("cpu", 1024, 1024, 32000),
        Shape("cpu-quick", 256, 512, 16000),
        Shape("tiny", 64, 32, 501),
    )
}
# By device and whether the run is quick.
DEFAULT_SHAPES = {
    ("cpu", False): "cpu",
    ("cpu", True): "cpu-quick",
    ("cuda", False): "qwen3-8b",
    ("cuda", True): "qwen3-0.6b",
}


def parse_shape(text: str) -> Shape:
    """Return the shape of a name in SHAPES, or of sizes such as `N=1024,H=512,V=32000`."""
    if text in SHAPES:
        return SHAPES[text]
    match = re.fullmatch(r"N=(\d+),H=(\d+),V=(\d+)", text.replace(" ", ""))
    N, H, V = map(int, match.groups()) if match else (0, 0, 0)
    expect(min(N, H, V) > 0, "shape", f"one of {', '.join(SHAPES)}, or N=1024,H=512,V=32000", repr(text))
    return Shape(text, N, H, V)


@dataclass(frozen=True)
class Setting:
    """One way to call the op. `masked` is the share of tokens whose label is ignored."""

    N: int
    H: int
    V: int
    dtype: str = "bfloat16"
    head: str = "shared"
    mode: str = "trainable"
    divergence: str = "reverse_kl"
    device: str = "cpu"
    masked: float = 0.0

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        check_choice("mode", self.mode, MODES)
        check_choice("divergence", self.divergence, tuple(KIND_NAMES))
        check_choice("device", self.device, DEVICES)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the inputs."""
        return getattr(torch, self.dtype)

    @property
    def trainable(self) -> bool:
        """True where the head gets a gradient."""
        return self.mode in ("trainable", "recompute")

    @property
    def valid(self) -> int:
        """Number of valid tokens."""
        return self.N - int(self.masked * self.N)

    @property
    def flops(self) -> int:
        """Operations of the unavoidable GEMM passes, over all tokens."""
        return 2 * PASSES[self.mode] * self.N * self.H * self.V

    @property
    def bytes(self) -> int:
        """Unavoidable traffic in bytes: each input and each gradient once."""
        size = self.torch_dtype.itemsize
        heads = 1 if self.head == "shared" else 2
        gradients = self.N * self.H * (self.mode != "statistics") + self.V * self.H * self.trainable
        return size * (2 * self.N * self.H + heads * self.V * self.H + gradients)

    def plan(self, **options: Any) -> ChunkPlan:
        """Return the op's plan for the valid tokens; `options` are further arguments of `plan`."""
        return plan(
            self.valid,
            self.V,
            self.H,
            dtype=self.torch_dtype,
            shared_head=self.head == "shared",
            trainable_head=self.trainable,
            grad=self.mode != "statistics",
            backward="recompute" if self.mode == "recompute" else "in_forward",
            device_type=self.device,
            **options,
        )

    def at(self, **changes: Any) -> Setting:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON or a child process."""
        return asdict(self)


def make_case(setting: Setting, seed: int = 0) -> Case:
    """Draw random, peaked inputs; the teacher is the student with its hidden states perturbed.

    Logits have a standard deviation of about 3 and reach 16.

    The tensors are drawn on the device, in an order of random numbers of its own: drawing a head of 152k x
    4096 on a CPU takes longer than everything that is measured.
    """
    gen = torch.Generator(setting.device).manual_seed(seed)
    dtype = setting.torch_dtype

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, device=setting.device)

    weight = normal(setting.V, setting.H).mul_(3 / setting.H**0.5)
    student = normal(setting.N, setting.H)
    teacher = (student + 0.1 * normal(setting.N, setting.H)).to(dtype)
    student_weight = weight.to(dtype)
    teacher_weight = (
        student_weight
        if setting.head == "shared"
        else weight.add_(normal(setting.V, setting.H), alpha=0.05).to(dtype)
    )
    labels = None
    if setting.masked:
        labels = torch.randint(setting.V, (setting.N,), generator=gen, device=setting.device)
        labels[torch.randperm(setting.N, generator=gen, device=setting.device)[setting.valid :]] = -100
    trainable = {"statistics": (), "frozen": ("student_hidden",)}.get(
        setting.mode, ("student_hidden", "student_weight")
    )
    return Case(
        student.to(dtype),
        student_weight,
        teacher,
        teacher_weight,
        labels=labels,
        upstream=1.0,
        trainable=trainable,
    )


def labelled_case(setting: Setting) -> Case:
    """Return `make_case` with a random label for each token."""
    gen = torch.Generator(setting.device).manual_seed(1)
    labels = torch.randint(setting.V, (setting.N,), generator=gen, device=setting.device)
    return replace(make_case(setting), labels=labels)
