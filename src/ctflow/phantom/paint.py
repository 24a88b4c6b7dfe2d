"""Paint with partial volume: soft edges from signed distances, and tubes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctflow.phantom.grid import Axes, FloatVolume, Grid

_LEAST_SHARE = 0.3  # a tube that fills less of a voxel is lost in the noise
Points = npt.NDArray[np.float64]  # (n, 3) in mm: z, y, x


@dataclass(frozen=True, eq=False)
class Tubes:
    """Conical tubes: (n, 3) first and second ends in mm (z, y, x), and (n, 2) radii there."""

    starts_mm: Points
    ends_mm: Points
    radii_mm: npt.NDArray[np.float64]

    def wider(self, mm: float) -> Tubes:
        """Tubes wider by `mm`."""
        return Tubes(self.starts_mm, self.ends_mm, self.radii_mm + mm)

    def chosen(self, keep: npt.NDArray[np.bool_]) -> Tubes:
        """The tubes in `keep`."""
        return Tubes(self.starts_mm[keep], self.ends_mm[keep], self.radii_mm[keep])


def tubes_along(points_mm: npt.ArrayLike, radii_mm: npt.ArrayLike) -> Tubes:
    """A polyline as tubes: (n, 3) points, and one or n radii."""
    points = np.asarray(points_mm, dtype=np.float64)
    radii = np.broadcast_to(np.asarray(radii_mm, dtype=np.float64), len(points))
    return Tubes(points[:-1], points[1:], np.column_stack([radii[:-1], radii[1:]]))


def distance_to_tubes(axes: Axes, tubes: Tubes) -> FloatVolume:
    """Signed distance to the nearest of a few tubes, on a whole grid."""
    nearest: FloatVolume | None = None
    for start, end, (first, last) in zip(tubes.starts_mm, tubes.ends_mm, tubes.radii_mm, strict=True):
        distance = _distance_to_tube(axes, start, end, first, last)
        nearest = distance if nearest is None else np.minimum(nearest, distance)
    if nearest is None:
        raise ValueError("there is no tube")
    return nearest


def distance_near_tubes(grid: Grid, tubes: Tubes, reach_mm: float) -> FloatVolume:
    """Signed distance to the nearest tube where it is below `reach_mm`, on a whole grid; 400 mm elsewhere."""
    nearest = np.full(grid.shape, 400.0, np.float32)
    for start, end, (first, last) in zip(tubes.starts_mm, tubes.ends_mm, tubes.radii_mm, strict=True):
        reach = max(first, last) + reach_mm
        box = grid.box_around(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        if box is not None:
            distance = _distance_to_tube(grid.axes_in(box), start, end, first, last)
            np.minimum(nearest[box], distance, out=nearest[box])
    return nearest


def coverage(distance_mm: FloatVolume, edge_mm: float) -> FloatVolume:
    """Share of a voxel inside a surface: 1 inside, 0 outside, linear over `edge_mm` around it.

    Args:
        distance_mm: Signed distance, negative inside.
        edge_mm: Width of the edge: voxel and reconstruction blur.
    """
    share: FloatVolume = np.clip(np.float32(0.5) - distance_mm * np.float32(1.0 / edge_mm), 0.0, 1.0)
    return share


def fill(hu: FloatVolume, distance_mm: FloatVolume, value: float | FloatVolume, edge_mm: float) -> None:
    """Paint a tissue over the existing content, in place."""
    hu += coverage(distance_mm, edge_mm) * (value - hu)


def smooth_max(a: FloatVolume, b: FloatVolume, round_mm: float) -> FloatVolume:
    """Intersection of two shapes with an edge rounded over about `round_mm` (polynomial smooth maximum, I. Quilez)."""
    blend = np.clip(round_mm - np.abs(a - b), 0.0, None)
    joined: FloatVolume = np.maximum(a, b) + blend * blend * np.float32(0.25 / round_mm)
    return joined


def smooth_min(a: FloatVolume, b: FloatVolume, round_mm: float) -> FloatVolume:
    """Union of two shapes, crease rounded."""
    return -smooth_max(-a, -b, round_mm)


def paint_tubes(
    hu: FloatVolume,
    grid: Grid,
    tubes: Tubes,
    value: float,
    edge_mm: float,
    *,
    only_in: FloatVolume | None = None,
) -> None:
    """Draw conical tubes, in place.

    Args:
        hu: (D, H, W).
        grid: Its grid.
        tubes: The tubes.
        value: HU inside; a tube of at least -500 HU never darkens a voxel, an air tube never brightens one.
        edge_mm: Width of the edge.
        only_in: (D, H, W) share of each voxel that may be painted; None is everywhere.
    """
    keep = np.maximum if value >= -500 else np.minimum
    seen = tubes.chosen(tubes.radii_mm.sum(axis=1) > _LEAST_SHARE * edge_mm)
    for start, end, (first, last) in zip(seen.starts_mm, seen.ends_mm, seen.radii_mm, strict=True):
        reach = max(first, last) + edge_mm
        box = grid.box_around(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        if box is None:
            continue
        share = coverage(_distance_to_tube(grid.axes_in(box), start, end, first, last), edge_mm)
        share *= np.float32(min(1.0, (first + last) / edge_mm))  # a tube thinner than the edge never fills a voxel
        if only_in is not None:
            share *= only_in[box]
        part = hu[box]
        keep(part, part + share * (np.float32(value) - part), out=part)


def _distance_to_tube(axes: Axes, start: Points, end: Points, first: float, last: float) -> FloatVolume:
    """Signed distance to a conical tube with the radii `first` and `last`."""
    axis = (end - start).astype(np.float32)
    length2 = max(float(axis @ axis), 1e-6)
    z, y, x = (axis - np.float32(origin) for axis, origin in zip(axes, start, strict=True))
    along = np.clip((z * axis[0] + y * axis[1] + x * axis[2]) / np.float32(length2), 0.0, 1.0)
    away2 = (z - along * axis[0]) ** 2 + (y - along * axis[1]) ** 2 + (x - along * axis[2]) ** 2
    distance: FloatVolume = np.sqrt(away2) - (first + along * np.float32(last - first))
    return distance
