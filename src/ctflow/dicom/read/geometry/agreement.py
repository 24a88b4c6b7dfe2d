"""Whether a series' slices agree: a warning names each attribute that shapes the volume and differs lawfully."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise

from ctflow.core.errors import counted
from ctflow.dicom.attributes import integer, number, texts
from ctflow.dicom.read.scan import Instance

# Where these differ, each slice is read with its own value, as the standard says; the sender seldom meant that.
# `select` and `geometry` reject differing classes, patients, frames of reference, sizes, spacings and directions.
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
_LARGEST_TILT = 45.0  # degrees; no gantry tilts by more
_SAME_TILT = 1.0  # degrees


def disagreements(instances: Sequence[Instance]) -> tuple[str, ...]:
    """Describe attributes that are not the same in all slices.

    Args:
        instances: The slices.

    Returns:
        One sentence per attribute. It names the deviating files where they are few, and never a value.
    """
    return tuple(sentence for keyword in COMPARED if (sentence := _disagreement(instances, keyword)))


def _disagreement(instances: Sequence[Instance], keyword: str) -> str | None:
    found = [texts(instance.header, keyword) for instance in instances]
    known = {each: comparable(each) for each in set(found)}
    if len(known) == 1:
        return None
    values = [known[each] for each in found]
    usual, count = Counter(values).most_common(1)[0]
    if count == len(values):
        return None
    names = [instance.name for instance, value in zip(instances, values, strict=True) if value != usual]
    if len(names) <= _MOST_NAMED and count > len(names):
        return f"{keyword} of {', '.join(names)} differs from the other slices'"
    return f"{keyword} differs between slices"


def odd_ones(instances: Sequence[Instance], values: Sequence[Hashable]) -> str:
    """The names of slices whose value is not the most frequent one, as listed in messages."""
    usual, _ = Counter(values).most_common(1)[0]
    return listed([instance.name for instance, value in zip(instances, values, strict=True) if value != usual])


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    first, more = ", ".join(names[:_MOST_NAMED]), len(names) - _MOST_NAMED
    return f"{first} and {counted(more, 'more slice')}" if more > 0 else first


def contradictions(instances: Sequence[Instance], distance_mm: float | None, tilt_degrees: float) -> tuple[str, ...]:
    """Describe where headers contradict the slice distance and tilt of the positions; the positions count.

    Args:
        instances: The slices.
        distance_mm: From slice to slice along the normal; None if distances differ.
        tilt_degrees: Tilt from the positions.

    Returns:
        One sentence per attribute; numbers of geometry identify no patient.
    """
    found = []
    between = _numbers_of(instances, "SpacingBetweenSlices")
    odd = [mm for mm in between if distance_mm is not None and abs(mm - distance_mm) > max(0.02 * distance_mm, 0.02)]
    if distance_mm is not None and odd:
        found.append(f"SpacingBetweenSlices says {odd[0]:g} mm, but positions {distance_mm:.4g} mm: positions count")
    thin = [mm for mm in _numbers_of(instances, "SliceThickness") if mm <= 0]
    if thin:
        found.append(f"SliceThickness says {thin[0]:g} mm: the distance between slice positions is used instead")
    tilts = [degrees for degrees in _numbers_of(instances, "GantryDetectorTilt") if abs(degrees) <= _LARGEST_TILT]
    off = [degrees for degrees in tilts if abs(abs(degrees) - tilt_degrees) > _SAME_TILT]
    if off:
        found.append(
            f"GantryDetectorTilt says {off[0]:g} degrees, but positions {tilt_degrees:.1f} degrees: positions count"
        )
    return tuple(found)


def _numbers_of(instances: Sequence[Instance], keyword: str) -> list[float]:
    """The distinct numbers of the slices, in their order."""
    found = (number(instance.header, keyword) for instance in instances)
    return list(dict.fromkeys(value for value in found if value is not None))


def comparable(values: tuple[str, ...]) -> tuple[str | float, ...]:
    """Values of an attribute, with numbers converted: 2.5 and 2.50 agree, and so do absent and empty."""
    found: list[str | float] = []
    for item in values:
        try:
            found.append(float(item))
        except ValueError:
            found.append(item.upper())
    return tuple(found) if any(item != "" for item in found) else ()


# An attribute that names a slice's volume; other attributes may lawfully alternate.
_OF_VOLUMES = (
    "AcquisitionNumber",
    "TemporalPositionIndex",
    "TemporalPositionIdentifier",
    "NominalPercentageOfCardiacPhase",
)


def alternating_keyword(instances: Sequence[Instance]) -> str | None:
    """The attribute that shows that slices of several volumes alternate: in array order, a value returns repeatedly.

    Consecutive acquisitions, and one acquisition per slice (step and shoot), are lawful.
    """
    return next((keyword for keyword in _OF_VOLUMES if _alternates(instances, keyword)), None)


def _alternates(instances: Sequence[Instance], keyword: str) -> bool:
    if not any(keyword in instance.header for instance in instances):  # fast: nearly every series lacks three of four
        return False
    numbers = [integer(instance.header, keyword) for instance in instances]
    changes = sum(before != after for before, after in pairwise(numbers))
    if keyword == _OF_VOLUMES[0]:
        return 2 * len(set(numbers)) < len(numbers) and 2 * changes > len(numbers)
    # A phase may be measured anew in each slice of one volume, and then waver: volumes take turns without exception.
    counts = Counter(numbers).values()
    return changes == len(numbers) - 1 and 2 * len(counts) < len(numbers) and max(counts) - min(counts) <= 1
