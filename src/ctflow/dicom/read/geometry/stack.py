"""Slices to one grid: order, regularity and the affine of the array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ctflow.core.errors import BrokenSeries, counted
from ctflow.core.volume import FloatArray, Geometry
from ctflow.dicom.attributes import integer, numbers, text
from ctflow.dicom.read.geometry.agreement import alternating_keyword, contradictions, disagreements, listed, odd_ones
from ctflow.dicom.read.geometry.copies import without_copies
from ctflow.dicom.read.geometry.spacing import Spacing, spacing_of_slices
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.series import Series
from ctflow.dicom.regularity import (
    Planes,
    Shifts,
    distance_along_normal,
    fitted_grid,
    is_within,
    planes_from_numbers,
    shifts_from_grid,
)

_SAME_DIRECTION = 1e-3  # of unit vectors' components: the effect of rounding to three decimals or more
_SAME_SPACING = 0.1  # of PixelSpacing: a rough check; the position of a slice's corners decides
_LEAST_MM = 0.001  # the finest CT of bone has voxels of 0.01 mm
_UNIT = 1e-2  # how far a direction's length, or the dot product of the two, may be off
_LARGEST_TILT_DEGREES = 45.0  # gantries tilt by at most 30
# Shifts that need no warning: below this share of the voxel, or below 0.01 mm.
_UNSAID, _UNSAID_MM = 0.01, 0.01
_REASONS = {  # for a shift of more than a tenth of a voxel
    "ImageOrientationPatient": "mixed-orientation",
    "PixelSpacing": "mixed-size",
    "ImagePositionPatient": "irregular",
}


@dataclass(frozen=True, eq=False)
class Stack:
    """Ordered slices and their grid.

    Attributes:
        geometry: Shape (D, H, W) and affine of the grid.
        instances: The slices along the normal.
        spacing: Their positions on the grid.
        warnings: For the user.
    """

    geometry: Geometry
    instances: tuple[Instance, ...]
    spacing: Spacing
    warnings: tuple[str, ...]


def stack_of_series(series: Series, *, allow_gaps: bool = False) -> Stack:
    """Order a series' slices and find their common grid, without reading pixels.

    Args:
        series: The slices in any order.
        allow_gaps: Interpolate a single missing slice.

    Returns:
        The stack. d runs along the normal (row direction x column direction), h down the columns, w along the rows. A
        gantry tilt shears the affine.

    Raises:
        BrokenSeries: The slices form no regular grid; the reason names the rule.

    Source: DICOM PS3.3 C.7.6.2.1.1 (PixelSpacing[0] lies between rows, [1] between columns).
    """
    instances, warnings = without_copies(series, partial(_broken, series))
    size = _common_size(series, instances)
    planes = _planes(series, instances)
    order = np.argsort(planes.positions @ np.cross(*planes.common[:2]), kind="stable").tolist()
    planes, ordered = planes.ordered(order), tuple(instances[index] for index in order)
    normal = np.cross(*planes.common[:2])
    spacing = spacing_of_slices(
        (planes.positions - planes.positions[0]) @ normal,
        [integer(instance.header, "InstanceNumber") for instance in ordered],
        allow_gaps=allow_gaps,
        refuse=partial(_broken, series),
        names=[instance.name for instance in ordered],
    )
    geometry = fitted_grid(planes, spacing.places, (spacing.count, *size))
    shifted = _shift_warnings(series, ordered, shifts_from_grid(planes, geometry.affine_mm, spacing.places, size))
    alternating = alternating_keyword(ordered)
    if alternating:
        what = f"its {alternating} alternates from slice to slice: send one acquisition at a time"
        raise _broken(series, "doubled", what)
    found = (*spacing.warnings, *shifted, *_tilt_warnings(series, geometry), *_count_warnings(ordered))
    distance_mm = distance_along_normal(geometry) if spacing.weights is None else None
    declared = contradictions(ordered, distance_mm, geometry.tilt_degrees)
    return Stack(geometry, ordered, spacing, (*warnings, *found, *declared, *disagreements(ordered)))


def _broken(series: Series, reason: str, message: str) -> BrokenSeries:
    return BrokenSeries(f"series {series.digest}: {message}", reason=reason)


def _common_size(series: Series, instances: Sequence[Instance]) -> tuple[int, int]:
    sizes = [(integer(i.header, "Rows"), integer(i.header, "Columns")) for i in instances]
    if len(set(sizes)) > 1:
        raise _mixed(series, "mixed-size", "Rows or Columns", odd_ones(instances, sizes))
    rows, columns = sizes[0]
    if not rows or not columns or rows < 2 or columns < 2:
        raise _broken(series, "no-geometry", "Rows or Columns is absent or too small")
    return rows, columns


def _mixed(series: Series, reason: str, what: str, odd: str) -> BrokenSeries:
    return _broken(series, reason, f"{what} of {odd} differs from the other slices': send one series at a time")


def _planes(series: Series, instances: Sequence[Instance]) -> Planes:
    """The plane of each slice by its own header, if all have one direction."""
    axes = _all_numbers(series, instances, "ImageOrientationPatient", 6)
    pixels = _all_numbers(series, instances, "PixelSpacing", 2)
    frames = [text(i.header, "FrameOfReferenceUID") for i in instances]
    if len(set(frames)) > 1:
        raise _mixed(series, "mixed-orientation", "FrameOfReferenceUID", odd_ones(instances, frames))
    turned = _apart(instances, np.abs(axes - np.median(axes, axis=0)), _SAME_DIRECTION)
    if turned:
        raise _mixed(series, "mixed-orientation", "ImageOrientationPatient", listed(turned))
    if pixels.min() <= 0:
        raise _broken(series, "no-geometry", "PixelSpacing is not above 0")
    if pixels.min() < _LEAST_MM:
        raise _broken(series, "no-geometry", f"PixelSpacing is below {_LEAST_MM} mm")
    scaled = _apart(instances, np.abs(pixels / np.median(pixels, axis=0) - 1), _SAME_SPACING)
    if scaled:
        raise _mixed(series, "mixed-size", "PixelSpacing", listed(scaled))
    rows, columns = axes[:, :3], axes[:, 3:]
    off = max(np.abs(np.linalg.norm(half, axis=1) - 1).max() for half in (rows, columns))
    if max(off, np.abs((rows * columns).sum(axis=1)).max()) > _UNIT:
        raise _broken(series, "no-geometry", "ImageOrientationPatient is not two unit vectors at right angles")
    return planes_from_numbers(_all_numbers(series, instances, "ImagePositionPatient", 3), axes, pixels)


def _apart(instances: Sequence[Instance], differences: FloatArray, most: float) -> list[str]:
    """The names of slices with a number that differs by more."""
    return [instance.name for instance, row in zip(instances, differences, strict=True) if row.max() > most]


def _all_numbers(series: Series, instances: Sequence[Instance], keyword: str, count: int) -> FloatArray:
    found = []
    for instance in instances:
        values = numbers(instance.header, keyword, count)
        if values is None:
            raise _broken(series, "no-geometry", f"{keyword} of {instance.name} is absent or not {count} numbers")
        found.append(values)
    if len(found) < 2:
        raise _broken(series, "no-geometry", "one slice has no extent along its normal")
    return np.array(found, dtype=np.float64)


def _shift_warnings(series: Series, instances: Sequence[Instance], shifts: Shifts) -> tuple[str, ...]:
    """One sentence per attribute that shifts slices off their grid, if none is shifted too far."""
    warnings = []
    for keyword, reason in _REASONS.items():
        share, distance = shifts.causes[keyword], shifts.causes_mm[keyword]
        far = [instance.name for instance, one in zip(instances, share, strict=True) if not is_within(float(one))]
        most = f"by up to {distance.max():.3f} mm ({share.max():.0%} of a voxel)"
        if far:
            what = f"{keyword} puts {listed(far)} {most} off the grid of the others, more than a tenth"
            raise _broken(series, reason, what)
        if share.max() > _UNSAID and distance.max() > _UNSAID_MM:
            warnings.append(f"{keyword} puts slices {most} off an even grid; at most a tenth is ignored")
    if not is_within(float(shifts.total.max())):
        most = f"{shifts.total.max():.0%} of a voxel"
        raise _broken(
            series, "irregular", f"position, orientation and PixelSpacing put slices {most} off a regular grid"
        )
    return tuple(warnings)


def _tilt_warnings(series: Series, geometry: Geometry) -> tuple[str, ...]:
    degrees = geometry.tilt_degrees
    if degrees > _LARGEST_TILT_DEGREES:
        raise _broken(series, "tilted", f"its slices are displaced by {degrees:.1f} degrees, more than any gantry tilt")
    if not geometry.is_tilted:
        return ()
    return (f"its gantry tilt of {degrees:.1f} degrees was resampled to right angles for the model",)


def _count_warnings(instances: Sequence[Instance]) -> tuple[str, ...]:
    """A missing first or last slice shows only if an attribute counts the images."""
    count = integer(instances[0].header, "ImagesInAcquisition")
    if count is None or count == len(instances):
        return ()
    return (f"ImagesInAcquisition says {count}, the series holds {counted(len(instances), 'slice')}",)
