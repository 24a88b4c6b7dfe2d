"""Read attributes of untrusted headers: a value of the wanted kind, or None."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.valuerep import AMBIGUOUS_VR, VR

from ctflow.compat.pydicom import values_unchecked

# Errors that pydicom raises on damaged or hostile bytes, here and when it converts values lazily.
PARSE_ERRORS = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


# VRs that depend on PixelRepresentation, or whose items depend on their context.
_BY_CONTEXT = AMBIGUOUS_VR | {VR.SQ}
_LONGEST_KEPT = 256  # bytes of a value that is cached


# Tag, VR (None if implicit), value, implicit or not, little endian or not, Python's names of the character sets.
Raw = tuple[BaseTag, str | None, bytes, bool, bool, str | tuple[str, ...]]

tag_of_number = lru_cache(2**13)(BaseTag)  # the same object for the same tag: pydicom compares them in Python


def value_of(header: Dataset, keyword: str) -> object:
    """The value as pydicom gives it; None if absent or damaged."""
    try:
        with values_unchecked():
            return header.get(keyword)
    except PARSE_ERRORS:
        return None


def header_with(keywords: Iterable[str], header: Dataset) -> Dataset:
    """These elements of a header, as far as they are there."""
    kept = Dataset()
    for keyword in keywords:
        if keyword in header:
            kept[keyword] = header[keyword]
    return kept


def text(header: Dataset, keyword: str) -> str:
    """The value as text without surrounding blanks and NULs; the first of several; "" if absent or damaged."""
    values = texts(header, keyword)
    return values[0] if values else ""


def texts(header: Dataset, keyword: str) -> tuple[str, ...]:
    """All values as text; empty if absent or damaged."""
    tag = _tag_of(keyword)
    element = None if tag is None else header.get_item(tag, keep_deferred=True)
    if tag is not None and element is None:
        return ()
    raw = _raw_of(element, header)
    return _as_texts(value_of(header, keyword)) if raw is None else _texts_of(*raw)


def raw_of(header: Dataset, keyword: str) -> Raw | None:
    """Everything that determines an element's value, if it is still raw, short and independent of its context."""
    tag = _tag_of(keyword)
    return None if tag is None else _raw_of(header.get_item(tag, keep_deferred=True), header)


def _raw_of(raw: object, header: Dataset) -> Raw | None:
    charset = header.original_character_set
    if not isinstance(raw, RawDataElement) or raw.value is None or len(raw.value) > _LONGEST_KEPT or not charset:
        return None
    names = charset if isinstance(charset, str) else tuple(charset)
    return raw.tag, raw.VR, raw.value, raw.is_implicit_VR, raw.is_little_endian, names


@lru_cache(2**12)
def _texts_of(
    tag: BaseTag, vr: str | None, value: bytes, implicit: bool, little: bool, charset: str | tuple[str, ...]
) -> tuple[str, ...]:
    """Values as text, converted once: most attributes are the same in all slices."""
    raw = RawDataElement(tag, vr, len(value), value, 0, implicit, little)
    encoding = charset if isinstance(charset, str) else list(charset)
    try:
        with values_unchecked():
            return _as_texts(convert_raw_data_element(raw, encoding=encoding).value)
    except PARSE_ERRORS:
        return ()


@lru_cache(2**10)
def _tag_of(keyword: str) -> BaseTag | None:
    """The tag of an attribute whose values depend on nothing else in its dataset; None for others."""
    tag = tag_for_keyword(keyword)
    return None if tag is None or dictionary_VR(tag) in _BY_CONTEXT else tag_of_number(tag)


def _as_texts(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    items: Sequence[object] = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
    return tuple(str(item).strip(" \0") for item in items)


def numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, or None."""
    values = texts(header, keyword)
    return _numbers_of(values) if len(values) == count else None


@lru_cache(2**12)
def _numbers_of(values: tuple[str, ...]) -> tuple[float, ...] | None:
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
    return integer_of_texts(texts(header, keyword))


def integer_of_texts(values: tuple[str, ...]) -> int | None:
    """One whole number, or None."""
    found = _numbers_of(values) if len(values) == 1 else None
    return int(found[0]) if found is not None and found[0] == int(found[0]) else None
