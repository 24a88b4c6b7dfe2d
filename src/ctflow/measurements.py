"""What was marked: its findings, in millilitres, millimetres and Hounsfield units.

Apart from `postprocess`, because the DICOM room reads it and knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from ctflow.model import Segment
from ctflow.volume import FloatArray, Geometry, LabelArray, Volume

MOST_FINDINGS = 100  # more are counted, not listed
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbours, so that a thin oblique vessel of voxels is one component
_EQUAL = 1e-9  # lengths that differ by less, relatively, differ by rounding only

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Finding:
    """One connected component. Lengths are between voxel centres, and so 0 for a single voxel.

    Attributes:
        volume_ml: Voxels times the voxel's volume.
        longest_diameter_mm: Largest distance between two of its voxel centres.
        long_axis_mm: The same within one slice of the series, in the slice where it is largest.
        short_axis_mm: Extent at right angles to the long axis, in the long axis' slice.
        mean_hu: Mean of its voxels.
        sd_hu: Their standard deviation (divided by n, so that a single voxel has 0).
        centroid_mm: Mean of its voxel centres, LPS.
    """

    volume_ml: float
    longest_diameter_mm: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float
    sd_hu: float
    centroid_mm: tuple[float, float, float]


@dataclass(frozen=True)
class SegmentMeasurements:
    """What was marked of one segment.

    Attributes:
        number: The segment's value in the label map.
        label: Its name.
        voxels: Marked voxels.
        volume_ml: Their volume.
        longest_diameter_mm: The largest of its components' diameters; None if nothing is marked.
        centroid_mm: Mean of all marked voxel centres, LPS; None if nothing is marked.
        components: Connected components (26 neighbours).
        findings: The largest `MOST_FINDINGS` components, by volume, then by place.
        findings_left_out: How many more there are.
    """

    number: int
    label: str
    voxels: int
    volume_ml: float
    longest_diameter_mm: float | None
    centroid_mm: tuple[float, float, float] | None
    components: int
    findings: tuple[Finding, ...]
    findings_left_out: int


def measure_segments(labels: Labels, volume: Volume, segments: Sequence[Segment]) -> tuple[SegmentMeasurements, ...]:
    """Measure every segment of a label map.

    Args:
        labels: (D, H, W) uint8.
        volume: The CT in HU that the labels lie on, of the same shape.
        segments: What the label values mean.

    Returns:
        One entry a segment, also for those of which nothing is marked.

    Raises:
        ValueError: Labels and volume differ in shape.
    """
    if labels.shape != volume.array.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a volume of {volume.array.shape}")
    return tuple(_measure(labels, volume, segment) for segment in segments)


def split_findings(labels: Labels, segments: Sequence[Segment]) -> tuple[LabelArray, tuple[Segment, ...]]:
    """Give every finding a segment of its own, so that a viewer can show and name each.

    Args:
        labels: (D, H, W) uint8; value k marks the segment with number k.
        segments: What the label values mean.

    Returns:
        The labels (D, H, W), uint16 where uint8 has too few values, and their segments, numbered from 1: of each class
        the largest `MOST_FINDINGS` findings, in the order of `SegmentMeasurements.findings`, then one segment for all
        others, if there are any. A class of which nothing is marked keeps its own, empty segment.
    """
    split = np.zeros(labels.shape, np.uint16)
    parts: list[Segment] = []
    for segment in segments:
        found = _components_of(labels, segment.number)
        if found is None:
            parts.append(replace(segment, number=len(parts) + 1))
            continue
        numbers = np.zeros(len(found.voxels) + 1, np.uint16)  # of the component's number in `found`
        for rank, index in enumerate(found.largest, start=1):
            numbers[index + 1] = len(parts) + 1
            parts.append(_part(segment, len(parts) + 1, rank))
        if len(found.largest) < len(found.voxels):
            numbers[1:][numbers[1:] == 0] = len(parts) + 1
            parts.append(_part(segment, len(parts) + 1, None))
        split[found.box] += numbers[found.array]  # the classes do not overlap
    few = len(parts) <= np.iinfo(np.uint8).max
    return (split.astype(np.uint8) if few else split), tuple(parts)


def _part(segment: Segment, number: int, rank: int | None) -> Segment:
    which = "other findings" if rank is None else str(rank)
    room = 64 - len(which) - 1  # characters of a Segment Label (VR LO): the number must not be what is cut off
    label = f"{segment.label[:room].strip()} {which}"
    return replace(segment, number=number, label=label, part_of=segment.number, rank=rank)


def count_findings_between(labels: Labels, slices: Sequence[int], segments: Sequence[Segment]) -> int:
    """How many findings of a resampled volume lie between the slices that there are.

    Args:
        labels: (D, H, W) uint8; value k marks the segment with number k.
        slices: Indices d that stand for slices of the series.
        segments: What the label values mean.
    """
    between = np.setdiff1d(np.arange(len(labels)), slices)
    lost = 0
    for segment in segments if len(between) else ():
        found = _components_of(labels, segment.number)
        if found is not None:
            kept = [d - found.box[0].start for d in set(slices)]
            seen = np.unique(found.array[[d for d in kept if 0 <= d < len(found.array)]])
            lost += len(found.voxels) - int(np.count_nonzero(seen))
    return lost


@dataclass(frozen=True, eq=False)
class _Components:
    """The connected components of one segment: `array` numbers them from 1 within `box` of the label map."""

    box: tuple[slice, slice, slice]
    array: npt.NDArray[np.int32]
    voxels: npt.NDArray[np.int64]  # of each component
    largest: npt.NDArray[np.int64]  # indices into `voxels`, by volume, then by place


def _components_of(labels: Labels, number: int) -> _Components | None:
    """The components of the segment with this number; None if nothing of it is marked."""
    box = _bounding_box(labels == number)
    if box is None:
        return None
    array, count = ndimage.label(labels[box] == number, structure=_TOUCHING)
    voxels = np.bincount(array.ravel(), minlength=count + 1)[1:]
    return _Components(box, array, voxels, np.argsort(-voxels, kind="stable")[:MOST_FINDINGS])


def _measure(labels: Labels, volume: Volume, segment: Segment) -> SegmentMeasurements:
    geometry = volume.geometry
    found = _components_of(labels, segment.number)
    if found is None:
        return SegmentMeasurements(segment.number, segment.label, 0, 0.0, None, None, 0, (), 0)
    components, voxels, largest = found.array, found.voxels, found.largest
    corner = np.array([axis.start for axis in found.box])
    places = ndimage.find_objects(components)
    offsets = [corner + [s.start for s in place] for place in places]
    findings = tuple(_finding(components[places[index]] == index + 1, offsets[index], volume) for index in largest)
    # The longest diameter of all may belong to a thin component that is not among the largest by volume.
    longest = max(finding.longest_diameter_mm for finding in findings)
    for index in _worth_measuring(places, geometry, longest, set(largest.tolist())):
        longest = max(longest, _diameter_mm(components[places[index]] == index + 1, offsets[index], geometry))
    centre = geometry.world_from_index(np.argwhere(components).mean(axis=0) + corner)
    return SegmentMeasurements(
        segment.number,
        segment.label,
        int(voxels.sum()),
        float(voxels.sum()) * geometry.voxel_ml,
        longest,
        (float(centre[0]), float(centre[1]), float(centre[2])),
        len(voxels),
        findings,
        len(voxels) - len(findings),
    )


def _worth_measuring(
    places: Sequence[tuple[slice, ...]], geometry: Geometry, longest_mm: float, done: set[int]
) -> list[int]:
    """Components whose bounding box is longer than the longest diameter so far."""
    sizes = np.array([[s.stop - s.start - 1 for s in place] for place in places])
    corners = np.array([[1, b, c] for b in (-1, 1) for c in (-1, 1)])  # a sheared box has four diagonals
    diagonals = (sizes[:, None, :] * corners[None]) @ geometry.affine_mm[:3, :3].T
    reach = np.linalg.norm(diagonals, axis=2).max(axis=1)
    return [int(index) for index in np.flatnonzero(reach > longest_mm) if int(index) not in done]


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        marked = np.flatnonzero(mask.any(axis=others))
        if not len(marked):
            return None
        spans.append(slice(int(marked[0]), int(marked[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _finding(mask: npt.NDArray[np.bool_], offset: npt.NDArray[np.int64], volume: Volume) -> Finding:
    geometry = volume.geometry
    index = np.argwhere(mask) + offset
    x, y, z = geometry.world_from_index(index.mean(axis=0))
    long, short = axes_in_slices_mm(mask, geometry)
    hu = volume.array[tuple(index.T)].astype(np.float64)
    return Finding(
        len(index) * geometry.voxel_ml,
        _diameter_mm(mask, offset, geometry),
        long,
        short,
        float(hu.mean()),
        float(hu.std()),
        (float(x), float(y), float(z)),
    )


def _diameter_mm(mask: npt.NDArray[np.bool_], offset: npt.NDArray[np.int64], geometry: Geometry) -> float:
    return longest_distance_mm(geometry.world_from_index(_ends_of_rows(mask) + offset))


def axes_in_slices_mm(mask: npt.NDArray[np.bool_], geometry: Geometry) -> tuple[float, float]:
    """Long and short axis of a component, as a radiologist takes them: in one slice.

    Args:
        mask: (D, H, W) bool, the component or a box around it.
        geometry: Its affine says how long a step is; its origin and shape do not matter.

    Returns:
        The largest distance of two voxel centres within a slice, in mm, and the extent at right angles to it in the
        same slice. Of equally long axes, the one with the largest extent counts, so that turning changes nothing.
    """
    # (2, 2): lengths in the slice's plane of a step along h and along w; also right where the two are not orthogonal.
    in_plane = np.linalg.qr(geometry.affine_mm[:3, 1:3])[1]
    long = short = 0.0
    for section in mask:
        if section.any():
            points = _ends_of_rows(section[None])[:, 1:] @ in_plane.T
            found_long, found_short = _axes_of_points(points)
            if found_long > long * (1 + _EQUAL):
                long, short = found_long, found_short
            elif found_long >= long * (1 - _EQUAL):
                short = max(short, found_short)
    return long, short


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


def _ends_of_rows(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """First and last marked voxel of each row: no other voxel can be a corner of the convex hull."""
    rows = np.argwhere(mask.any(axis=2))
    lines = mask[rows[:, 0], rows[:, 1]]
    first = lines.argmax(axis=1)
    last = lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
    ends: npt.NDArray[np.int64] = np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])
    return ends


def longest_distance_mm(points_mm: FloatArray) -> float:
    """Largest distance between two of (n, 3) points, in mm (exact: through the convex hull's corners)."""
    if len(points_mm) > 32:
        try:
            points_mm = points_mm[ConvexHull(points_mm).vertices]
        except QhullError:  # flat or straight: no hull in three dimensions
            points_mm = _flat_hull(points_mm)
    longest = 0.0
    for start in range(0, len(points_mm), 1024):
        steps = points_mm[start : start + 1024, None] - points_mm[None]
        longest = max(longest, float(np.einsum("ijk,ijk->ij", steps, steps).max()))
    return float(np.sqrt(longest))


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
