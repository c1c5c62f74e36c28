"""Rows of measurements, and the report that holds them with all that a reader needs to run them again. JSON in and out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from .timing import Sample

SCHEMA = 1
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "opsd_kernels")


@dataclass(frozen=True)
class Row:
    """One number or curve point. `reason` is why there is none. Fields that do not apply are None."""

    suite: str
    provider: str
    N: int
    H: int
    V: int
    dtype: str
    head: str
    mode: str
    divergence: str
    variant: str = ""  # what the suite varies beside these: KL, masked share, scheme, sweep, part of a step
    reason: str | None = None
    ms: Sample | None = None
    ratio: Sample | None = None  # to `base`, round by round
    base: str | None = None
    whole: float | None = None  # ratio to the GEMMs in chunks as large as pays, whatever the planner cuts
    noise: str | None = None  # why the ratio is not to be believed within 10 %
    target: float | None = None  # for the ratio
    tflops: float | None = None  # of the GEMM passes that cannot be avoided
    gbs: float | None = None  # of the traffic that cannot be avoided
    ceiling: float | None = None  # share of the nearer ceiling, GEMM rate or copy bandwidth
    peak_bytes: int | None = None  # above what was live before the call
    predicted_bytes: int | None = None
    gradient_error: float | None = None  # relative, against float64
    loss_error: float | None = None
    rows: int | None = None  # per chunk, as planned

    @property
    def key(self) -> tuple:
        """What makes two rows the same measurement."""
        return tuple(getattr(self, name) for name in ("suite", "provider", "N", "H", "V", "dtype", "head", "mode", "divergence", "variant"))

    @property
    def verdict(self) -> str | None:
        if self.target is None or self.ratio is None:
            return None
        if self.noise:
            return "unknown: too noisy"
        return "ok" if self.ratio.median <= self.target else "missed"


@dataclass
class Report:
    """What one run of `opsd bench` measured, where and how."""

    machine: dict[str, object]
    versions: dict[str, str | None]
    commit: str
    command: str
    date: str
    quick: bool
    suites: list[str]
    seconds: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype, bytes/s of a copy
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def where(self) -> str:
        """One line: machine, versions, commit."""
        m, shown = self.machine, ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"{m['name']}; {shown}; commit {self.commit[:12]}; {self.date}"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {key: value for key, value in asdict(self).items() if key != "rows"}
        lines = ",\n  ".join(json.dumps(_row_dict(row)) for row in self.rows)  # one row per line: a later run shows as a readable diff
        path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


def _rounded(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _row_dict(row: Row) -> dict[str, object]:
    out = {}
    for name, value in asdict(row).items():
        if value is not None and value != "":
            out[name] = {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else _rounded(value)
    return out


def load(path: Path) -> Report:
    """Raises ValueError for a file of another kind or schema."""
    data = json.loads(Path(path).read_text())
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: expected a report of opsd bench with schema {SCHEMA}, got {found}")
    known = {f.name for f in fields(Row)}
    rows = [{name: Sample(**value) if name in ("ms", "ratio") else value for name, value in row.items() if name in known} for row in data.pop("rows")]
    return Report(**data, rows=[Row(**row) for row in rows])


# ---------------------------------------------------------------- where it ran


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str:
    """The commit of this package's sources, `-dirty` where the kernels or the op differ from it; `unknown` in a copy without git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:
        commit = ""
    if not commit:
        return "unknown"
    return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", "opsd_kernels", "csrc") else "")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def describe_machine(device: str) -> dict[str, object]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "capability": capability, "memory_bytes": _memory_bytes()}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        own = {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count, "cuda": torch.version.cuda}
        return {"name": name, **own, **cpu}
    return {"name": f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {capability}", **cpu, "load_before": load}


def new_report(device: str, command: str, quick: bool, suites: list[str], commit: str | None = None) -> Report:
    versions = {package: package_version(package) for package in PACKAGES}
    return Report(describe_machine(device), versions, commit or git_commit(), command, time.strftime("%Y-%m-%d"), quick, suites)
