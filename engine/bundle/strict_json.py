"""Reading the manifest's JSON so strictly that nothing in it passes unnoticed.

Readers are functions of a value and of where it stands in the document; they return the value with its type known, or
raise a `BundleError` that names the place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..errors import BundleError

__all__ = [
    "Fields",
    "a_name",
    "a_number",
    "a_positive",
    "a_string",
    "an_integer",
    "an_object",
    "mapping_of",
    "mistyped",
    "optional",
    "parse",
    "refuse_duplicates",
    "tuple_of",
]

T = TypeVar("T")


class Fields:
    """The keys of one JSON object, taken one by one so that what is left over is unknown."""

    def __init__(self, value: Any, where: str) -> None:
        self._values = dict(an_object(value, where))
        self._where = where

    def take(self, key: str, read: Callable[[Any, str], T]) -> T:
        """The value of `key`, read by `read`, which must be there."""
        where = f"{self._where}.{key}" if self._where else key
        if key not in self._values:
            raise BundleError(f"manifest.json: key {where!r} is missing")
        return read(self._values.pop(key), where)

    def finish(self) -> None:
        """Refuse the keys that nobody took."""
        for key in self._values:
            where = f"{self._where}.{key}" if self._where else key
            raise BundleError(f"manifest.json: key {where!r} is unknown; the bundle was written by another version")


def parse(text: str | bytes) -> Any:
    """The document as Python values; equal keys, NaN and infinity are refused, as is what is no JSON."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    # RecursionError: a document nested thousands of levels deep. UnicodeDecodeError is a ValueError.
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"manifest.json is not valid JSON: {exc}") from exc


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; a reader that keeps the first would see another bundle.
    values = dict(pairs)
    if len(values) != len(pairs):
        refuse_duplicates("one JSON object", [key for key, _ in pairs])
    return values


def _refuse_constant(name: str) -> Any:
    raise BundleError(f"manifest.json holds {name}, which is not a JSON number")


def refuse_duplicates(where: str, names: Iterable[str]) -> None:
    """Refuse a name that occurs twice in `names`; `where` says whose names they are."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"manifest.json: {name!r} occurs twice in {where}")
        seen.add(name)


def mistyped(where: str, wanted: str, value: Any) -> BundleError:
    """The error for a value that is not what is wanted, with the value shortened."""
    shown = repr(value)
    return BundleError(
        f"manifest.json: key {where!r} must be {wanted}, not {shown[:80] + ('…' if len(shown) > 80 else '')}"
    )


def an_object(value: Any, where: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise mistyped(where or "(the document)", "an object", value)
    return value


def a_string(value: Any, where: str) -> str:
    """Any string."""
    if not isinstance(value, str):
        raise mistyped(where, "a string", value)
    return value


def a_name(value: Any, where: str) -> str:
    """A string that can be shown in one line of a terminal."""
    text = a_string(value, where)
    if not text or len(text) > 500 or not text.isprintable():
        raise mistyped(where, "a name of 1 to 500 printable characters", value)
    return text


def an_integer(value: Any, where: str) -> int:
    """An integer; a boolean is none, though Python has it so."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise mistyped(where, "an integer", value)
    return value


def a_number(value: Any, where: str) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise mistyped(where, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise mistyped(where, "a finite number", value)
    return number


def a_positive(value: Any, where: str) -> float:
    """A finite number above 0."""
    number = a_number(value, where)
    if number <= 0:
        raise mistyped(where, "a number above 0", value)
    return number


def optional(read: Callable[[Any, str], T]) -> Callable[[Any, str], T | None]:
    """A reader that takes null too."""
    return lambda value, where: None if value is None else read(value, where)


def tuple_of(read: Callable[[Any, str], T]) -> Callable[[Any, str], tuple[T, ...]]:
    """A reader of a list whose items `read` reads."""

    def read_all(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise mistyped(where, "a list", value)
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_all


def mapping_of(read: Callable[[Any, str], T]) -> Callable[[Any, str], dict[str, T]]:
    """A reader of an object with any keys, whose values `read` reads."""
    return lambda value, where: {key: read(item, f"{where}.{key}") for key, item in an_object(value, where).items()}
