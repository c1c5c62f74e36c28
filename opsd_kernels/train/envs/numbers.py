"""Read the number that an answer ends with, exactly, in plain notation or in LaTeX's.

Fractions, mixed numbers, powers, percentages, scientific notation and thousands separators are understood. A
part of an expression that is not understood is no number: neither the 2 of a root nor the 3 of `3x`.

Not done by a library: Math-Verify 0.9.0 reads `5e-1` as 5 and `1 234` as 235, takes 0.1 and
0.10000000000000001 for equal, and needs seconds for a tower of powers. It serves `verifier=math`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

# Two letters of scripts that no answer is written in. They stand for an expression that is not understood,
# with digits (the answer is not a number if it comes last) and without (a factor, as in 3\pi).
OPAQUE, FACTOR = "\U00013000", "\U00013001"
# Lengths are bounded: a power of 10**9 digits would take hours.
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3}){1,10}(?!\d)|\d{1,40})(?:\.\d{1,40})?|\.\d{1,40})"
UNSIGNED = rf"{DIGITS}(?:[eE][-+]?\d{{1,3}})?(?:(?:\^|\*\*)[-+]?\d{{1,3}})?"
NUMBER = (
    r"(?<![\w.\\^])(?P<sign>[-+]{0,2})(?:(?P<whole>\d{1,40})\s+(?=\d{1,40}\s*/))?"
    rf"(?P<above>{UNSIGNED})(?:\s*/\s*(?P<below>{UNSIGNED}))?(?P<percent>\s*%)?(?!\w|\s*\^|\)\s*\^)"
)
CANDIDATE = re.compile(rf"{OPAQUE}|{NUMBER}")
WHOLE = re.compile(rf"\s*{NUMBER}\s*")
# A word, path or version that may contain digits. A full stop before a capital ends a sentence, not a word.
WORD = re.compile(r"(?:[\w/-]|\.(?![A-Z]))+")
WRITTEN_NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
# A rate: 5/kg.
RATE = re.compile(r"-?\d+(?:\.\d+)?/[^\W\d_]+")
# A letter, a path, two slashes, or a version.
NAME = re.compile(r"[^\W\d]|^/|/.*/|\d\.\d+\.\d")

BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])\s*")
BRACE = re.compile(r"(?<!\\)[{}]")
RELATION = re.compile(r"=|≈|\\approx(?![A-Za-z])")
# Thousands apart, which only a box shows to be one number.
GROUPED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
# What may stand beside the number in a box: words, units of one letter, currencies and punctuation.
BESIDE = re.compile(r"(?:[^\W\d_]{2,}|\b[mgshLlNJWVAKCF]\b|[\s.,:;()/'€£¥°])*")

SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
VULGAR = re.compile("(\\d?)([¼-¾⅐-⅞])")
UNITS = "mm|cm|dm|km|kg|mg|ml|mL|ms|kWh|Hz|kHz|MHz|GHz|kW|MW|kJ|Pa|kPa|GB|MB|kB|km/h|m/s|mph"
GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|pi|rho|sigma|tau|phi|omega|infty"
SCALES = {"hundred": "e2", "thousand": "e3", "million": "e6", "billion": "e9", "trillion": "e12"}
REWRITES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"[−‑]|(?<![\w)}\]])–(?=[\d.\\])", "-"),
        # Thousands: 1{,}234, 10,\!000, 1\,234, and the thin spaces of print.
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"(?<=\d)(?:\\[,;:]|\\thinspace|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
        # Delimiters, spaces, and commands that show nothing.
        (r"\\[(){}\[\]$,;: ]|\$|~|\\\\|&", " "),
        (r"\\(?:left|right|big|Big|displaystyle|quad|qquad|thinspace)(?![A-Za-z])", " "),
        (r"\\(?:begin|end|tag|label|ref|phantom|hspace|vspace)\*?\s*\{[^{}]*\}", " "),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree(?![A-Za-z])", " "),
        (r"\\%", "%"),
        (r"(?<=\d)([eE])\+(?=\d)", r"\1"),
        (r"\s*(?:\\pm|\\mp|±|∓)\s*", f" {OPAQUE}"),
        (rf"\s*\\(?:{GREEK})(?![A-Za-z])", FACTOR),
        (r"\\(?:ln|log|exp|sin|cos|tan|lg)(?![A-Za-z])\s*(?:_\s*(?:\{[^{}]*\}|\w)\s*)?", FACTOR),
        (r"\\sqrt\s*(?=\d)(\d)", r"\\sqrt{\1}"),
        (r"_\s*\{(\w{0,20})\}", r"_\1"),
        (rf"(?<=\d)(?=(?:{UNITS})(?!\w))", " "),
        # The exponent of a unit.
        (r"(?<=[^\W\d_]{2})\^\{?-?\d\}?(?!\d)|(?<=\bm)\^\{?-?\d\}?(?!\d)", ""),
    )
)
# Their argument stays; the exponent is a unit's.
SHOWN = re.compile(
    r"\\(?:text|mbox|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|bf|rm|operatorname|unit)\s*"
    r"\{([^{}]*)\}(?:\s*\^\s*\{?-?\d\}?)?"
)
EXPONENT = re.compile(r"\s*\^\s*\{\s*([-+]?\d{1,3})\s*\}|\s*\^\s*([-+]?\d)(?!\d)")
FRACTION = re.compile(
    r"(?:(?P<whole>\d)\s*)?\\[dtc]?frac\s*(?:\{(?P<above>[^{}]*)\}|(?P<top>\d))"
    r"\s*(?:\{(?P<below>[^{}]*)\}|(?P<bottom>\d))(?=(?P<next>\d)?)"
)
PERCENT = re.compile(r"(?<=\d)\s*(?:percent|per cent|pct)(?!\w)")
TIMES_TEN = re.compile(r"(?<=\d)\s*(?:[×·*]|\\times|\\cdot)\s*10\^([-+]?\d{1,3})(?!\d)")
LONE = re.compile(r"(?<![\\^_}\w])\{([^{}]*)\}")
GROUP = re.compile(
    r"\\[A-Za-z]+\*?\s*(?:\[[^\[\]{}]*\]\s*)?\{[^{}]*\}(?:\s*\{[^{}]*\})?|[\^_]\s*\{[^{}]*\}|\{[^{}]*\}"
)
# Nested braces beyond this hold no number.
DEEPEST = 64


def last_number(text: str) -> Fraction | None:
    """Return the number in the last box of a text, else its last number, exactly; None if there is none.

    A box (`\\boxed{}`, `\\fbox{}`) must hold one number and nothing else but words, units or `x =`; one that
    is not closed holds none. Digits inside names, paths and versions do not count.
    """
    box = last_box(text)
    if box is None:
        found = list(CANDIDATE.finditer(_readable(text)))
        return _value(found[-1]) if found else None
    content = re.sub(r"^([-+])\s+(?=[\d.])", r"\1", _readable(RELATION.split(box)[-1]).strip())
    if GROUPED.fullmatch(content):
        content = content.replace(" ", "")
    found = list(CANDIDATE.finditer(content))
    if len(found) != 1:
        return None
    beside = content[: found[0].start()] + " " + content[found[0].end() :]
    return _value(found[0]) if BESIDE.fullmatch(beside) else None


def last_box(text: str) -> str | None:
    """Return the content of the last box, an empty text if it is not closed, or None if there is no box."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    last = boxes[-1]
    if not text.startswith("{", last.end()):
        return re.split(r"[\s$]", text[last.end() :], maxsplit=1)[0]
    depth = 0
    for brace in BRACE.finditer(text, last.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[last.end() + 1 : brace.start()]
    return ""


def _readable(text: str) -> str:
    """Rewrite LaTeX as plain numbers and words; what is not understood becomes OPAQUE or FACTOR."""
    text = SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
    text = VULGAR.sub(_vulgar, text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    for _ in range(DEEPEST):
        before = text
        text = EXPONENT.sub(r"^\1\2", SHOWN.sub(r" \1 ", text))
        text = LONE.sub(r"\1", FRACTION.sub(_fraction, TIMES_TEN.sub(r"e\1", text)))
        if text == before:
            # From the inside: nothing else can be done with these.
            text = GROUP.sub(lambda found: OPAQUE if re.search(rf"\d|{OPAQUE}", found[0]) else FACTOR, text)
        if text == before:
            break
    else:
        return OPAQUE
    text = re.sub(rf"(?<=\d)\s*({'|'.join(SCALES)})(?!\w)", lambda found: SCALES[found[1]], text)
    return WORD.sub(_without_names, PERCENT.sub("%", text))


def _vulgar(found: re.Match[str]) -> str:
    """Write 3½ as 3 1/2."""
    whole = f"{found[1]} " if found[1] else ""
    return whole + unicodedata.normalize("NFKC", found[2]).replace("⁄", "/")


def _fraction(found: re.Match[str]) -> str:
    above, below = (
        WHOLE.fullmatch(found[long] if found[long] is not None else found[short])
        for long, short in (("above", "top"), ("below", "bottom"))
    )
    values = [None if part is None else _value(part) for part in (above, below)]
    if values[0] is None or not values[1]:
        return found[0]
    whole, after = (f"{found['whole']} " if found["whole"] else ""), (" " if found["next"] else "")
    return f"{whole}{values[0] / values[1]}{after}"


def _without_names(match: re.Match[str]) -> str:
    word = match[0].rstrip(".-/")
    if OPAQUE in word or WRITTEN_NUMBER.fullmatch(word) or RATE.fullmatch(word) or not NAME.search(word):
        return match[0]
    return " "


def _value(found: re.Match[str]) -> Fraction | None:
    if found[0] == OPAQUE:
        return None
    above, below = _unsigned(found["above"]), _unsigned(found["below"] or "1")
    if above is None or not below:
        return None
    value = above / below
    # 3 1/2; but `in step 3 7/2` is no mixed number.
    if found["whole"] and value < 1:
        value += int(found["whole"])
    if found["sign"].count("-") == 1:
        value = -value
    return value / 100 if found["percent"] else value


def _unsigned(text: str) -> Fraction | None:
    base, *power = re.split(r"\^|\*\*", text.replace(",", ""))
    value = Fraction(base)
    if not power:
        return value
    return None if value == 0 and int(power[0]) < 0 else value ** int(power[0])
