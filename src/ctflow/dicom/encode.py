"""A data set as pydicom writes it, in bytes or in JSON; a text that occurs again and again is encoded once.

A report of a hundred findings has 7000 items with a few dozen different words, and pydicom takes half a second for it.
"""

from __future__ import annotations

import json
from struct import pack
from typing import BinaryIO

from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_data_element, write_sequence_item
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import VR

_CHARACTER_SET = 0x00080005


def save_dataset(dataset: Dataset, stream: BinaryIO) -> None:
    """Write what `dataset.save_as(stream, enforce_file_format=True)` writes.

    Args:
        dataset: With its file meta information; it is not changed.
        stream: Open for writing.
    """
    if dataset.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian:
        dataset = _with_raw_sequences(dataset)
    dataset.save_as(stream, enforce_file_format=True)


def _with_raw_sequences(dataset: Dataset) -> Dataset:
    """A copy whose sequences are bytes, as if it had been read from a file: pydicom writes them as they are."""
    raw = Dataset()
    raw.update({tag: element for tag, element in dataset.items() if element.VR != VR.SQ})
    correct_ambiguous_vr(raw, True)
    charset = dataset.get("SpecificCharacterSet")
    encodings = convert_encodings(charset) if charset else [default_encoding]
    encoder = _Encoder(encodings)
    for tag, element in dataset.items():
        if element.VR == VR.SQ:
            value = b"".join(encoder.item(item) for item in dataset[tag].value)
            raw[tag] = RawDataElement(tag, VR.SQ, len(value), value, 0, False, True)
    raw.set_original_encoding(False, True, encodings if charset else None)
    raw.file_meta, raw.preamble = dataset.file_meta, getattr(dataset, "preamble", None)
    return raw


def json_from_dataset(dataset: Dataset) -> str:
    """What `dataset.to_json()` gives: the DICOM JSON Model (PS3.18 annex F), with sorted keys."""
    return _json(dataset, {})


def _json(dataset: Dataset, known: dict[tuple[int, str], str]) -> str:
    elements = sorted((int(tag), dataset[tag] if element.is_raw else element) for tag, element in dataset.items())
    return "{" + ", ".join([f'"{tag:08X}": {_json_of_element(tag, each, known)}' for tag, each in elements]) + "}"


def _json_of_element(tag: int, element: DataElement, known: dict[tuple[int, str], str]) -> str:
    value = element.value
    if element.VR == VR.SQ:
        return '{"Value": [' + ", ".join([_json(item, known) for item in value]) + '], "vr": "SQ"}'
    if not isinstance(value, str) or _is_private(tag):
        return json.dumps(element.to_json_dict(None, 0), sort_keys=True)
    if (tag, value) not in known:
        known[tag, value] = json.dumps(element.to_json_dict(None, 0), sort_keys=True)
    return known[tag, value]


def _is_private(tag: int) -> bool:
    """Of a private tag the VR does not follow."""
    return bool(tag >> 16 & 1)


class _Encoder:
    """Items of sequences in explicit VR little endian.

    Args:
        encodings: Python's names of the character sets of their texts.
    """

    def __init__(self, encodings: list[str]) -> None:
        self._encodings = encodings
        self._known: dict[tuple[int, str], bytes] = {}

    def item(self, item: Dataset) -> bytes:
        """An item with its tag and length."""
        if _has_a_way_of_its_own(item):
            stream = _little_endian()
            write_sequence_item(stream, item, self._encodings)
            return stream.getvalue()
        elements = sorted((int(tag), element) for tag, element in item.items())
        content = b"".join([self._element(tag, element) for tag, element in elements])
        return pack("<HHL", 0xFFFE, 0xE000, len(content)) + content

    def _element(self, tag: int, element: DataElement) -> bytes:
        value = element.value
        if element.VR == VR.SQ:
            content = b"".join([self.item(item) for item in value])
            return pack("<HH2sHL", tag >> 16, tag & 0xFFFF, b"SQ", 0, len(content)) + content
        if not isinstance(value, str):
            return self._encoded(element)
        known = self._known.get((tag, value))
        if known is None:
            known = self._encoded(element)
            self._known[tag, value] = known
        return known

    def _encoded(self, element: DataElement) -> bytes:
        stream = _little_endian()
        write_data_element(stream, element, self._encodings)
        return stream.getvalue()


def _little_endian() -> DicomBytesIO:
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = False, True
    return stream


def _has_a_way_of_its_own(item: Dataset) -> bool:
    """Whether pydicom's writer has more to do for an item than to write one element after another."""
    return (
        item.original_encoding != (None, None)  # read from a file
        or _CHARACTER_SET in item
        or getattr(item, "is_undefined_length_sequence_item", False)
        or any(element.is_raw or len(element.VR) != 2 or element.is_undefined_length or _is_private(tag)
               for tag, element in item.items())
    )
