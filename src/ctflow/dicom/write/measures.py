"""A SEG's slice distance, orientation and pixel spacing: from slice positions, never from declared values.

Readers place frames by these numbers. SpacingBetweenSlices and SliceThickness of a CT may be anything: another
reconstruction's, negative, 0, or different in each slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydicom.dataset import Dataset
from pydicom.valuerep import format_number_as_ds

from ctflow.core.volume import FloatArray
from ctflow.dicom.attributes import integer, numbers
from ctflow.dicom.regularity import (
    distance_along_normal,
    fitted_grid,
    is_within,
    planes_from_numbers,
    unevenness,
)

if TYPE_CHECKING:
    import highdicom as hd

_DECIMALS = 9  # of a distance in mm: further ones are rounding


@dataclass(frozen=True, eq=False)
class Measures:
    """Measures common to slices in array order.

    Attributes:
        orientation: (6,) along rows and along columns, as in ImageOrientationPatient.
        pixel_mm: (2,) between rows, and between columns.
        distance_mm: From slice to slice along the normal; the median if distances differ.
        is_even: Whether slices lie at equal distances; some may be missing.
        is_tilted: Whether slices are displaced relative to each other along rows or columns.
    """

    orientation: FloatArray
    pixel_mm: FloatArray
    distance_mm: float
    is_even: bool
    is_tilted: bool

    @property
    def misread(self) -> str | None:
        """Warn of readers that misplace a SEG on these slices because they assume an evenly spaced stack.

        Tried with dcmqi 1.5.7 and SimpleITK 2.5; pydicom-seg computes like dcmqi. No conforming SEG is known that
        they reject: dcmqi rejects one without SpacingBetweenSlices if SliceThickness is absent, empty or 0, and
        dciodvfy reports each of these as an error.
        """
        if self.is_even and not self.is_tilted:
            return None
        lie = " and ".join(["tilted"] * self.is_tilted + ["unevenly spaced"] * (not self.is_even))
        return (
            f"the SEG lies on {lie} slices: dcmqi (3D Slicer uses it), pydicom-seg and ITK put it elsewhere or lose it"
            " and report success, highdicom's get_volume refuses it; --seg-grid resampled writes one they read right"
        )

    def pixel_measures(self) -> hd.PixelMeasuresSequence:
        """The Pixel Measures functional group (DICOM PS3.3 C.7.6.16.2.1).

        Slices at several distances have no SpacingBetweenSlices. SliceThickness is still needed: some readers use it
        as the distance.
        """
        import highdicom as hd  # noqa: PLC0415  # a fifth of a second that reading slices does not need

        spacing = format_number_as_ds(self.distance_mm)
        return hd.PixelMeasuresSequence(
            pixel_spacing=[format_number_as_ds(float(mm)) for mm in self.pixel_mm],
            slice_thickness=spacing,
            spacing_between_slices=spacing if self.is_even else None,
        )

    def plane_orientation(self) -> hd.PlaneOrientationSequence:
        """The Plane Orientation (Patient) functional group (DICOM PS3.3 C.7.6.16.2.4)."""
        import highdicom as hd  # noqa: PLC0415

        patient = hd.CoordinateSystemNames.PATIENT
        return hd.PlaneOrientationSequence(patient, [format_number_as_ds(float(part)) for part in self.orientation])


def measures_from_headers(headers: Sequence[Dataset]) -> Measures | None:
    """The measures of a SEG on these images; None if an image lacks its position or they are not in order.

    Args:
        headers: Of the source images, in array order.
    """
    wanted = (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))
    found = [[numbers(header, keyword, count) for header in headers] for keyword, count in wanted]
    if len(headers) < 2 or any(one is None for values in found for one in values):
        return None
    positions, axes, pixels = (np.array(values, dtype=np.float64) for values in found)
    planes = planes_from_numbers(positions, axes, pixels)
    distances = (positions - positions[0]) @ np.cross(*planes.common[:2])
    if np.diff(distances).min() <= 0:
        return None
    places = _places(distances)
    is_even = is_within(unevenness(distances, places))
    size = integer(headers[0], "Rows") or 1, integer(headers[0], "Columns") or 1
    grid = fitted_grid(planes, places, (round(places[-1]) + 1, *size))
    distance_mm = distance_along_normal(grid) if is_even else float(np.median(np.diff(distances)))
    # As in the headers: if all agree, readers find exactly the images' numbers.
    orientation = np.median(axes, axis=0)
    return Measures(orientation, planes.common[2], round(distance_mm, _DECIMALS), is_even, grid.is_tilted)


def _places(distances_mm: FloatArray) -> FloatArray:
    """(n,) the slices' places, with each gap rounded to whole steps."""
    gaps = np.diff(distances_mm)
    return np.concatenate([[0.0], np.cumsum(np.maximum(np.round(gaps / np.median(gaps)), 1))])
