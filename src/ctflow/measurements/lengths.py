"""Lengths of a mask: exact, between voxel centres, through the corners of its convex hull."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull, QhullError

from ctflow.core.volume import FloatArray, Geometry, Indices

_EQUAL = 1e-9  # a smaller relative difference of lengths is only rounding
_TURNS = np.arange(16) * np.pi / 16
_DIRECTIONS = np.stack([np.cos(_TURNS), np.sin(_TURNS)])  # (2, 16): half a circle of unit vectors
# A line lies within half a turn of one of them, and so extends along it by this share of its length; less rounding.
_NEVER_LONGER = float(np.cos(np.pi / 32)) - 1e-6


def axes_in_slices_mm(mask: npt.NDArray[np.bool_], geometry: Geometry) -> tuple[float, float]:
    """Long and short axis of a component, as a radiologist takes them: in one slice.

    Args:
        mask: (D, H, W) bool, the component or a box around it.
        geometry: Its affine gives the length of a step; its origin and shape do not matter.

    Returns:
        The largest distance of two voxel centres within a slice, in mm, and the extent at right angles to it in the
        same slice. Of equally long axes, the one with the largest extent counts, so that rotation changes nothing.
    """
    # (2, 2): lengths in the slice's plane of a step along h and along w; also right where the two are not orthogonal.
    in_plane = np.linalg.qr(geometry.affine_mm[:3, 1:3])[1]
    long = short = 0.0
    if not mask.any():
        return long, short
    for ends in _longest_sections(ends_of_rows(mask), in_plane):
        found_long, found_short = _axes_of_points(ends @ in_plane.T)
        if found_long > long * (1 + _EQUAL):
            long, short = found_long, found_short
        elif found_long >= long * (1 - _EQUAL):
            short = max(short, found_short)
    return long, short


def _longest_sections(ends: Indices, in_plane: FloatArray) -> list[Indices]:
    """The slices of a component that may be the longest, as (n, 2) ends of rows h, w; most are clearly shorter.

    A slice is at least as long as its extent along any direction, and hardly longer than along the best of many.
    """
    rows = len(ends) // 2  # the first voxel of each row, then the last of each
    along = ends[:, 1:] @ (in_plane.T @ _DIRECTIONS)
    starts = np.flatnonzero(np.diff(ends[:rows, 0], prepend=-1))
    highest = np.maximum.reduceat(np.maximum(along[:rows], along[rows:]), starts)
    lowest = np.minimum.reduceat(np.minimum(along[:rows], along[rows:]), starts)
    extents = (highest - lowest).max(axis=1)
    worth = np.flatnonzero(extents >= extents.max() * _NEVER_LONGER)
    stops = [*starts[1:].tolist(), rows]
    return [
        np.concatenate([ends[starts[index] : stops[index], 1:], ends[rows + starts[index] : rows + stops[index], 1:]])
        for index in worth.tolist()
    ]


def _axes_of_points(points_mm: FloatArray) -> tuple[float, float]:
    """Largest distance of (n, 2) points, and the largest extent at right angles to a pair that is so far apart."""
    if len(points_mm) > 32:
        try:
            points_mm = points_mm[ConvexHull(points_mm).vertices]
        except QhullError:  # all on a line
            points_mm = _flat_hull(points_mm)
    steps = points_mm[:, None] - points_mm[None]
    squares = np.einsum("ijk,ijk->ij", steps, steps)
    largest = float(squares.max())
    if largest == 0.0:
        return 0.0, 0.0
    long = float(np.sqrt(largest))
    directions = steps[np.triu(squares >= largest * (1 - _EQUAL))] / long
    extents = np.ptp(points_mm @ np.stack([-directions[:, 1], directions[:, 0]]), axis=0)
    return long, float(extents.max())


def ends_of_rows(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """First and last marked voxel of each row: no other voxel can be a corner of the convex hull.

    Args:
        mask: (D, H, W) bool.

    Returns:
        (2 n, 3) indices d, h, w: of n rows the first voxels, then the last.
    """
    rows = np.argwhere(mask.any(axis=2))
    lines = mask[rows[:, 0], rows[:, 1]]
    first = lines.argmax(axis=1)
    last = lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
    ends: npt.NDArray[np.int64] = np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])
    return ends


def longest_distance_mm(points_mm: FloatArray) -> float:
    """Largest distance between two of (n, 3) points, in mm (exact: through the convex hull's corners)."""
    if len(points_mm) > 32:
        points_mm = _outermost(points_mm)
    if len(points_mm) > 128:  # fewer points: measuring all pairs takes no longer than a hull
        try:
            points_mm = points_mm[ConvexHull(points_mm).vertices]
        except QhullError:  # flat or straight: no hull in three dimensions
            points_mm = _flat_hull(points_mm)
    longest = 0.0
    for start in range(0, len(points_mm), 1024):
        steps = points_mm[start : start + 1024, None] - points_mm[None]
        longest = max(longest, float(np.einsum("ijk,ijk->ij", steps, steps).max()))
    return float(np.sqrt(longest))


def _outermost(points_mm: FloatArray) -> FloatArray:
    """The points that may be an end of the longest distance: those far enough from the middle of all."""
    middle = (points_mm.min(axis=0) + points_mm.max(axis=0)) / 2
    from_middle = np.linalg.norm(points_mm - middle, axis=1)
    # No longer than the longest: from the point that is farthest from the middle to the one farthest from that.
    reached = float(np.linalg.norm(points_mm - points_mm[from_middle.argmax()], axis=1).max())
    some: FloatArray = points_mm[from_middle >= reached - from_middle.max() - 1e-6 * reached]
    return some


def _flat_hull(points_mm: FloatArray) -> FloatArray:
    """Corners of a point set that lies in a plane or on a line."""
    centred = points_mm - points_mm.mean(axis=0)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    if size[1] <= 1e-9 * size[0]:
        along = centred @ axes[0]
        ends: FloatArray = points_mm[[int(along.argmin()), int(along.argmax())]]
        return ends
    corners: FloatArray = points_mm[ConvexHull(centred @ axes[:2].T).vertices]
    return corners
