"""The outlines of what a label map marks, slice by slice, in mm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import contourpy
import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

from ctflow.core.volume import FloatArray, LabelArray

SIMPLIFIED_MM = 0.1  # largest distance between an outline and the simpler one that replaces it
_WHOLE = 255  # what fractions are parts of
_UNMASKED: Any = None  # contourpy takes it, though its annotations do not


@dataclass(frozen=True, eq=False)
class Outline:
    """One region of a slice.

    Attributes:
        number: The label that marks it.
        plane: Index d of the slice.
        outer: (n, 2) mm along a row and along a column from the centre of the slice's first pixel; closed, the first
            point is not repeated.
        holes: The same for each hole in it.
    """

    number: int
    plane: int
    outer: FloatArray
    holes: tuple[FloatArray, ...]


@dataclass(frozen=True, eq=False)
class Probabilities:
    """What places an outline between pixels better than the mask does.

    Attributes:
        fractions: (S, D, H, W) uint8, each segment's probability in 255ths.
        threshold: Probability from which on a single segment is marked.
    """

    fractions: npt.NDArray[np.uint8]
    threshold: float = 0.5

    def margin(self, number: int, place: tuple[int, slice, slice]) -> FloatArray:
        """By how much a segment is more likely than every other and the background, in 255ths."""
        some = self.fractions[(slice(None), *place)].astype(np.int32)
        own = some[number - 1]
        if len(some) == 1:
            over: FloatArray = own - _WHOLE * self.threshold
            return over
        rivals = np.concatenate([np.delete(some, number - 1, axis=0), _WHOLE - some.sum(axis=0, keepdims=True)])
        margin: FloatArray = (own - rivals.max(axis=0)).astype(np.float64)
        return margin


def outlines_of_labels(
    labels: LabelArray, pixel_mm: Sequence[float], probabilities: Probabilities | None = None
) -> list[Outline]:
    """Outline every label in every slice.

    Args:
        labels: (D, H, W); every value but 0 is outlined.
        pixel_mm: Distance between rows, and between columns.
        probabilities: Of the labels' segments; an outline lies where the segment stops being the most likely. Without
            them it lies halfway between a marked pixel and its unmarked neighbour (marching squares on the mask).

    Returns:
        By label, then slice. A pixel's centre lies inside an outline if it is marked, apart from what simplifying
        within `SIMPLIFIED_MM` moves; outlines of a label do not touch each other, and none crosses itself.
    """
    keys: list[tuple[int, int]] = []
    regions = []
    for plane, number, box in _boxes(labels):
        keys.append((number, plane))
        regions.append(_region(_margin(labels, plane, number, box, probabilities), box, pixel_mm))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    found = np.array([regions[index] for index in order], dtype=object)
    return list(_outlines(_simplified(found), [keys[index] for index in order])) if keys else []


def keyhole(outline: Outline) -> FloatArray:
    """One closed line around a region with holes: it enters each hole, and leaves it, through a channel of no width.

    Args:
        outline: With or without holes.

    Returns:
        (n, 2) mm. From the leftmost point of every hole a channel leads to the left until it meets the line so far.
        As holes are joined from left to right, a channel meets nothing else.

    Source: DICOM PS3.3 C.8.8.6.3.
    """
    ring = outline.outer
    starts = [int(np.lexsort((hole[:, 1], hole[:, 0]))[0]) for hole in outline.holes]
    rotated = [np.roll(hole, -start, axis=0) for hole, start in zip(outline.holes, starts, strict=True)]
    for hole in sorted(rotated, key=lambda points: tuple(points[0])):
        edge, meeting = _left_of(hole[0], ring)
        ring = np.concatenate([ring[: edge + 1], [meeting], hole, hole[:1], [meeting], ring[edge + 1 :]])
    return ring


def _left_of(point: FloatArray, ring: FloatArray) -> tuple[int, FloatArray]:
    """The edge of a ring that lies next to the left of a point in it, and where."""
    first, second = ring, np.roll(ring, -1, axis=0)
    rise = second[:, 1] - first[:, 1]
    across = (np.minimum(first[:, 1], second[:, 1]) <= point[1]) & (point[1] <= np.maximum(first[:, 1], second[:, 1]))
    edges = np.flatnonzero(across & (rise != 0))
    share = (point[1] - first[edges, 1]) / rise[edges]
    x = first[edges, 0] + share * (second[edges, 0] - first[edges, 0])
    x[x >= point[0]] = -np.inf
    nearest = int(x.argmax())
    return int(edges[nearest]), np.array([x[nearest], point[1]])


def _boxes(labels: LabelArray) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Slice, label and the smallest box of every label in every slice."""
    for plane, marks in enumerate(labels):
        for index, box in enumerate(ndimage.find_objects(marks) if marks.any() else ()):
            if box is not None:
                yield plane, index + 1, box


def _margin(
    labels: LabelArray, plane: int, number: int, box: tuple[slice, slice], probabilities: Probabilities | None
) -> FloatArray:
    """A field over a box and one pixel around it: above 0 where the label is marked, below 0 elsewhere."""
    sizes = list(zip(box, labels.shape[1:], strict=True))
    rows, columns = (slice(max(axis.start - 1, 0), min(axis.stop + 1, size)) for axis, size in sizes)
    place = (plane, rows, columns)
    marked = labels[place] == number
    if probabilities is None:
        margin = np.where(marked, 1.0, -1.0)
    else:
        likely = probabilities.margin(number, place)  # label steps may have changed the mask since
        margin = np.where(marked, np.maximum(likely, 1.0), np.minimum(likely, -1.0))
    beyond = [(int(axis.start == 0), int(axis.stop == size)) for axis, size in sizes]
    outside = -1.0 if probabilities is None else -float(_WHOLE)
    return np.pad(margin, beyond, constant_values=outside)


def _region(margin: FloatArray, box: tuple[slice, slice], pixel_mm: Sequence[float]) -> shapely.MultiPolygon:
    """Where a field is above 0, in mm."""
    y, x = ((np.arange(size) + axis.start - 1) * mm for size, axis, mm in zip(margin.shape, box, pixel_mm, strict=True))
    # Not `contour_generator`, which looks for invalid values: that takes as long as all else here.
    across, down = np.meshgrid(x, y)
    generator = contourpy.SerialContourGenerator(
        across,
        down,
        margin,
        _UNMASKED,
        corner_mask=True,
        line_type=contourpy.LineType.Separate,
        fill_type=contourpy.FillType.ChunkCombinedOffsetOffset,
        quad_as_tri=False,
        z_interp=contourpy.ZInterp.Linear,
    )
    filled: Any = generator.filled(0.0, np.inf)  # its type depends on the type of filling
    (points,), (rings,), (polygons,) = filled
    offsets = (rings, polygons, np.array([0, len(polygons) - 1], np.uint32))
    region: shapely.MultiPolygon = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, points, offsets)[0]
    return region


def _simplified(regions: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Regions with fewer points, of which none crosses itself or another (Douglas-Peucker, as GEOS does it)."""
    simple = shapely.simplify(regions, SIMPLIFIED_MM, preserve_topology=True)
    found: npt.NDArray[np.object_] = np.where(shapely.is_valid(simple), simple, regions)
    return found


def _outlines(regions: npt.NDArray[np.object_], keys: Sequence[tuple[int, int]]) -> Iterator[Outline]:
    polygons, of_region = shapely.get_parts(regions, return_index=True)
    rings, of_polygon = shapely.get_rings(polygons, return_index=True)
    points, of_ring = shapely.get_coordinates(rings, return_index=True)
    lines = [line[:-1] for line in np.split(points, np.flatnonzero(np.diff(of_ring)) + 1)]
    starts = np.searchsorted(of_polygon, np.arange(len(polygons) + 1)).tolist()
    for index, region in enumerate(of_region.tolist()):
        outer, *holes = lines[starts[index] : starts[index + 1]]
        number, plane = keys[region]
        yield Outline(number, plane, outer, tuple(holes))
