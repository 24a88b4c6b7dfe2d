"""Attributes of headers that may hold anything: a value of the wanted kind, or None."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue

# What pydicom raises on damaged or hostile bytes, here and on its lazy conversion of values.
PARSE_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    MemoryError,
    struct.error,
    zlib.error,
)


def value_of(header: Dataset, keyword: str) -> object:
    """The value as pydicom gives it; None if absent or damaged."""
    try:
        return header.get(keyword)
    except PARSE_ERRORS:
        return None


def text(header: Dataset, keyword: str) -> str:
    """The value as text without surrounding blanks and NULs; the first of several; "" if absent or damaged."""
    values = texts(header, keyword)
    return values[0] if values else ""


def texts(header: Dataset, keyword: str) -> tuple[str, ...]:
    """All values as text; empty if absent or damaged."""
    value = value_of(header, keyword)
    if value is None:
        return ()
    items: Sequence[object] = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
    return tuple(str(item).strip(" \0") for item in items)


def numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, or None."""
    values = texts(header, keyword)
    if len(values) != count:
        return None
    try:
        found = tuple(float(value) for value in values)
    except ValueError:
        return None
    return found if all(math.isfinite(value) for value in found) else None


def number(header: Dataset, keyword: str) -> float | None:
    """One finite number, or None."""
    found = numbers(header, keyword, 1)
    return found[0] if found else None


def integer(header: Dataset, keyword: str) -> int | None:
    """One whole number, or None."""
    found = number(header, keyword)
    return int(found) if found is not None and found == int(found) else None
