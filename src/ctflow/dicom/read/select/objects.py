"""What shares a series with its slices and is none: localizers, screen pages, reports, pictures without a place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from pydicom.uid import UID

from ctflow.core.errors import counted
from ctflow.dicom.attributes import numbers, text, texts
from ctflow.dicom.read.geometry.agreement import listed
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.series import Series, class_name, image_words, is_localizer
from ctflow.dicom.uids import CT_IMAGE_STORAGE

# ImageType values of pages that scanners save in place of a slice (protocol and dose pages).
_SCREEN_WORDS = frozenset({"SCREEN", "PROT", "PROTOCOL", "DOSE"})
_IMAGE_CLASSES = ("Image Storage", "Image Storage - For Presentation", "Image Storage - For Processing")
# More images without a place may be slices that lost it: then the series is rejected, not thinned out.
_MOST_PICTURES = 3
_LARGEST_TURN = np.cos(np.radians(30))  # of a localizer's normal to the slices'; damage turns slices less


def slices_of_series(series: Series) -> Series:
    """The series without localizers and objects that are not slices, with a sentence on each kind."""
    slices: list[Instance] = []
    others: list[Instance] = []
    for instance in series.instances:
        (others if _is_other_object(instance) else slices).append(instance)
    if not slices:
        return series
    kept = [instance for instance in slices if not is_localizer(instance)]
    localizers = len(slices) - len(kept)
    dropped = []
    if kept and localizers:
        dropped.append(f"{localizers} localizer image{'s' * (localizers > 1)} of the series omitted")
    names = Counter(class_name(text(instance.header, "SOPClassUID")) for instance in others)
    for name, count in sorted(names.items()):
        what = counted(count, "object that is not a slice", "objects that are not slices")
        dropped.append(f"{what} omitted from the series: {name}")
    found = kept or slices
    for what, pictures in _pictures(found):
        dropped.append(f"{listed([each.name for each in pictures])} omitted from the series: {what}")
        found = [instance for instance in found if instance not in pictures]
    return replace(series, instances=tuple(found), dropped=tuple(dropped))


def _is_other_object(instance: Instance) -> bool:
    """Whether it is not a slice of any modality: a screen capture, a report, a plan, a private object."""
    header = instance.header
    uid = UID(text(header, "SOPClassUID"))
    has_place = numbers(header, "ImagePositionPatient", 3) is not None
    if uid == CT_IMAGE_STORAGE:
        return not has_place and bool(image_words(instance) & _SCREEN_WORDS)
    if uid.is_private:
        return not instance.has_pixels
    if uid.type != "SOP Class":  # damaged, or newer than pydicom's tables: it may be a slice
        return bool(uid) and not (instance.has_pixels and has_place)
    return "Secondary Capture" in uid.name or not uid.name.endswith(_IMAGE_CLASSES)


def _pictures(instances: Sequence[Instance]) -> Iterator[tuple[str, list[Instance]]]:
    """CT images that cannot be slices of the others' volume, with what shows it."""
    images = [each for each in instances if text(each.header, "SOPClassUID") == CT_IMAGE_STORAGE]
    if len(images) < 2:
        return
    colour = [each for each in images if text(each.header, "SamplesPerPixel") not in ("", "1")]
    placed = [each for each in images if each not in colour]
    if colour and placed:
        yield "it has colours" if len(colour) == 1 else "they have colours", colour
    nowhere = [each for each in placed if not _values(each, "ImagePositionPatient", "ImageOrientationPatient")]
    if 0 < len(nowhere) <= _MOST_PICTURES and len(nowhere) < len(placed) / 2:
        yield "neither position nor orientation", nowhere
    turned = _turned([each for each in placed if each not in nowhere])
    if turned:
        yield "another direction and size than all slices, as a localizer has", turned


def _values(instance: Instance, *keywords: str) -> tuple[str, ...]:
    return tuple(value for keyword in keywords for value in texts(instance.header, keyword) if value)


def _turned(instances: Sequence[Instance]) -> list[Instance]:
    """Few images of another size, far from the direction of all others: localizers that ImageType does not name."""
    axes = Counter(texts(instance.header, "ImageOrientationPatient") for instance in instances)
    if len(axes) < 2:  # fast: nearly every series
        return []
    usual, _ = axes.most_common(1)[0]
    odd = [each for each in instances if _is_turned(each, usual)]
    sizes = {_size(each) for each in instances if each not in odd}
    other_size = not any(_size(each) in sizes for each in odd)
    return odd if other_size and len(odd) <= _MOST_PICTURES and len(odd) < len(instances) / 2 else []


def _is_turned(instance: Instance, usual: tuple[str, ...]) -> bool:
    axes = numbers(instance.header, "ImageOrientationPatient", 6)
    if axes is None or len(usual) != len(axes):
        return False
    try:
        common = np.array(usual, dtype=np.float64)
    except ValueError:
        return False
    normal, other = (np.cross(each[:3], each[3:]) for each in (common, np.array(axes)))
    lengths = float(np.linalg.norm(normal) * np.linalg.norm(other))
    return lengths > 0 and abs(float(normal @ other)) < _LARGEST_TURN * lengths


def _size(instance: Instance) -> tuple[str, ...]:
    return _values(instance, "Rows", "Columns", "PixelSpacing")
