"""The frames of pixel data; compressed ones are checked before decoding, as decoders make images of damaged streams."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.encaps import get_frame, parse_basic_offsets, parse_fragments

from ctflow.dicom.read.scan import Instance

_RLE_HEADER = 64
_CODESTREAM = b"\xff\x4f\xff\x51"
_SOF_LS = 0xF7
_SOF_LOSSLESS = 0xC3
_NO_SOF = (0xC4, 0xC8, 0xCC)  # tables and extensions within the frame headers' range
# Tuned in 2026-11 with the chest of LIDC-IDRI-0314 (1 mm) and phantoms (2.5 and 5 mm): no intact slice was named.
_UNLIKE = 3.0  # times the usual distance of a slice from the mean of its neighbours
_LEAST_HU = 15.0
# A damaged slice also shifts its neighbours' means, by half as much; where a chest changes its shape, at the
# shoulders, neighbouring slices differ about as much.
_BESIDE = 1.5


def encoded_frame(instance: Instance) -> bytes:
    """The pixels of one frame as the file has them.

    Raises:
        One of PARSE_ERRORS: The file cannot be read, or where the frame lies cannot be known.
    """
    with instance.path.open("rb") as stream:
        if instance.encoded_offset is None:
            stream.seek(instance.pixel_offset or 0)
            return stream.read(instance.pixel_length)
        fragments = _fragments(instance.path, instance.encoded_offset)
        if instance.frame is not None and len(fragments) == instance.frames:  # else pydicom finds where each ends
            stream.seek(fragments[instance.frame - 1])
            _, _, length = struct.unpack("<HHL", stream.read(8))
            return stream.read(length)
        stream.seek(instance.encoded_offset)
        return get_frame(stream, (instance.frame or 1) - 1, number_of_frames=instance.frames)


@lru_cache(8)  # or each frame of a file would walk through all
def _fragments(path: Path, offset: int) -> tuple[int, ...]:
    """Where the fragments of encapsulated pixel data begin."""
    with path.open("rb") as stream:
        stream.seek(offset)
        parse_basic_offsets(stream)
        return tuple(parse_fragments(stream)[1])


def family_of_frame(frame: bytes) -> str | None:
    """The kind of compression that a frame's first bytes indicate.

    Args:
        frame: The encoded frame.

    Returns:
        "JPEG 2000", "JPEG-LS", "JPEG Lossless", "lossy JPEG" or "RLE"; None for any other.
    """
    if _CODESTREAM in frame[:4096]:
        return "JPEG 2000"
    if frame[:2] == b"\xff\xd8":
        found = _frame_header(frame)
        marker = found and frame[found + 1]
        return {None: None, _SOF_LS: "JPEG-LS", _SOF_LOSSLESS: "JPEG Lossless"}.get(marker, "lossy JPEG")
    if len(frame) >= _RLE_HEADER:
        segments, first = struct.unpack("<2L", frame[:8])
        return "RLE" if 1 <= segments <= 15 and first == _RLE_HEADER else None
    return None


def flaw_of_size(frame: bytes, rows: int, columns: int) -> str | None:
    """How the size of a JPEG, JPEG-LS or JPEG 2000 frame differs from its header's, or None.

    Decoders trust the frame: one that claims 60000 x 60000 takes 7 GB, or crashes the process.

    Args:
        frame: The encoded frame.
        rows: From the header.
        columns: From the header.

    Source: ISO/IEC 15444-1 A.5.1 (SIZ), ISO/IEC 10918-1 B.2.2 and 14495-1 C.2.2 (SOF).
    """
    size = _size_of_codestream(frame) if _CODESTREAM in frame[:4096] else _size_of_jpeg(frame)
    if size is None:
        return "has no readable header"
    return None if size == (rows, columns, 1) else "has another size than the image"


def _size_of_codestream(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of JPEG 2000, with or without a JP2 container."""
    at = frame.index(_CODESTREAM) + 8
    if len(frame) < at + 34:
        return None
    right, bottom, left, top = struct.unpack(">4L", frame[at : at + 16])
    (components,) = struct.unpack(">H", frame[at + 32 : at + 34])
    return bottom - top, right - left, components


def _size_of_jpeg(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components of the first frame header (SOF) of JPEG or JPEG-LS."""
    at = _frame_header(frame)
    if at is None:
        return None
    rows, columns, components = struct.unpack(">HHB", frame[at + 5 : at + 10])
    return rows, columns, components


def _frame_header(frame: bytes) -> int | None:
    """Where the first frame header (SOF) of JPEG or JPEG-LS begins."""
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 10 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == _SOF_LS or (marker & 0xF0 == 0xC0 and marker not in _NO_SOF):
            return at
        else:
            at += 2 + length
    return None


def flaw_of_rle(frame: bytes, count: int, bytes_each: int) -> str | None:
    """The flaw of an RLE frame, or None.

    Args:
        frame: The encoded frame.
        count: Pixels.
        bytes_each: Bytes per pixel: each has its own segment.

    Source: DICOM PS3.5 Annex G.
    """
    if len(frame) < _RLE_HEADER:
        return "is cut short"
    segments, *offsets = struct.unpack("<16L", frame[:_RLE_HEADER])
    if segments != bytes_each:
        return "has another number of segments than bytes per pixel"
    ends = [*offsets[1:segments], len(frame)]
    if offsets[0] != _RLE_HEADER or any(start >= end for start, end in zip(offsets[:segments], ends, strict=True)):
        return "has segments that do not follow each other"
    for start, end in zip(offsets[:segments], ends, strict=True):
        if not _is_whole_segment(frame[start:end], count):
            return "decodes to another number of pixels"
    return None


def _is_whole_segment(segment: bytes, count: int) -> bool:
    """Whether a PackBits segment gives `count` bytes and ends there, apart from a byte that makes its length even."""
    at = made = 0
    while at < len(segment) and made < count:
        control = segment[at]
        if control < 128:
            at, made = at + control + 2, made + control + 1
        elif control > 128:
            at, made = at + 2, made + 257 - control
        else:
            at += 1
    return made == count and len(segment) - 1 <= at <= len(segment)


def slices_unlike_both_neighbours(array: npt.NDArray[np.generic]) -> tuple[int, ...]:
    """Slices that differ far more from the mean of their neighbours than others: damaged frames look like this.

    Args:
        array: (D, H, W) HU.

    Returns:
        Their indices d. The first and last slices have one neighbour and are not judged.
    """
    if len(array) < 5:
        return ()
    small = array[:, ::2, ::2]
    away = np.zeros(len(array))
    for d in range(1, len(array) - 1):
        mean = (small[d - 1].astype(np.float32) + small[d + 1].astype(np.float32)) / 2
        away[d] = np.abs(small[d] - mean).mean()
    usual = float(np.median(away[1:-1]))
    return tuple(
        d
        for d in range(1, len(array) - 1)
        if away[d] > max(_UNLIKE * usual, usual + _LEAST_HU) and away[d] > _BESIDE * max(away[d - 1], away[d + 1])
    )
