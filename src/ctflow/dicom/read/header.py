"""A header's dataset from the walk that looked for damage: what pydicom would read, without a second parse.

Gain: a folder of 300 files is scanned in 0.076 s; with `pydicom.dcmread` after the same walk, in 0.150 s (2.0
times; benchmarks/own_code.py headers, 2026-11-29: AMD EPYC, 2 cores at a load of 2.4, Python 3.11.7, pydicom 3.0.2).
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import BinaryIO, cast

import pydicom
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import data_element_generator
from pydicom.tag import BaseTag
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from ctflow.dicom.attributes import PARSE_ERRORS, tag_of_number
from ctflow.dicom.read.structure import Element, Layout

_UNDEFINED = 0xFFFFFFFF
_GROUP_LENGTH, _SYNTAX, _CHARACTER_SET = 0x00020000, 0x00020010, 0x00080005
_LEAST_GROUP = 0x0003  # of a data set's own elements: lower groups are commands or misplaced meta information
_SYNTAXES = frozenset(AllTransferSyntaxes) - {DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian}
_Elements = dict[BaseTag, RawDataElement | DataElement]


def read_header(stream: BinaryIO, layout: Layout, *, force: bool) -> Dataset | None:
    """Read a whole header, an unusual one by pydicom.

    Args:
        stream: The file; its position afterwards is undefined.
        layout: The layout of the file.
        force: Whether the file has no preamble.

    Returns:
        The dataset, as by `header_of_layout`; None if pydicom does not end where the walk did.

    Raises:
        One of PARSE_ERRORS: pydicom cannot read it.
    """
    header = None if force else header_of_layout(stream, layout)
    if header is not None:
        return header
    stream.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about damage and quotes paths; the relevant checks are here
        header = pydicom.dcmread(stream, stop_before_pixels=True, force=force)
    is_sure = layout.syntax == DeflatedExplicitVRLittleEndian or stream.tell() == layout.end
    return header if is_sure else None


def header_of_layout(stream: BinaryIO, layout: Layout) -> Dataset | None:
    """Read a whole header as `pydicom.dcmread(stream, stop_before_pixels=True)` does.

    Args:
        stream: The file; its position afterwards is undefined.
        layout: The layout of the file, which has a preamble.

    Returns:
        The dataset with its file_meta; values are converted on access, as in pydicom. None where pydicom guesses, or
        may find other damage than the walk: the caller must then use pydicom itself.

    Raises:
        One of PARSE_ERRORS: The character set is damaged, as in pydicom.
    """
    values = _Values(stream, layout.window)
    if not _is_usual(layout, values):
        return None
    implicit = layout.syntax == ImplicitVRLittleEndian
    elements: _Elements = {}
    encoding: str | list[str] = default_encoding
    for element in layout.elements:
        tag, _, length, _, _ = element
        if length == _UNDEFINED:
            found = _sequence(stream, element, implicit, encoding)
            if found is None:
                return None
            elements[tag_of_number(tag)] = found
            continue
        elements[tag_of_number(tag)] = raw = _raw(element, values, implicit)
        if tag == _CHARACTER_SET:
            encoding = list(_encodings(raw.VR, raw.value))
    header = Dataset(elements)
    meta: _Elements = {tag_of_number(element[0]): _raw(element, values, implicit=False) for element in layout.meta}
    header.file_meta = FileMetaDataset(meta)
    header.file_meta.set_original_encoding(False, True, default_encoding)
    header.set_original_encoding(implicit, True, encoding)
    return header


class _Values:
    """Values by offset, from the window if they lie in it."""

    def __init__(self, stream: BinaryIO, window: bytes) -> None:
        self._stream = stream
        self._window = window

    def __call__(self, start: int, end: int) -> bytes:
        if end <= len(self._window):
            return self._window[start:end]
        self._stream.seek(start)
        return self._stream.read(end - start)


def _is_usual(layout: Layout, values: _Values) -> bool:
    """Whether pydicom also reads the file by its meta information."""
    if layout.notes or not layout.meta or not layout.elements or layout.syntax not in _SYNTAXES:
        return False
    if layout.meta[0][:3] != (_GROUP_LENGTH, b"UL", 4):
        return False
    named = [values(at, end).rstrip(b"\0") for tag, vr, _, at, end in layout.meta if (tag, vr) == (_SYNTAX, b"UI")]
    tag, _, length, _, _ = layout.elements[0]
    if named != [layout.syntax.encode()] or tag >> 16 < _LEAST_GROUP:
        return False
    # pydicom takes bytes that could be letters of a VR for one, even where the VR should be implicit.
    has_letters = all(0x40 < byte < 0x5B for byte in (length & 0xFF, length >> 8 & 0xFF))
    return layout.syntax != ImplicitVRLittleEndian or not has_letters


def _raw(element: Element, values: _Values, implicit: bool) -> RawDataElement:
    tag, letters, length, at, end = element
    vr = None if implicit else letters.decode()
    value = values(at, end) if length else cast(bytes | None, empty_value_for_VR(vr, raw=True))
    return RawDataElement(tag_of_number(tag), vr, length, value, at, implicit, True)


def _sequence(
    stream: BinaryIO, element: Element, implicit: bool, encoding: str | list[str]
) -> RawDataElement | DataElement | None:
    """An element of undefined length, which pydicom converts at once; None if it ends elsewhere than in the walk."""
    tag, _, _, at, end = element
    stream.seek(at - (8 if implicit else 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damage; they may quote values
        try:
            found = next(data_element_generator(stream, implicit, True, encoding=encoding))
        except (*PARSE_ERRORS, StopIteration):
            return None
    return found if stream.tell() == end and tag != _CHARACTER_SET else None


@lru_cache(64)
def _encodings(vr: str | None, value: bytes | None) -> tuple[str, ...]:
    """Python's names of a SpecificCharacterSet."""
    raw = RawDataElement(BaseTag(_CHARACTER_SET), vr, len(value or b""), value, 0, vr is None, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown names
        return tuple(convert_encodings(convert_raw_data_element(raw).value))
