"""Evaluate whole numbers, `x`, `+ - *` and parentheses with a parser: no text is executed."""

from __future__ import annotations

from collections.abc import Callable

# Bounds the depth of the recursion and the size of the numbers.
MAX_SIGNS = 64
Function = Callable[[int], int]


class ExpressionError(ValueError):
    """The text is not an expression. The message does not quote it."""


def parse(text: str) -> Function:
    """Parse a text into a function of x. Raises ExpressionError."""
    signs = "".join(text.split())
    if len(signs) > MAX_SIGNS:
        raise ExpressionError("too long")
    reader = _Reader(signs)
    function = reader.sum()
    if reader.at < len(signs):
        raise reader.error()
    return function


class _Reader:
    """A recursive-descent parser: sum -> product -> factor."""

    def __init__(self, signs: str):
        self.signs, self.at = signs, 0

    def error(self) -> ExpressionError:
        return ExpressionError(
            "unexpected end" if self.at >= len(self.signs) else f"unexpected sign {self.at + 1}"
        )

    def take(self, wanted: str) -> str:
        """Consume the next sign if it is one of `wanted`; return it, else an empty string."""
        sign = self.signs[self.at : self.at + 1]
        if not sign or sign not in wanted:
            return ""
        self.at += 1
        return sign

    def sum(self) -> Function:
        total = self.product()
        while sign := self.take("+-"):
            total = _combined(total, self.product(), sign)
        return total

    def product(self) -> Function:
        total = self.factor()
        while self.take("*"):
            total = _combined(total, self.factor(), "*")
        return total

    def factor(self) -> Function:
        if self.take("-"):
            inner = self.factor()
            return lambda x: -inner(x)
        if self.take("("):
            inner = self.sum()
            if not self.take(")"):
                raise self.error()
            return inner
        if self.take("x"):
            return lambda x: x
        digits = ""
        while digit := self.take("0123456789"):
            digits += digit
        if not digits:
            raise self.error()
        value = int(digits)
        return lambda x: value


def _combined(left: Function, right: Function, sign: str) -> Function:
    if sign == "*":
        return lambda x: left(x) * right(x)
    return (lambda x: left(x) + right(x)) if sign == "+" else (lambda x: left(x) - right(x))
