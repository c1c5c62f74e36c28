"""The JSON of committed reports: the top level is indented, and each record of a list takes one line.

A later run then differs record by record.
"""

from __future__ import annotations

import json
from typing import Any

# In characters. A value that is not a record stays on one line up to WIDTH. A record stays on one line at any
# length, unless it is longer than LONG and holds records of its own, such as a table with its rows: one panel
# of a figure takes 78,000 characters.
WIDTH, LONG = 160, 480


def dumps(report: Any) -> str:
    """Return `report` as JSON that ends in a newline; `json.loads` gives back an equal value."""
    return _layout(report, 1, top=True) + "\n"


def _layout(value: Any, depth: int, top: bool = False) -> str:
    """Return the text of `value`; children on lines of their own are indented by `depth` spaces."""
    line = json.dumps(value)
    if isinstance(value, dict) and value and (top or len(line) > WIDTH):
        return _lines(
            "{}",
            [f"{json.dumps(str(name))}: {_layout(part, depth + 1)}" for name, part in value.items()],
            depth,
        )
    if isinstance(value, list | tuple) and _is_list_of_records(value):
        return _lines(
            "[]",
            [_layout(part, depth + 1) if _holds_records(part) else json.dumps(part) for part in value],
            depth,
        )
    if isinstance(value, list | tuple) and len(line) > WIDTH and all(isinstance(part, str) for part in value):
        return _lines("[]", [json.dumps(part) for part in value], depth)
    return line


def _lines(brackets: str, parts: list[str], depth: int) -> str:
    return (
        f"{brackets[0]}\n{' ' * depth}"
        + f",\n{' ' * depth}".join(parts)
        + f"\n{' ' * (depth - 1)}{brackets[1]}"
    )


def _is_list_of_records(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(part, dict | list | tuple) for part in value)
    )


def _holds_records(record: Any) -> bool:
    """Return whether a record is broken into lines: it is long and holds a list of records."""
    return (
        isinstance(record, dict)
        and any(map(_is_list_of_records, record.values()))
        and len(json.dumps(record)) > LONG
    )
