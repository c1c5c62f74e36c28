"""Hash the modules that decide a study's numbers, so that a page made by older code is found.

A module's hash is of its syntax tree without docstrings: a comment or a line break changes nothing. Left out
are

* the op (`_core`, `_rows`, kernels): tests hold it to a float64 reference, and a change of its rounding moves
  a run as another processor does, for which the intervals of a study are made;
* records, ranks, files of other models, and the writing of pages, which decide no number;
* environments that the study does not train on.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.settings import WHERE_NOT_WHAT

PACKAGE = "opsd_kernels"
ROOT = Path(__file__).resolve().parents[2]
TRAIN, STUDIES, ENVS = (f"{PACKAGE}.train", f"{PACKAGE}.train.studies", f"{PACKAGE}.train.envs")
COUNTED = (TRAIN, f"{PACKAGE}.objectives", f"{PACKAGE}.weights")
# `settings`: defaults are compared by their values, so that a new option makes no study old.
LEFT_OUT = (
    f"{TRAIN}.records",
    f"{TRAIN}.distributed",
    f"{TRAIN}.config.settings",
    f"{TRAIN}.config.commented_file",
    f"{TRAIN}.config.values",
    f"{TRAIN}.models.gguf_file",
    f"{TRAIN}.models.routers",
    f"{TRAIN}.sampling.vllm_engine",
    *(f"{STUDIES}.{name}" for name in ("command", "digest", "exhibits", "lab", "pages", "study")),
)
# Modules of environments without a tiny base model.
LANGUAGE_ENVS = {"python": ("python", "python_problems", "python_tests", "sandbox", "numbers")}

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def modules(roots: Iterable[str], envs: Iterable[str]) -> dict[str, str]:
    """Return the hash of each module that `roots` import, directly or not, and that counts, by name."""
    wanted = {name.rpartition(".")[2] for name in envs}
    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found or not _counts(name, wanted):
            continue
        file = _file(name)
        if file is None:
            continue
        found[name] = module_hash(file)
        todo += _imports(name, file)
    return dict(sorted(found.items()))


def changed(recorded: dict[str, str]) -> list[str]:
    """Return the recorded modules that have another hash today, or no longer exist."""
    return [
        name
        for name, value in recorded.items()
        if (file := _file(name)) is None or module_hash(file) != value
    ]


def defaults() -> dict[str, Any]:
    """Return the trainer's default settings that decide numbers."""
    return {name: value for name, value in asdict(TrainConfig()).items() if name not in WHERE_NOT_WHAT}


def changed_defaults(recorded: dict[str, Any]) -> list[str]:
    """Return the recorded settings whose default is another today. New settings do not count."""
    today = json.loads(json.dumps(defaults()))
    return [name for name, value in recorded.items() if name in today and today[name] != value]


@cache
def module_hash(file: Path) -> str:
    """Return the hash of a file's syntax tree without docstrings."""
    return hashlib.sha256(_plain(ast.parse(file.read_text())).encode()).hexdigest()[:12]


def _plain(value: object) -> str:
    """Write a syntax tree without docstrings and empty fields.

    `ast.dump` writes the same tree in other words from one version of Python to the next.
    """
    if isinstance(value, list):
        return "[" + ",".join(map(_plain, value)) + "]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = {name: field for name, field in ast.iter_fields(value) if field not in (None, [])}
    if isinstance(value, DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return f"{type(value).__name__}({','.join(f'{name}={_plain(field)}' for name, field in fields.items())})"


def env_modules(env: str) -> list[str]:
    """Return the modules of an environment of the trainer."""
    # Imported here, since transformers takes seconds to load.
    from opsd_kernels.train.models.warmstart import OWN_SOURCES

    if env in OWN_SOURCES:
        return [module.__name__ for module in OWN_SOURCES[env]]
    return [f"{ENVS}.{name}" for name in LANGUAGE_ENVS[env]]


def _counts(name: str, envs: set[str]) -> bool:
    if not _inside(name, COUNTED) or _inside(name, LEFT_OUT):
        return False
    return not name.startswith(f"{ENVS}.") or name.split(".")[3] in {"base", *envs}


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _file(name: str) -> Path | None:
    path = ROOT.parent.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


@cache
def _imports(name: str, file: Path) -> tuple[str, ...]:
    """Return the names that a module imports, which may be modules or members of modules."""
    found: list[str] = []
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(found)
