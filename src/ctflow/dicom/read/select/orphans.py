"""Find slices that continue another series, for example if transfer damaged their SeriesInstanceUID."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import FloatArray
from ctflow.dicom.attributes import numbers, texts
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.regularity import fitted_line

# A damaged UID leaves these unchanged; another acquisition has at least its own SeriesNumber.
_SHARED = (
    "FrameOfReferenceUID",
    "SeriesNumber",
    "Rows",
    "Columns",
    "PixelSpacing",
    "ImageOrientationPatient",
)
_TOLERANCE = 0.15  # of a gap: positions may be rounded to 0.1 mm, and the line is extrapolated


def continues(few: Sequence[Instance], series: Sequence[Instance]) -> bool:
    """Whether slices lie where a series would continue, before its first or after its last slice.

    Args:
        few: At least one slice, with another SeriesInstanceUID.
        series: At least two slices of one series, in any order.
    """
    if _traits(few) != _traits(series[:1]):  # almost all of a thousand small series stop here
        return False
    others = _positions(few)
    places = None if others is None else _positions(series)
    if places is None or others is None:
        return False
    places, others = np.unique(places, axis=0), np.unique(others, axis=0)  # a file may occur twice
    axes = np.array(numbers(series[0].header, "ImageOrientationPatient", 6) or (1, 0, 0, 0, 1, 0), dtype=np.float64)
    normal = np.cross(axes[:3], axes[3:])
    ordered = places[np.argsort(places @ normal)]
    if len(ordered) < 2:
        return False
    start, step = fitted_line(ordered, np.arange(len(ordered), dtype=np.float64))
    gap = float(np.linalg.norm(step))
    if gap == 0 or not np.isfinite(gap):
        return False
    steps = np.rint((others - start) @ step / gap**2)
    beside = np.linalg.norm(others - start - np.outer(steps, step), axis=1)
    before, behind = np.sort(-steps[steps < 0]), np.sort(steps[steps >= len(ordered)] - len(ordered) + 1)
    return bool(beside.max() <= _TOLERANCE * gap) and _adjoin(before, behind, len(others))


def _adjoin(before: npt.NDArray[np.float64], behind: npt.NDArray[np.float64], count: int) -> bool:
    """Whether they all continue the series on either side, without a gap."""
    both = [np.array_equal(side, np.arange(1, len(side) + 1)) for side in (before, behind)]
    return all(both) and len(before) + len(behind) == count


def _traits(instances: Sequence[Instance]) -> set[tuple[tuple[str, ...], ...]]:
    return {tuple(texts(instance.header, keyword) for keyword in _SHARED) for instance in instances}


def _positions(instances: Sequence[Instance]) -> FloatArray | None:
    """(n, 3) LPS mm; None if one is missing."""
    found = [numbers(instance.header, "ImagePositionPatient", 3) for instance in instances]
    return None if any(one is None for one in found) else np.array(found, dtype=np.float64)
