"""argparse types that reject unusable numbers before any work is done."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(text: str) -> int:
    return _parse(text, int, lambda number: number > 0, "a whole number above 0")


def seed(text: str) -> int:
    return _parse(text, int, lambda number: number >= 0, "a whole number, 0 or above")


def port(text: str) -> int:
    return _parse(text, int, lambda number: 0 <= number < 1 << 16, "a port, 0 to 65535")


def rate(text: str) -> float:
    return _parse(text, float, lambda number: 0 < number < float("inf"), "a number above 0")


def fraction(text: str) -> float:
    return _parse(text, float, lambda number: 0 <= number <= 1, "a fraction, 0 to 1")


def cutoffs(text: str) -> tuple[int, ...]:
    """Parse '5,10' into (5, 10), ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def speed(text: str) -> float | None:
    """Parse '10x' into 10.0 and 'max' into None."""
    if text == "max":
        return None
    return _parse(text.removesuffix("x"), float, lambda number: 0 < number < float("inf"), "a factor, 10x, or max")


def since(text: str) -> int:
    """Parse a date or time into milliseconds since 1970."""
    from worker.clock import date_ms

    try:
        return date_ms(text)
    except ValueError as error:
        raise ArgumentTypeError(f"'{text}': want an ISO 8601 date or time, such as 2026-01-31T12:00Z") from error


def _parse(text: str, kind: type[Number], is_valid: Callable[[Number], bool], expected: str) -> Number:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not is_valid(number):
        raise ArgumentTypeError(f"'{text}': want {expected}")
    return number
