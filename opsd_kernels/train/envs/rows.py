"""Read the rows of a data file: JSON Lines, or one JSON array, in any encoding that JSON allows.

Every fault is collected with its line, so that one error names all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_kernels.train.config import ConfigError

# Faults that an error lists.
LISTED = 50
# Characters of a value that an error quotes.
QUOTED = 80
# Between two values. A mark of byte order may stand in the middle where files were joined.
SPACE = re.compile(r"[\s\ufeff]*")
# A byte that is not UTF-8, as Python's `surrogateescape` keeps it.
RAW_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Fault:
    """A row that the run cannot use: its line, what was expected there, and what came."""

    line: int
    expected: str
    got: str


def read(path: Path) -> tuple[list[tuple[int, Any]], list[Fault]]:
    """Return the values of a file, each with its line, and the faults of lines that are not JSON.

    Raises ConfigError for a file that cannot be read.
    """
    if not path.is_file():
        raise ConfigError(f"data: expected an existing JSONL file, got {str(path)!r}")
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"data: expected a readable file, got {str(path)!r}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: expected UTF-8, UTF-16 or UTF-32 in {path}, got {error}") from error
    values: list[tuple[int, Any]] = []
    faults: list[Fault] = []
    for line, value in _elements(text) if _is_array(text) else _lines(text):
        if isinstance(value, Fault):
            faults.append(value)
        else:
            values.append((line, value))
    return values, faults


def error_of(path: Path, faults: Sequence[Fault]) -> ConfigError:
    """Return the error that names each fault with file and line, up to LISTED of them."""
    told = [
        f"expected {fault.expected} in {path}, line {fault.line}, got {fault.got}"
        for fault in sorted(faults, key=lambda fault: fault.line)
    ]
    if len(told) == 1:
        return ConfigError(f"data: {told[0]}")
    more = [f"and {len(told) - LISTED} more"] if len(told) > LISTED else []
    return ConfigError("\n  ".join([f"data: {len(told)} bad rows:", *told[:LISTED], *more]))


def quoted(value: Any) -> str:
    """Return the value as an error shows it, shortened."""
    text = repr(value)
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."


def _decoded(data: bytes) -> str:
    encoding = json.detect_encoding(data)
    # In UTF-8 a wrong byte is kept, so that its line is named among the others.
    text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    # A string in JSON holds no line break, so these are the ends of lines alone; U+2028 and U+0085 are not.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield each value with its line, or a Fault in its place; after a fault the next line is read."""
    at, line, counted = 0, 1, 0
    while (start := _end(SPACE, text, at)) < len(text):
        line, counted = line + text.count("\n", counted, start), start
        value, at = _value(text, start, line)
        yield line, value
        if isinstance(value, Fault):
            at = text.find("\n", start)
            if at < 0:
                return


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the elements of the array as `_lines` does its values, up to the first fault."""
    line, counted = 1, 0
    at = _end(SPACE, text, _end(SPACE, text, 0) + 1)
    while text[at : at + 1] != "]":
        start = _end(SPACE, text, at)
        line, counted = line + text.count("\n", counted, start), start
        value, end = _value(text, start, line)
        yield line, value
        if isinstance(value, Fault):
            return
        at = _end(SPACE, text, end)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] not in (",", "]"):
            got = quoted(text[at]) if at < len(text) else "the end of the file"
            yield line, Fault(line, "a comma or the end of the array", got)
            return
        at += text[at] == ","
    rest = _end(SPACE, text, at + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        yield line, Fault(line, "the end of the file after the array", quoted(text[rest]))


def _value(text: str, start: int, line: int) -> tuple[Any, int]:
    """Return the value at `start`, or a Fault, and its end."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        return _syntax_fault(text, start, line, error), start
    wrong = RAW_BYTE.search(text, start, end)
    return (_byte_fault(line, wrong[0]) if wrong else value), end


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _is_array(text: str) -> bool:
    """True for a file that is one array; a first line that is one among others is a row."""
    start = _end(SPACE, text, 0)
    if not text.startswith("[", start):
        return False
    end = text.find("\n", start)
    try:
        json.loads(text[start:] if end < 0 else text[start:end])
    except (ValueError, RecursionError):
        return True
    return end < 0 or not text[end:].strip()


def _syntax_fault(text: str, start: int, line: int, error: Exception) -> Fault:
    end = text.find("\n", start)
    wrong = RAW_BYTE.search(text, start, len(text) if end < 0 else end)
    if wrong:
        return _byte_fault(line, wrong[0])
    if isinstance(error, json.JSONDecodeError):
        place = "" if error.lineno == line else f"line {error.lineno}, "
        return Fault(line, "a JSON object", f"{error.msg.removesuffix(' at')} at {place}column {error.colno}")
    if isinstance(error, RecursionError):
        return Fault(line, "a JSON object", "values nested too deeply")
    return Fault(line, "a JSON object", str(error))


def _byte_fault(line: int, escaped: str) -> Fault:
    return Fault(
        line, "UTF-8 (or UTF-16 or UTF-32 in the whole file)", f"the byte 0x{ord(escaped) - 0xDC00:02x}"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return row


def _refused(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text}, which is beyond a double")
    return number


DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_constant=_refused, parse_float=_finite
)
