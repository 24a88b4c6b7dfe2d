"""Is a file's header whole? Looked at before pydicom parses it, which takes damaged bytes for elements as best it can.

A damaged length or a lost byte shifts all that follows: elements vanish into others' values, and what is left may still
parse. But hardly ever does it leave every tag in ascending order, every VR known and every length inside the file.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

LARGEST_HEADER = 2**25  # bytes before the pixel data; the largest seen in real CT is 0.3 MB
LARGEST_INFLATED = 2**26  # bytes of a deflated file: a slice of 4096 x 4096 has half of it
DEEPEST = 32  # sequences within each other; real ones have 3 or 4
_WINDOW = 2**15  # bytes read at once; nearly all headers are shorter, and of longer ones the rest is sought
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # here pydicom stops, too
_FIRST_PIXELS = min(_PIXELS)
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_IMPLICIT, _EXPLICIT, _LENGTH = (
    {order: struct.Struct(order + form).unpack_from for order in "<>"} for form in ("HHL", "HH2sH", "L")
)
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())


class _Flaw(Exception):
    """What is wrong; the text quotes nothing of the file."""


# Where an element of the first level lies: tag, VR (empty if implicit), length (may be undefined), offset of its value,
# offset behind it. A plain tuple, as there are a hundred in each file.
Element = tuple[int, bytes, int, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the elements of a whole header lie.

    Attributes:
        window: The file's first bytes, nearly always the whole header.
        syntax: TransferSyntaxUID; "" if there is no meta information.
        meta: The meta information.
        elements: The data set up to the pixel data; nothing of a deflated one.
        end: Offset behind them.
    """

    window: bytes
    syntax: str
    meta: Sequence[Element]
    elements: Sequence[Element]
    end: int


def flaw_of_header(stream: BinaryIO, *, preamble: bool) -> str | None:
    """What is wrong with the header of a DICOM file, or None (see `layout_of_header`)."""
    layout = layout_of_header(stream, preamble=preamble)
    return layout if isinstance(layout, str) else None


def layout_of_header(stream: BinaryIO, *, preamble: bool) -> Layout | str:
    """Where the elements of a DICOM file's header lie, or what is wrong with it.

    Args:
        stream: The file; left anywhere.
        preamble: Whether 128 bytes and "DICM" come first.

    Returns:
        The layout, where every element up to the pixel data is whole, in order and of a known VR, and nothing is larger
        than the limits of this module. Else a sentence without values of the file.

    Source: DICOM PS3.5 section 7.1 (data elements), 7.5 (sequences), PS3.10 section 7.1 (meta information).
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    window = stream.read(_WINDOW)
    walk = _Walk(window, size, stream)
    try:
        end, syntax = walk.meta(132 if preamble else 0)
        meta, walk.elements = walk.elements, []
        if syntax == DeflatedExplicitVRLittleEndian:
            _check_deflated(stream, end)
        else:
            implicit = syntax == ImplicitVRLittleEndian if syntax else not walk.has_vr(end)
            walk.order = ">" if syntax == ExplicitVRBigEndian else "<"
            pixels = walk.dataset(end, implicit=implicit)
            end = size if pixels is None else pixels
    except _Flaw as flaw:
        return str(flaw)
    return Layout(window, syntax, meta, walk.elements, end)


def values_of_data_set(data: bytes | memoryview, syntax: str, wanted: Collection[int]) -> dict[int, bytes] | str:
    """The raw values of a few elements of an encoded data set, or what is wrong with its header.

    It looks at what `flaw_of_header` looks at, in the same walk: for a receiver that must decide in a fraction of a
    millisecond what it was given.

    Args:
        data: The data set, without preamble and meta information; not copied.
        syntax: Its transfer syntax, any but the deflated one.
        wanted: Tags of its first level, as 0x0020000D.

    Returns:
        The values of those that are there; or a sentence without values of the data set.
    """
    walk = _Walk(data, len(data))
    walk.order = ">" if syntax == ExplicitVRBigEndian else "<"
    walk.wanted = wanted
    try:
        walk.dataset(0, implicit=syntax == ImplicitVRLittleEndian)
    except _Flaw as flaw:
        return str(flaw)
    return {tag: bytes(data[at:end]) for tag, _, length, at, end in walk.elements if length != _UNDEFINED}


def _check_deflated(stream: BinaryIO, start: int) -> None:
    """Look at a deflated data set. Deflate has no checksum, but damage nearly always changes the length."""
    head, count = _inflated(stream, start)
    walk = _Walk(head, len(head))
    walk.wanted = ()
    pixels = walk.dataset(0, implicit=False)
    if pixels is None:
        return
    end = walk.end_of(pixels)
    if end is None or not (end <= count <= end + 1 or head[end : end + 4] == b"\xfc\xff\xfc\xff"):
        raise _Flaw("damaged (its deflated pixels have another length than it says)")


def _inflated(stream: BinaryIO, start: int) -> tuple[bytes, int]:
    """The head of a deflated data set, enough for any header, and its whole length: the rest is only counted."""
    stream.seek(start)
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    head, count = [], 0
    try:
        while not unpack.eof:
            packed = unpack.unconsumed_tail or stream.read(2**16)
            if not packed:
                raise _Flaw("cut short in its deflated part")
            piece = unpack.decompress(packed, 2**20)
            if count < LARGEST_HEADER // 4:
                head.append(piece)
            count += len(piece)
            if count > LARGEST_INFLATED:
                raise _Flaw(f"inflates to more than {LARGEST_INFLATED >> 20} MB, as no CT slice does")
    except zlib.error as error:
        raise _Flaw("its deflated part is damaged") from error
    if len(unpack.unused_data) + len(stream.read(2)) > 1:
        raise _Flaw("damaged (its deflated part ends before the file)")
    return b"".join(head), count


class _Walk:
    """Steps from element to element, and notes where those of the first level lie."""

    def __init__(self, window: bytes | memoryview, size: int, stream: BinaryIO | None = None) -> None:
        """Args: window: What comes first of `size` bytes; stream: All of them, where the window is not."""
        self._window = window
        self._known = len(window)
        self._stream = stream
        self._size = size
        self.order = "<"
        self.wanted: Collection[int] | None = None  # all tags
        self.elements: list[Element] = []

    def meta(self, position: int) -> tuple[int, str]:
        """Where the data set begins, and its transfer syntax ("" if there is no meta information)."""
        syntax, last = "", 0
        while self._left(position) >= 8 and self._head(position)[:2] == b"\x02\x00":
            tag, vr, length, value = self._element(position, implicit=False)
            if tag <= last or length == _UNDEFINED:
                raise _Flaw("damaged meta information")
            position, last = self._end(value, length), tag
            if tag == 0x00020010:
                syntax = self._head(value, length).decode("ascii", "replace").strip(" \0")
            self.elements.append((tag, vr, length, value, position))
        return position, syntax

    def has_vr(self, position: int) -> bool:
        """Whether an element names its VR, where nothing says so."""
        return self._head(position)[4:6] in _SHORT | _LONG

    def end_of(self, position: int) -> int | None:
        """Where the value of an element with a VR ends; None if it has no length of its own."""
        _, _, length, value = self._element(position, implicit=False)
        return None if length == _UNDEFINED else value + length

    def dataset(self, position: int, *, implicit: bool) -> int | None:
        """Go through a data set up to its pixel data, and say where that begins; None if there is none."""
        start, last = position, -1
        while position < self._size:
            if self._size - position < 8:
                raise _Flaw("cut short in its header")
            tag, vr, length, value = self._element(position, implicit=implicit)
            if tag >= _FIRST_PIXELS and tag in _PIXELS:
                return position
            if tag <= last or tag >> 16 == 0xFFFE:
                raise _Flaw("damaged header (its elements are not in order)")
            last = tag
            position = value + length
            if position > self._size or length == _UNDEFINED:
                position = self._after(vr, length, value, implicit, depth=0)
            if self.wanted is None or tag in self.wanted:
                self.elements.append((tag, vr, length, value, position))
            if position - start > LARGEST_HEADER:
                raise _Flaw(f"its header is larger than {LARGEST_HEADER >> 20} MB")
        return None

    def _after(self, vr: bytes, length: int, value: int, implicit: bool, depth: int) -> int:
        """Where the next element begins."""
        if length != _UNDEFINED:
            return self._end(value, length)
        if not implicit and depth and vr in (b"OB", b"OW"):  # an icon's compressed pixels: fragments like items
            return self._sequence(value, implicit=False, depth=DEEPEST)
        if not implicit and vr not in (b"SQ", b"UN"):
            raise _Flaw("damaged header (an undefined length where none may be)")
        if depth >= DEEPEST:
            raise _Flaw(f"damaged header (sequences nested more than {DEEPEST} deep)")
        # What is UN and of undefined length is encoded as Implicit VR (PS3.5 section 6.2.2).
        return self._sequence(value, implicit=implicit or vr == b"UN", depth=depth + 1)

    def _sequence(self, position: int, *, implicit: bool, depth: int) -> int:
        while True:
            tag, length, value = self._marker(position)
            if tag == _SEQUENCE_END:
                return value
            if tag != _ITEM:
                raise _Flaw("damaged header (a sequence without its end)")
            position = self._end(value, length) if length != _UNDEFINED else self._item(value, implicit, depth)

    def _item(self, position: int, implicit: bool, depth: int) -> int:
        last = -1
        while True:
            if self._marker(position)[0] == _ITEM_END:
                return position + 8
            tag, vr, length, value = self._element(position, implicit=implicit)
            if tag <= last:
                raise _Flaw("damaged header (elements of a sequence are not in order)")
            last = tag
            position = self._after(vr, length, value, implicit, depth)

    def _marker(self, position: int) -> tuple[int, int, int]:
        """Tag, length and the place behind an item's or a delimiter's head, which has no VR."""
        group, element, length = _IMPLICIT[self.order](self._head(position))
        return group << 16 | element, length, position + 8

    def _element(self, position: int, *, implicit: bool) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty if implicit), length and place of the value."""
        head, at = (self._window, position) if position + 8 <= self._known else (self._head(position), 0)
        if implicit:
            group, element, length = _IMPLICIT[self.order](head, at)
            return group << 16 | element, b"", length, position + 8
        group, element, vr, length = _EXPLICIT[self.order](head, at)
        tag = group << 16 | element
        if vr in _SHORT:
            return tag, vr, length, position + 8
        if vr in _LONG:
            return tag, vr, *_LENGTH[self.order](self._head(position + 8, 4)), position + 12
        raise _Flaw("damaged header (an unknown VR)")

    def _end(self, value: int, length: int) -> int:
        if length > self._left(value):
            raise _Flaw("cut short in its header, or a damaged length")
        return value + length

    def _left(self, position: int) -> int:
        return self._size - position

    def _head(self, position: int, count: int = 8) -> bytes:
        head = bytes(self._window[position : position + count])
        if len(head) < count and self._stream is not None:
            self._stream.seek(position)
            head = self._stream.read(count)
        if len(head) < count:
            raise _Flaw("cut short in its header")
        return head
