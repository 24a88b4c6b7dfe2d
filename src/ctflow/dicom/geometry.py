"""Slices to one grid: their order, their regularity and the affine of the array."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ctflow.dicom.agreement import are_interleaved, disagreements
from ctflow.dicom.attributes import integer, numbers, text
from ctflow.dicom.scan import Instance
from ctflow.dicom.select import Series
from ctflow.dicom.spacing import Spacing, spacing_of_slices, tolerance_mm
from ctflow.errors import BrokenSeries
from ctflow.volume import FloatArray, Geometry

_SAME_DIRECTION = 1e-4  # of unit vectors' components; scanners write six decimals
_LEAST_MM = 0.001  # the finest CT of bone has voxels of 0.01 mm
_SAME_SPACING_MM = 1e-4
_UNIT = 1e-2  # how far a direction's length, or the dot product of the two, may be off
_LARGEST_TILT_DEGREES = 45.0  # gantries tilt by at most 30


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices in order and the grid that they give.

    Attributes:
        geometry: Shape (D, H, W) and affine of the grid.
        instances: The slices along the normal.
        spacing: Where they lie on the grid.
        warnings: What a person should know.
    """

    geometry: Geometry
    instances: tuple[Instance, ...]
    spacing: Spacing
    warnings: tuple[str, ...]


def stack_of_series(series: Series, *, allow_gaps: bool = False) -> Stack:
    """Order a series' slices and find their common grid, without reading pixels.

    Args:
        series: The slices in any order.
        allow_gaps: Interpolate where one slice is missing between two.

    Returns:
        The stack. d runs along the normal (row direction x column direction), h down the columns, w along the rows. A
        gantry tilt makes the affine a sheared one.

    Raises:
        BrokenSeries: The slices do not give one regular grid; its reason names the rule.

    Source: DICOM PS3.3 C.7.6.2.1.1 (PixelSpacing[0] lies between rows, [1] between columns).
    """
    instances, warnings = _without_copies(series)
    rows, columns = _common_size(series, instances)
    row_direction, column_direction, pixel_mm = _common_plane(series, instances)
    normal = np.cross(row_direction, column_direction)
    positions = _positions(series, instances)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    ordered = tuple(instances[int(index)] for index in order)
    across, distances = _line(series, positions, normal)
    spacing = spacing_of_slices(
        distances,
        [integer(instance.header, "InstanceNumber") for instance in ordered],
        allow_gaps=allow_gaps,
        refuse=partial(_broken, series),
    )
    affine = np.eye(4)
    affine[:3, 0] = across / (spacing.count - 1)
    affine[:3, 1] = column_direction * pixel_mm[0]
    affine[:3, 2] = row_direction * pixel_mm[1]
    affine[:3, 3] = positions[0]
    geometry = Geometry((spacing.count, rows, columns), affine)
    if are_interleaved(ordered):
        what = "its AcquisitionNumber alternates from slice to slice: send one acquisition at a time"
        raise _broken(series, "doubled", what)
    found = (*spacing.warnings, *_tilt_warnings(series, geometry), *_count_warnings(ordered), *disagreements(ordered))
    return Stack(geometry, ordered, spacing, (*warnings, *found))


def _broken(series: Series, reason: str, message: str) -> BrokenSeries:
    return BrokenSeries(f"series {series.digest}: {message} [{reason}]", reason=reason)


def _without_copies(series: Series) -> tuple[tuple[Instance, ...], tuple[str, ...]]:
    """Leave out files that repeat another one byte for byte."""
    first: dict[str, Instance] = {}
    copies = 0
    for instance in series.instances:
        uid = text(instance.header, "SOPInstanceUID")
        known = first.setdefault(uid, instance)
        if known is instance:
            continue
        if not filecmp.cmp(known.path, instance.path, shallow=False):
            names = f"{known.name} and {instance.name}"
            raise _broken(series, "doubled", f"{names} share a SOPInstanceUID and differ: remove the wrong one")
        copies += 1
    warnings = (f"{copies} files repeat another one and were left out",) if copies else ()
    return tuple(first.values()), warnings


def _common_size(series: Series, instances: Sequence[Instance]) -> tuple[int, int]:
    sizes = {(integer(i.header, "Rows"), integer(i.header, "Columns")) for i in instances}
    if len(sizes) > 1:
        raise _broken(series, "mixed-size", "its slices differ in Rows or Columns: send one series at a time")
    rows, columns = sizes.pop()
    if not rows or not columns or rows < 2 or columns < 2:
        raise _broken(series, "no-geometry", "Rows or Columns is absent or too small")
    return rows, columns


def _common_plane(series: Series, instances: Sequence[Instance]) -> tuple[FloatArray, FloatArray, tuple[float, float]]:
    """Row direction, column direction (unit vectors), and PixelSpacing."""
    axes = _all_numbers(series, instances, "ImageOrientationPatient", 6)
    spacings = _all_numbers(series, instances, "PixelSpacing", 2)
    if len({text(i.header, "FrameOfReferenceUID") for i in instances}) > 1:
        raise _broken(series, "mixed-orientation", "its slices have different frames of reference")
    if np.abs(axes - axes[0]).max() > _SAME_DIRECTION:
        raise _broken(series, "mixed-orientation", "its slices have different orientations: send one series at a time")
    if np.abs(spacings - spacings[0]).max() > _SAME_SPACING_MM:
        raise _broken(series, "mixed-size", "its slices differ in PixelSpacing: send one series at a time")
    if spacings[0].min() <= 0:
        raise _broken(series, "no-geometry", "PixelSpacing is not above 0")
    if spacings[0].min() < _LEAST_MM:
        raise _broken(series, "no-geometry", f"PixelSpacing is below {_LEAST_MM} mm")
    row, column = axes[0, :3], axes[0, 3:]
    lengths = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(float(row @ column))) > _UNIT:
        raise _broken(series, "no-geometry", "ImageOrientationPatient is not two unit vectors at right angles")
    return row / lengths[0], column / lengths[1], (float(spacings[0, 0]), float(spacings[0, 1]))


def _positions(series: Series, instances: Sequence[Instance]) -> FloatArray:
    return _all_numbers(series, instances, "ImagePositionPatient", 3)


def _all_numbers(series: Series, instances: Sequence[Instance], keyword: str, count: int) -> FloatArray:
    found = []
    for instance in instances:
        values = numbers(instance.header, keyword, count)
        if values is None:
            raise _broken(series, "no-geometry", f"{keyword} of {instance.name} is absent or not {count} numbers")
        found.append(values)
    return np.array(found, dtype=np.float64)


def _line(series: Series, positions: FloatArray, normal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """From the first slice to the last in LPS mm, and each one's distance along the normal, ascending."""
    if len(positions) < 2:
        raise _broken(series, "no-geometry", "one slice has no extent along its normal")
    distances = (positions - positions[0]) @ normal
    across = positions[-1] - positions[0]
    extent = float(distances[-1])
    if extent <= 0:
        raise _broken(series, "doubled", "all its slices lie at one place: send one acquisition at a time")
    beside = positions - positions[0] - np.outer(distances / extent, across)
    most = float(np.linalg.norm(beside, axis=1).max())
    if most > tolerance_mm(float(np.median(np.diff(distances)))):
        raise _broken(series, "irregular", f"a slice lies {most:.3f} mm beside the others' line")
    return across, distances


def _tilt_warnings(series: Series, geometry: Geometry) -> tuple[str, ...]:
    degrees = geometry.tilt_degrees
    if degrees > _LARGEST_TILT_DEGREES:
        raise _broken(series, "tilted", f"its slices are displaced by {degrees:.1f} degrees, more than a gantry tilts")
    if not geometry.is_tilted:
        return ()
    return (f"its gantry tilt of {degrees:.1f} degrees was resampled to right angles for the model",)


def _count_warnings(instances: Sequence[Instance]) -> tuple[str, ...]:
    """A missing first or last slice shows only where a tag counts the images."""
    count = integer(instances[0].header, "ImagesInAcquisition")
    if count is None or count == len(instances):
        return ()
    return (f"ImagesInAcquisition says {count}, the series holds {len(instances)} slices",)
