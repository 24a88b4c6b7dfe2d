"""Do the slices of a series agree? What shapes the volume and may differ lawfully is warned about by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from ctflow.dicom.attributes import integer, texts
from ctflow.dicom.scan import Instance

# Where these differ, each slice is read by its own value, which is what the standard says and seldom what was meant.
# `select` and `geometry` refuse differing classes, patients, frames of reference, sizes, spacings and directions.
COMPARED = (
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "PixelRepresentation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PhotometricInterpretation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "LossyImageCompression",
    "SliceThickness",
    "SpacingBetweenSlices",
    "GantryDetectorTilt",
    "PatientPosition",
    "PatientOrientation",
    "ImageType",
    "ConvolutionKernel",
    "Laterality",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
)
_MOST_NAMED = 3


def disagreements(instances: Sequence[Instance]) -> tuple[str, ...]:
    """Sentences on attributes that are not the same in all slices.

    Args:
        instances: The slices.

    Returns:
        One sentence an attribute; it names the files that deviate where they are few, and never a value.
    """
    return tuple(sentence for keyword in COMPARED if (sentence := _disagreement(instances, keyword)))


def _disagreement(instances: Sequence[Instance], keyword: str) -> str | None:
    found = [texts(instance.header, keyword) for instance in instances]
    comparable = {each: _comparable(each) for each in set(found)}
    if len(comparable) == 1:
        return None
    values = [comparable[each] for each in found]
    usual, count = Counter(values).most_common(1)[0]
    if count == len(values):
        return None
    names = [instance.name for instance, value in zip(instances, values, strict=True) if value != usual]
    if len(names) <= _MOST_NAMED and count > len(names):
        return f"{keyword} of {', '.join(names)} differs from the other slices'"
    return f"{keyword} differs between slices"


def _comparable(values: tuple[str, ...]) -> tuple[str | float, ...]:
    """Values, numbers as such: 2.5 and 2.50 agree; absent and empty agree too."""
    found: list[str | float] = []
    for item in values:
        try:
            found.append(float(item))
        except ValueError:
            found.append(item.upper())
    return tuple(found) if any(item != "" for item in found) else ()


def are_interleaved(instances: Sequence[Instance]) -> bool:
    """Whether slices of several acquisitions alternate: in array order, AcquisitionNumber returns again and again.

    Acquisitions one behind another, and one for each slice (step and shoot), are lawful.
    """
    numbers = [integer(instance.header, "AcquisitionNumber") for instance in instances]
    changes = sum(before != after for before, after in pairwise(numbers))
    return 2 * len(set(numbers)) < len(numbers) and 2 * changes > len(numbers)
