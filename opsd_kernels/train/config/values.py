"""Read settings from files and `key=value` texts, and check their types."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A key or value that the configuration does not allow.

    The message names the key, what was expected and what came.
    """


def expect(condition: bool, key: str, expected: str, got: Any, hint: str = "") -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}{hint}")


def nearest(name: Any, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def expect_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    expect(value in choices, key, "one of " + ", ".join(choices), value, nearest(value, choices))


def check_key(key: str, known: typing.Iterable[str]) -> None:
    known = tuple(known)
    if key not in known:
        raise ConfigError(
            f"unknown config key {key!r}{nearest(key, known)}; the keys are " + ", ".join(known)
        )


def check_type(key: str, value: Any, kind: Any) -> None:
    members = _members(kind)
    # type() and not isinstance(), since a bool is an int.
    right = type(value) in members or (float in members and type(value) is int)
    expect(right and not (isinstance(value, float) and not math.isfinite(value)), key, _describe(kind), value)


def parse_value(text: str, kind: Any) -> Any:
    """Return the value of `--set key=text`, parsed as the key's type, so that `model=7` stays a string."""
    members = _members(kind)
    if types.NoneType in members and text.lower() in ("null", "none"):
        return None
    if str in members:
        return text
    if bool in members:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float):
        try:
            if number in members or (number is int and float in members):
                return number(text)
        except ValueError:
            continue
    return text


def read_file(path: Path) -> dict[str, Any]:
    expect(path.is_file(), "config", "an existing JSON or YAML file", path)
    try:
        if path.suffix in (".yaml", ".yml"):
            values = _read_yaml(path.read_text())
        else:
            values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"config: expected valid JSON or YAML in {path} (YAML files end in .yaml), got {error}"
        ) from error
    expect(
        isinstance(values, dict), "config", f"a mapping of keys to values in {path}", type(values).__name__
    )
    return values


def _read_yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError for invalid text."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "config: expected a JSON file, as PyYAML is not installed; got a YAML file"
        ) from error

    class Loader(yaml.SafeLoader):
        """Reads 1e-6 as a number, as YAML 1.2 does; in PyYAML's YAML 1.1 it is text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _members(kind: Any) -> tuple[type, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _describe(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
        types.NoneType: "null",
    }
    return " or ".join(names[member] for member in _members(kind))
