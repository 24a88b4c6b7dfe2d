"""Check that a file's header is intact before pydicom parses it: pydicom reads damaged bytes as elements.

A damaged length or a lost byte shifts all that follows: elements vanish into others' values, and the rest may still
parse. But it hardly ever leaves every tag in ascending order, every VR known and every length inside the file.

Common mistakes of writers that other readers accept are also read here, and noted (`Note`). Unlike damage, a mistake
is the same in every file of a writer. The first element of a data set or item tells how it is encoded, as in
pydicom: nothing is tried twice, as a hostile file could then take forever.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

from pydicom.datadict import dictionary_has_tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

LARGEST_HEADER = 2**25  # bytes before the pixel data; the largest seen in real CT is 0.3 MB
LARGEST_INFLATED = 2**26  # bytes of a deflated file: a slice of 4096 x 4096 has half of it
MOST_ELEMENTS = 2**16  # of the first level; real headers have a few hundred, and each one read takes memory
DEEPEST = 32  # nested sequences; real headers have 3 or 4
_WINDOW = 2**15  # bytes read at once; nearly all headers are shorter, the rest of longer ones is read by seeking
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # pydicom also stops at these
_FIRST_PIXELS = min(_PIXELS)
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_IMPLICIT, _EXPLICIT, _LENGTH = (
    {order: struct.Struct(order + form).unpack_from for order in "<>"} for form in ("HHL", "HH2sH", "L")
)
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_VRS = _SHORT | _LONG
_LEAST_GROUP = 0x0008  # that may be out of order: lower groups are commands, meta information or misread bytes
_LONGEST_COMPARED = 2**16  # bytes of an element that may be repeated


class Note(Enum):
    """A flaw of a header's encoding that leaves no doubt about its content."""

    IMPLICIT_META = "its file meta information is encoded as Implicit VR"
    NO_META = "it has no file meta information"
    OTHER_VR = "it is encoded in the other of Implicit and Explicit VR than its transfer syntax says"
    META_IN_DATA_SET = "its data set contains elements of group 0002"
    WITHOUT_VR = "elements or sequence items of its Explicit VR data set have no VR"
    EXPLICIT_UN = "the items of a UN element are encoded as Explicit VR"
    DISORDER = "its elements are not in ascending order"
    TWICE = "an element occurs twice"
    BYTES_BEHIND = "bytes that are not an element follow its pixel data"


class _Flaw(Exception):
    """A flaw; the text quotes nothing from the file."""


# Location of a first-level element: tag, VR (empty if implicit), length (may be undefined), offset of its value,
# offset after it. A plain tuple, as each file has a hundred.
Element = tuple[int, bytes, int, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """Locations of the elements of an intact header.

    Attributes:
        window: The file's first bytes, nearly always the whole header.
        syntax: TransferSyntaxUID of the meta information; "" if it has none.
        implicit: Whether the data set is encoded as Implicit VR, whatever `syntax` says.
        big_endian: Whether it is encoded as big endian.
        meta: The meta information.
        elements: The data set up to the pixel data; empty for a deflated one.
        end: Offset after them.
        pixels: The pixel data's element, which begins at `end`; None if there is none, or in a deflated data set.
        notes: Flaws of the encoding that were read nevertheless.
    """

    window: bytes
    syntax: str
    implicit: bool
    big_endian: bool
    meta: Sequence[Element]
    elements: Sequence[Element]
    end: int
    pixels: Element | None
    notes: Collection[Note]


def layout_of_header(stream: BinaryIO, *, preamble: bool) -> Layout | str:
    """Locate the elements of a DICOM file's header, or describe its flaw.

    Args:
        stream: The file; its position afterwards is undefined.
        preamble: Whether 128 bytes and "DICM" come first.

    Returns:
        The layout, if every element up to the pixel data is intact, in order and of a known VR, with the exceptions in
        `Note`, and nothing exceeds this module's limits. Otherwise a sentence without values of the file.

    Source: DICOM PS3.5 section 7.1 (data elements), 7.5 (sequences), PS3.10 section 7.1 (meta information).
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    window = stream.read(_WINDOW)
    walk = _Walk(window, size, stream)
    try:
        end, syntax = walk.meta(132 if preamble else 0)
        meta, walk.elements = walk.elements, []
        if preamble and not meta:
            walk.notes.add(Note.NO_META)
        implicit = False
        if syntax == DeflatedExplicitVRLittleEndian:
            walk.notes |= _check_deflated(stream, end)
        else:
            implicit = walk.encoding(end, syntax)
            pixels = walk.dataset(end, implicit=implicit)
            end = size if pixels is None else pixels
            walk.look_behind_pixels()
    except _Flaw as flaw:
        return str(flaw)
    big = walk.order == ">"
    return Layout(window, syntax, implicit, big, meta, walk.elements, end, walk.pixels, walk.notes)


def meta_information(head: bytes) -> tuple[Mapping[int, bytes], int] | str:
    """The values of a file's meta information (PS3.10 section 7.1), or its flaw as a sentence.

    Args:
        head: The file's first bytes, at least its whole meta information.

    Returns:
        Values by tag, and the offset of the data set.
    """
    walk = _Walk(head, len(head))
    try:
        end, _ = walk.meta(132 if head[128:132] == b"DICM" else 0)  # pydicom writes none unless told to
    except _Flaw as flaw:
        return str(flaw)
    if not walk.elements:
        return "no DICOM file (it has no meta information)"
    return {tag: head[value : value + length] for tag, _, length, value, _ in walk.elements}, end


def _check_deflated(stream: BinaryIO, start: int) -> set[Note]:
    """Check a deflated data set. Deflate has no checksum, but damage nearly always changes the length."""
    head, count = _inflated(stream, start)
    walk = _Walk(head, len(head))
    pixels = walk.dataset(0, implicit=False)
    if pixels is None:
        return walk.notes
    end = walk.end_of(pixels)
    if end is None or not (end <= count <= end + 1 or head[end : end + 4] == b"\xfc\xff\xfc\xff"):
        raise _Flaw("damaged (its deflated pixels have another length than declared)")
    return walk.notes


def _inflated(stream: BinaryIO, start: int) -> tuple[bytes, int]:
    """The start of a deflated data set, enough for any header, and its full length: the rest is only counted."""
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
    """Steps from element to element, and records the locations of first-level ones."""

    def __init__(self, window: bytes, size: int, stream: BinaryIO | None = None) -> None:
        """Args: window: The first of `size` bytes; stream: All of them, if the window is not."""
        self._window = window
        self._known = len(window)
        self._stream = stream
        self._size = size
        self.order = "<"
        self.elements: list[Element] = []
        self.pixels: Element | None = None
        self.notes: set[Note] = set()

    def meta(self, position: int) -> tuple[int, str]:
        """The start of the data set, and its transfer syntax ("" if there is no meta information)."""
        syntax, last = "", 0
        implicit = not self._has_vr(position)
        while self._left(position) >= 8 and self._head(position)[:2] == b"\x02\x00":
            if not implicit and not self._has_vr(position):
                break  # of the data set, which is Implicit VR
            tag, vr, length, value = self._element(position, implicit=implicit)
            if tag <= last:
                break  # of the data set
            if length == _UNDEFINED:
                raise _Flaw("damaged meta information")
            position, last = self._end(value, length), tag
            if tag == 0x00020010:
                syntax = self._head(value, length).decode("ascii", "replace").strip(" \0")
            self.elements.append((tag, vr, length, value, position))
        if implicit and self.elements:
            self.notes.add(Note.IMPLICIT_META)
        return position, syntax

    def encoding(self, position: int, syntax: str) -> bool:
        """Whether a data set is encoded as Implicit VR; also notes its byte order.

        The first element tells, even if `syntax` says otherwise: an implicit length that looks like a VR would exceed
        16 kB, and the first group of a data set is below 0400.
        """
        big = syntax == ExplicitVRBigEndian
        self.order = ">" if big else "<"
        if self._left(position) < 8:
            return syntax == ImplicitVRLittleEndian
        head = self._head(position)
        explicit = head[4:6] in _VRS
        looks_big = explicit and head[0] < 0x04 <= head[1]
        if not syntax:
            self.order = ">" if looks_big else "<"
        elif looks_big != big:
            found = "big endian" if looks_big else "little endian"
            raise _Flaw(f"its transfer syntax contradicts its data set, which is {found}: have the sender repair it")
        elif explicit == (syntax == ImplicitVRLittleEndian):
            self.notes.add(Note.OTHER_VR)
        return not explicit

    def _has_vr(self, position: int) -> bool:
        """Whether an element has a VR, where nothing declares it."""
        return self._left(position) >= 8 and self._head(position)[4:6] in _VRS

    def end_of(self, position: int) -> int | None:
        """The end of the value of an element with a VR; None if its length is undefined."""
        _, _, length, value = self._element(position, implicit=False)
        return None if length == _UNDEFINED else value + length

    def dataset(self, position: int, *, implicit: bool) -> int | None:
        """Walk a data set up to its pixel data, and return where that begins; None if there is none."""
        start, last, count = position, -1, 0
        seen: dict[int, tuple[int, int]] = {}
        while position < self._size:
            if self._size - position < 8:
                raise _Flaw("cut short in its header")
            count += 1
            self._check_limits(position - start, count)
            tag, vr, length, value = self._element(position, implicit=implicit)
            if tag >= _FIRST_PIXELS and tag in _PIXELS:
                self.pixels = (tag, vr, length, value, value + length)
                return position
            if tag >> 16 == 2 and last < 0:
                self.notes.add(Note.META_IN_DATA_SET)
                position = self._end(value, length)
                continue
            if tag <= last or tag >> 16 == 0xFFFE:
                self._check_disorder(tag, length, value, seen)
            else:
                last = tag
            seen[tag] = length, value
            position = value + length
            if position > self._size or length == _UNDEFINED:
                position = self._after(vr, length, value, implicit, depth=0)
            self.elements.append((tag, vr, length, value, position))
        self._check_limits(position - start, count)
        return None

    def _check_limits(self, span: int, count: int) -> None:
        if span > LARGEST_HEADER:
            raise _Flaw(f"its header is larger than {LARGEST_HEADER >> 20} MB")
        if count > MOST_ELEMENTS:
            raise _Flaw(f"its header has more than {MOST_ELEMENTS} elements")

    def look_behind_pixels(self) -> None:
        """Note bytes after pixel data of defined length that are no element: mostly padding of archives."""
        if self.pixels is None or self.pixels[2] == _UNDEFINED or self.pixels[4] >= self._size:
            return
        end = self.pixels[4]
        group, element, _ = _IMPLICIT[self.order](self._head(end)) if self._left(end) >= 8 else (0, 0, 0)
        if (group << 16 | element) <= self.pixels[0]:
            self.notes.add(Note.BYTES_BEHIND)

    def _check_disorder(self, tag: int, length: int, value: int, seen: Mapping[int, tuple[int, int]]) -> None:
        """Accept an element out of order only if it is private or standard, and never two values for one."""
        is_private = bool(tag >> 16 & 1)
        if tag >> 16 < _LEAST_GROUP or not (is_private or dictionary_has_tag(tag)) or tag >> 16 == 0xFFFE:
            raise _Flaw("damaged header (its elements are not in order)")
        if tag not in seen:
            self.notes.add(Note.DISORDER)
            return
        self.notes.add(Note.TWICE)
        if is_private:
            return
        other_length, other = seen[tag]
        same = length == other_length and length <= _LONGEST_COMPARED
        if not same or self._head(value, length) != self._head(other, length):
            raise _Flaw("damaged header (an element occurs twice, with different values)")

    def _after(self, vr: bytes, length: int, value: int, implicit: bool, depth: int) -> int:
        """The start of the next element."""
        if length != _UNDEFINED:
            return self._end(value, length)
        if not implicit and depth and vr in (b"OB", b"OW"):  # an icon's compressed pixels: fragments, similar to items
            return self._sequence(value, implicit=True, depth=DEEPEST)
        if not implicit and vr not in (b"SQ", b"UN"):
            raise _Flaw("damaged header (an undefined length where none may be)")
        if depth >= DEEPEST:
            raise _Flaw(f"damaged header (sequences nested more than {DEEPEST} deep)")
        return self._sequence(value, implicit=implicit, depth=depth + 1, is_un=vr == b"UN")

    def _sequence(self, position: int, *, implicit: bool, depth: int, is_un: bool = False) -> int:
        while True:
            tag, length, value = self._marker(position)
            if tag == _SEQUENCE_END:
                return value
            if tag != _ITEM:
                raise _Flaw("damaged header (a sequence without its end)")
            inner = implicit or self._item_is_implicit(value, length, is_un=is_un)
            position = self._end(value, length) if length != _UNDEFINED else self._item(value, inner, depth)

    def _item_is_implicit(self, position: int, length: int, *, is_un: bool) -> bool:
        """Whether an item of an Explicit VR data set has no VRs, as it should be in UN (PS3.5 section 6.2.2)."""
        if length < 8 or self._left(position) < 8 or self._marker(position)[0] == _ITEM_END:
            return is_un
        implicit = not all(0x40 < letter < 0x5B for letter in self._head(position)[4:6])
        if implicit != is_un:
            self.notes.add(Note.EXPLICIT_UN if is_un else Note.WITHOUT_VR)
        return implicit

    def _item(self, position: int, implicit: bool, depth: int) -> int:
        last = -1
        seen: dict[int, tuple[int, int]] = {}
        while True:
            if self._marker(position)[0] == _ITEM_END:
                return position + 8
            tag, vr, length, value = self._element(position, implicit=implicit)
            if tag <= last:
                self._check_disorder(tag, length, value, seen)
            else:
                last = tag
            seen[tag] = length, value
            position = self._after(vr, length, value, implicit, depth)

    def _marker(self, position: int) -> tuple[int, int, int]:
        """Tag, length and the offset after the header of an item or delimiter, which has no VR."""
        group, element, length = _IMPLICIT[self.order](self._head(position))
        return group << 16 | element, length, position + 8

    def _element(self, position: int, *, implicit: bool) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty if implicit), length and offset of the value."""
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
        # Some writers omit single VRs, mostly of private elements. After a damaged VR comes a length, which would
        # be the upper half of the implicit one.
        if self.order == "<" and not 0x40 < vr[0] < 0x5B and length == 0 and _LEAST_GROUP <= group < 0xFFFE:
            self.notes.add(Note.WITHOUT_VR)
            return tag, b"", *_LENGTH["<"](vr + b"\0\0"), position + 8
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
