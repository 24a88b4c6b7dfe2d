"""Files of a series that repeat another one: byte for byte, or slice for slice under a new SOPInstanceUID."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from typing import BinaryIO

from ctflow.dicom.attributes import PARSE_ERRORS, numbers, texts
from ctflow.dicom.read.geometry.agreement import COMPARED
from ctflow.dicom.read.geometry.spacing import Refuse
from ctflow.dicom.read.pixels.frames import encoded_frame
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.series import Series
from ctflow.dicom.read.structure import layout_of_header

# These determine a slice's values and position: two slices that share them and their pixels are the same slice,
# whatever acquisition either is said to be of, as no two acquisitions have the same noise.
_SHARED = (
    *COMPARED,
    "PatientID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "PixelSpacing",
)
_PIECE = 2**20  # bytes read at once


def without_copies(series: Series, refuse: Refuse) -> tuple[tuple[Instance, ...], tuple[str, ...]]:
    """Remove files that repeat another one.

    Args:
        series: The slices in any order.
        refuse: Makes the error from a reason and a message.

    Returns:
        The remaining slices, and warnings.

    Raises:
        BrokenSeries: Two different files share a SOPInstanceUID.
    """
    first: dict[str, Instance] = {}
    files = set()
    for instance in series.instances:
        known = first.setdefault(instance.uid, instance)
        if known is instance:
            continue
        if not filecmp.cmp(known.path, instance.path, shallow=False):
            names = f"{known.name} and {instance.name}"
            raise refuse("doubled", f"{names} share a SOPInstanceUID and differ: remove the wrong one")
        files.add(instance.path)
    kept = _without_equal_slices(tuple(first.values()))
    slices = len(first) - len(kept)
    warnings = (f"{len(files)} files are duplicates and were omitted",) if files else ()
    if slices:
        what = f"{slices} slices duplicate another slice under their own SOPInstanceUID and were omitted"
        warnings = (*warnings, what)
    return kept, warnings


def _without_equal_slices(instances: Sequence[Instance]) -> tuple[Instance, ...]:
    """Of slices at one position with byte-identical pixels, keep the first."""
    places: dict[tuple[tuple[float, ...] | None, ...], list[Instance]] = {}
    for instance in instances:
        place = tuple(numbers(instance.header, *each) for each in _PLACE)
        places.setdefault(place, []).append(instance)
    kept: set[int] = set()
    for place, here in places.items():
        different: list[Instance] = []
        for instance in here:
            if None in place or not any(_is_same_slice(instance, other) for other in different):
                different.append(instance)
        kept.update(map(id, different))
    return tuple(instance for instance in instances if id(instance) in kept)


_PLACE = (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6))


def _is_same_slice(one: Instance, other: Instance) -> bool:
    if one.transfer_syntax != other.transfer_syntax or not (one.has_pixels and other.has_pixels):
        return False
    if any(texts(one.header, keyword) != texts(other.header, keyword) for keyword in _SHARED):
        return False
    if one.frame is not None and other.frame is not None:
        return _has_same_frame(one, other)
    return one.frame == other.frame and _has_same_pixels(one, other)


def _has_same_frame(one: Instance, other: Instance) -> bool:
    try:
        return encoded_frame(one) == encoded_frame(other)
    except PARSE_ERRORS:  # reported where its pixels are read
        return False


def _has_same_pixels(one: Instance, other: Instance) -> bool:
    """Whether two files of one transfer syntax have byte-identical pixel data."""
    try:
        with one.path.open("rb") as here, other.path.open("rb") as there:
            if not (_seek_pixels(here) and _seek_pixels(there)):
                return False
            while (piece := here.read(_PIECE)) == there.read(_PIECE):
                if not piece:
                    return True
    except OSError:  # reported where its pixels are read
        pass
    return False


def _seek_pixels(stream: BinaryIO) -> bool:
    """Seek to the pixel data; False if they are deflated."""
    layout = layout_of_header(stream, preamble=stream.read(132)[128:] == b"DICM")
    if isinstance(layout, str) or layout.pixels is None:
        return False
    stream.seek(layout.pixels[3])
    return True
