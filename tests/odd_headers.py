"""Ways of encoding a CT slice that the standard does not allow, each out of bug reports of other readers.

`FORMS` is the table. Each makes the content of a file out of a plain one (Explicit VR Little Endian, native pixels),
and says what is noted when it is read.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.dicom.read.structure import Note

_META = 132
_PIXELS = struct.pack("<HH2s", 0x7FE0, 0x0010, b"OW")
LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL", b"OV")
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True)
class Form:
    """One way of encoding.

    Attributes:
        name: As the table of docs/dicom.md has it.
        write: Content of a plain file -> content in this form.
        notes: What reading it notes.
        itk: Whether SimpleITK also reads it; pydicom reads all.
    """

    name: str
    write: Callable[[bytes], bytes]
    notes: frozenset[Note]
    itk: bool


def element(group: int, number: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An explicit little-endian element."""
    length = len(value) if length is None else length
    if vr in LONG:
        return struct.pack("<HH2sHL", group, number, vr, 0, length) + value
    return struct.pack("<HH2sH", group, number, vr, length) + value


def implicit(group: int, number: int, value: bytes) -> bytes:
    """An implicit little-endian element."""
    return struct.pack("<HHL", group, number, len(value)) + value


def sequence_items(content: bytes) -> bytes:
    """An item of undefined length with this content, and the sequence's end."""
    ends = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return struct.pack("<HHL", 0xFFFE, 0xE000, _UNDEFINED) + content + ends


def parts(content: bytes) -> tuple[bytes, bytes, bytes]:
    """Preamble and prefix, meta information, data set."""
    end = 144 + struct.unpack("<L", content[140:144])[0]
    return content[:_META], content[_META:end], content[end:]


def encoded_as(content: bytes, syntax: str) -> tuple[bytes, bytes]:
    """Meta information and data set of a plain file in another native transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = uid = UID(syntax)
    stream = io.BytesIO()
    encoding = {"implicit_vr": uid.is_implicit_VR, "little_endian": uid.is_little_endian}
    pydicom.dcmwrite(stream, dataset, **encoding, force_encoding=True)
    return parts(stream.getvalue())[1:]


def _implicit_meta(meta: bytes) -> bytes:
    position, elements = 0, []
    while position < len(meta):
        group, number, vr, length = struct.unpack_from("<HH2sH", meta, position)
        position += 8
        if vr in LONG:
            (length,) = struct.unpack_from("<L", meta, position)
            position += 4
        if number:
            elements.append(implicit(group, number, meta[position : position + length]))
        position += length
    body = b"".join(elements)
    return implicit(0x0002, 0x0000, struct.pack("<L", len(body))) + body


def made_of(change: Callable[[bytes, bytes], bytes], syntax: str | None = None) -> Callable[[bytes], bytes]:
    """A form by what becomes of meta information and data set, which are encoded in another native syntax before."""

    def write(content: bytes) -> bytes:
        preamble, meta, dataset = parts(content)
        if syntax is not None:
            meta, dataset = encoded_as(content, syntax)
        return preamble + change(meta, dataset)

    return write


def before_pixels(extra: bytes) -> Callable[[bytes], bytes]:
    """Elements put in front of the pixel data."""

    def write(content: bytes) -> bytes:
        at = content.rindex(_PIXELS)
        return content[:at] + extra + content[at:]

    return write


def padded(excess: bytes) -> Callable[[bytes], bytes]:
    """Bytes behind the pixels, within their element."""

    def write(content: bytes) -> bytes:
        at = content.rindex(_PIXELS) + 8
        (length,) = struct.unpack_from("<L", content, at)
        return content[:at] + struct.pack("<L", length + len(excess)) + content[at + 4 :] + excess

    return write


def under_meta_of(syntax: str, dataset_syntax: str) -> Callable[[bytes], bytes]:
    """A data set in one native syntax under the meta information of another."""

    def write(content: bytes) -> bytes:
        return parts(content)[0] + encoded_as(content, syntax)[0] + encoded_as(content, dataset_syntax)[1]

    return write


def _rows_twice(content: bytes) -> bytes:
    rows = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True).Rows
    return before_pixels(element(0x0028, 0x0010, b"US", struct.pack("<H", rows)))(content)


_CODE = ((0x0100, b"SH", b"24627-2 "), (0x0102, b"SH", b"LN"), (0x0104, b"LO", b"CT chest"))
_EXPLICIT_ITEM = sequence_items(b"".join(element(0x0008, number, vr, value) for number, vr, value in _CODE))
_IMPLICIT_ITEM = sequence_items(b"".join(implicit(0x0008, number, value) for number, _, value in _CODE))
_FRAGMENTS = (
    implicit(0xFFFE, 0xE000, b"") + implicit(0xFFFE, 0xE000, b"\xff\xd8\xff\xd9") + implicit(0xFFFE, 0xE0DD, b"")
)
_ICON = element(0x7FE0, 0x0010, b"OB", _FRAGMENTS, _UNDEFINED)
_CREATOR, _PRIVATE = element(0x0029, 0x0010, b"LO", b"VENDOR"), element(0x0029, 0x1005, b"LO", b"ABCD")
_EARLIER = element(0x0019, 0x0010, b"LO", b"VENDOR") + element(0x0019, 0x1003, b"LO", b"ABCD")


def _form(name: str, write: Callable[[bytes], bytes], *notes: Note, itk: bool = True) -> Form:
    return Form(name, write, frozenset(notes), itk)


FORMS: tuple[Form, ...] = (
    _form(
        "meta information in Implicit VR",
        made_of(lambda meta, dataset: _implicit_meta(meta) + dataset),
        Note.IMPLICIT_META,
    ),
    _form(
        "meta information and data set in Implicit VR",
        made_of(lambda meta, dataset: _implicit_meta(meta) + dataset, ImplicitVRLittleEndian),
        Note.IMPLICIT_META,
    ),
    _form(
        "DICM and no meta information, Explicit VR",
        made_of(lambda _, dataset: dataset),
        Note.NO_META,
    ),
    _form(
        "DICM and no meta information, Implicit VR",
        made_of(lambda _, dataset: dataset, ImplicitVRLittleEndian),
        Note.NO_META,
    ),
    _form(
        "DICM and no meta information, big endian",
        made_of(lambda _, dataset: dataset, ExplicitVRBigEndian),
        Note.NO_META,
    ),
    _form(
        "Explicit VR declared as Implicit VR",
        under_meta_of(ImplicitVRLittleEndian, ExplicitVRLittleEndian),
        Note.OTHER_VR,
        itk=False,
    ),
    _form(
        "Implicit VR declared as Explicit VR",
        under_meta_of(ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        Note.OTHER_VR,
    ),
    _form(
        "UN of undefined length with items in Explicit VR",
        before_pixels(element(0x0029, 0x1002, b"UN", _EXPLICIT_ITEM, _UNDEFINED)),
        Note.EXPLICIT_UN,
    ),
    _form(
        "UN of undefined length with items in Implicit VR",
        before_pixels(element(0x0029, 0x1002, b"UN", _IMPLICIT_ITEM, _UNDEFINED)),
    ),
    _form(
        "a sequence with items in Implicit VR",
        before_pixels(element(0x0029, 0x1002, b"SQ", _IMPLICIT_ITEM, _UNDEFINED)),
        Note.WITHOUT_VR,
    ),
    _form(
        "an icon with compressed pixels",
        before_pixels(element(0x0088, 0x0200, b"SQ", sequence_items(_ICON), _UNDEFINED)),
    ),
    _form(
        "a private element without VR",
        before_pixels(implicit(0x0029, 0x1005, b"ABCD")),
        Note.WITHOUT_VR,
    ),
    _form("private elements out of order", before_pixels(_PRIVATE + _EARLIER), Note.DISORDER),
    _form(
        "a private element twice",
        before_pixels(_CREATOR + _PRIVATE + element(0x0029, 0x1005, b"LO", b"OTHER ")),
        Note.TWICE,
    ),
    _form(
        "a private element twice in an item",
        before_pixels(element(0x0029, 0x1002, b"SQ", sequence_items(_CREATOR + _PRIVATE + _PRIVATE), _UNDEFINED)),
        Note.TWICE,
    ),
    _form(
        "an element out of order",
        before_pixels(element(0x0018, 0x0022, b"CS", b"AXIAL ")),
        Note.DISORDER,
    ),
    _form("Rows twice, the same", _rows_twice, Note.TWICE),
    _form(
        "elements of group 0002 in the data set",
        made_of(lambda meta, dataset: meta + element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2\0") + dataset),
        Note.META_IN_DATA_SET,
    ),
    _form("bytes after the pixel data", lambda content: content + bytes(77), Note.BYTES_BEHIND, itk=False),
    _form("trailing padding in the pixel data", padded(bytes(140))),
)
