"""Reads a received header, writes the file meta information before it, and detects duplicate instances.

The same instance in another transfer syntax is a duplicate; another instance must not be mistaken for one.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow import __version__
from ctflow.compat.pydicom import lenient
from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.dicom.read.header import read_header
from ctflow.dicom.read.structure import LARGEST_HEADER, layout_of_header
from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.journal.records import Patient

IMPLEMENTATION_VERSION = f"CTFLOW_{__version__}"[:16]
_LONGEST_UID = 64
_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber")
# These differ only in how a VR is written. For the others pixels must be decoded, which the node's own process does not
# do with data from a peer (`comparer`).
COMPARABLE = frozenset({str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian)})
_PADDING = 0xFFFCFFFC  # DataSetTrailingPadding


def whole_number(value: str) -> int | None:
    """An integer string (PS3.5 6.2, IS), or None."""
    return int(value) if re.fullmatch(r"[+-]?[0-9]{1,12}", value) else None


def is_usable(uid: str) -> bool:
    """Whether a UID can be stored and compared; many real ones are not well formed."""
    return 0 < len(uid) <= _LONGEST_UID and uid.isascii() and uid.isprintable()


def patient_of_header(header: Dataset) -> Patient:
    """The patient in the header."""
    return Patient(*(text(header, keyword) for keyword in _PATIENT))


@lenient()
def file_meta(sop_class_uid: str, sop_instance_uid: str, transfer_syntax: str) -> bytes:
    """Preamble and file meta information (PS3.10 7.1), for an instance whose UID `is_usable`."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class_uid), UID(sop_instance_uid)
    meta.TransferSyntaxUID = UID(transfer_syntax)
    meta.ImplementationClassUID, meta.ImplementationVersionName = IMPLEMENTATION_UID, IMPLEMENTATION_VERSION
    stream = DicomBytesIO()
    stream.write(bytes(128) + b"DICM")
    write_file_meta_info(stream, meta)
    return stream.getvalue()


@lenient()
def header_of_object(meta: bytes, data: memoryview, transfer_syntax: str) -> Dataset | str:
    """Read the header of a received object, as that of a file in a folder.

    Args:
        meta: Its preamble and file meta information.
        data: Its encoded data set.
        transfer_syntax: Of the data set.

    Returns:
        The header; or a sentence that describes its flaw, without values of the object.
    """
    if transfer_syntax != DeflatedExplicitVRLittleEndian:
        data = data[: LARGEST_HEADER + 2**16]  # an Enhanced CT has up to 500 MB of pixels, which are not needed
    stream = BytesIO(b"".join((meta, data)))
    layout = layout_of_header(stream, preamble=True)
    if isinstance(layout, str):
        return layout
    try:
        header = read_header(stream, layout, force=False)
    except PARSE_ERRORS as error:
        return f"damaged header ({type(error).__name__})"
    return "damaged header (it can be read in more than one way)" if header is None else header


@lenient()
def is_same_in_other_syntax(kept: Path, kept_syntax: str, came: bytes, came_syntax: str) -> bool:
    """Whether two files hold the same attributes with the same values, pixels among them.

    Args:
        kept: A DICOM file.
        kept_syntax: Its transfer syntax.
        came: The content of another DICOM file.
        came_syntax: Its transfer syntax.

    Returns:
        Also False where this is unknown: only the uncompressed little endian syntaxes are compared.
    """
    if not {kept_syntax, came_syntax} <= COMPARABLE:
        return False
    try:
        return is_same_dataset(pydicom.dcmread(kept), pydicom.dcmread(BytesIO(came)))
    except PARSE_ERRORS:
        return False


def is_same_dataset(one: Dataset, other: Dataset, *, swapped: bool = False) -> bool:
    """Whether two data sets have the same attributes with the same values; `swapped` if only one is big endian."""
    tags = [
        {tag for tag in each.keys() if tag.element != 0 and tag != _PADDING}  # noqa: SIM118  # group lengths follow
        for each in (one, other)
    ]
    return tags[0] == tags[1] and all(_is_same_value(one, other, tag, swapped=swapped) for tag in tags[0])


def _is_same_value(one: Dataset, other: Dataset, tag: Any, *, swapped: bool) -> bool:
    raw, its = one.get_item(tag), other.get_item(tag)
    if not swapped and isinstance(raw, RawDataElement) and isinstance(its, RawDataElement) and raw.value == its.value:
        return True
    element, its_element = one[tag], other[tag]
    if element.VR == its_element.VR == "SQ":
        pairs = zip(element.value, its_element.value, strict=False)
        return len(element.value) == len(its_element.value) and all(
            is_same_dataset(*pair, swapped=swapped) for pair in pairs
        )
    if swapped and element.VR == its_element.VR == "OW" and len(element.value) % 2 == 0:  # pydicom leaves their bytes
        swapped_bytes = bytearray(element.value)
        swapped_bytes[::2], swapped_bytes[1::2] = element.value[1::2], element.value[::2]
        return bool(bytes(swapped_bytes) == its_element.value)
    return bool(element.value == its_element.value)
