"""Measurements of a mask: its findings, in millilitres, millimetres and Hounsfield units.

Separate from `postprocess`, because dicom/ uses it and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ctflow.core.model import HuRange, Segment
from ctflow.core.volume import FloatArray, Geometry, LabelArray, Labels, Volume
from ctflow.measurements.components import Components, Runs, components_of, marked_part, ranked
from ctflow.measurements.lengths import axes_in_slices_mm, ends_of_rows, longest_distance_mm
from ctflow.measurements.plausibility import HU_RANGE, OUTSIDE_BODY, Checks, CountInBody, Implausible


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
        largest_at: Slice, row and column (array index d, h, w) that hold most of its voxels, each on its own.
        outside_body: Share of its voxels outside the body; None if no body is known.
        implausible: The checks that it fails (`ctflow.measurements.plausibility`).
    """

    volume_ml: float
    longest_diameter_mm: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float
    sd_hu: float
    centroid_mm: tuple[float, float, float]
    largest_at: tuple[int, int, int]
    outside_body: float | None
    implausible: tuple[str, ...]


@dataclass(frozen=True)
class SegmentMeasurements:
    """The measurements of one segment.

    Attributes:
        number: The segment's value in the label map.
        label: Its name.
        voxels: Marked voxels.
        volume_ml: Their volume.
        longest_diameter_mm: The largest of its components' diameters; None if nothing is marked.
        centroid_mm: Mean of all marked voxel centres, LPS; None if nothing is marked.
        components: Connected components (26 neighbours).
        findings: `MOST_FINDINGS` components: those that pass all checks before the others, the largest first, then by
            place.
        findings_left_out: How many more there are.
        hu_range: Lowest and highest mean HU that the bundle allows.
        implausible: The components that fail a check, listed or not.
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
    hu_range: HuRange | None
    implausible: Implausible


def measure_segments(
    labels: Labels, volume: Volume, segments: Sequence[Segment], count_in_body: CountInBody | None = None
) -> tuple[SegmentMeasurements, ...]:
    """Measure every segment of a label map, and check every finding.

    Args:
        labels: (D, H, W) uint8.
        volume: The CT in HU of the labels, with the same shape.
        segments: Meaning of the label values.
        count_in_body: Counts the body's voxels in runs; None if no body is known.

    Returns:
        One entry per segment, also for those without marks.

    Raises:
        ValueError: Labels and volume differ in shape.
    """
    if labels.shape != volume.array.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a volume of {volume.array.shape}")
    marked, checks = marked_part(labels), Checks(volume, count_in_body)
    return tuple(_measure(ranked(marked, segment, checks), volume, segment) for segment in segments)


def split_findings(
    labels: Labels, segments: Sequence[Segment], checks: Checks | None = None
) -> tuple[LabelArray, tuple[Segment, ...]]:
    """Give every finding its own segment, so that a viewer can show and name each.

    Args:
        labels: (D, H, W) uint8; value k marks the segment with number k.
        segments: Meaning of the label values.
        checks: The checks of findings when they were measured; None ranks them only by volume.

    Returns:
        The labels (D, H, W), uint16 where uint8 has too few values, and their segments, numbered from 1: of each class
        the largest `MOST_FINDINGS` findings, in the order of `SegmentMeasurements.findings`, then one segment for all
        others, if there are any. A class without marks keeps its own, empty segment.
    """
    split = np.zeros(labels.shape, np.uint16)
    marked = marked_part(labels)
    parts: list[Segment] = []
    for segment in segments:
        found = ranked(marked, segment, checks)
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
        voxels = found.runs.voxels(labels.shape)
        split.reshape(-1)[voxels] = np.repeat(numbers[found.component + 1], found.runs.lengths)
    few = len(parts) <= np.iinfo(np.uint8).max
    return (split.astype(np.uint8) if few else split), tuple(parts)


def _part(segment: Segment, number: int, rank: int | None) -> Segment:
    which = "other findings" if rank is None else str(rank)
    room = 64 - len(which) - 1  # characters of a Segment Label (VR LO): the number must not be cut off
    label = f"{segment.label[:room].strip()} {which}"
    return replace(segment, number=number, label=label, part_of=segment.number, rank=rank)


def count_findings_between(labels: Labels, slices: Sequence[int], segments: Sequence[Segment]) -> int:
    """Number of findings of a resampled volume between the series' slices.

    Args:
        labels: (D, H, W) uint8; value k marks the segment with number k.
        slices: Indices d of the series' slices.
        segments: Meaning of the label values.
    """
    between = np.setdiff1d(np.arange(len(labels)), slices)
    if not len(between):
        return 0
    marked, lost = marked_part(labels), 0
    for segment in segments:
        found = components_of(marked, segment.number)
        if found is not None:
            seen = np.unique(found.component[np.isin(found.runs.lines[:, 0], slices)])
            lost += len(found.voxels) - len(seen)
    return lost


def _measure(found: Components | None, volume: Volume, segment: Segment) -> SegmentMeasurements:
    geometry = volume.geometry
    if found is None:
        measured = (0, 0.0, None, None, 0, (), 0)
        return SegmentMeasurements(segment.number, segment.label, *measured, segment.hu_range, Implausible())
    findings = tuple(_finding(found, index, volume) for index in found.largest.tolist())
    # The longest diameter of all may belong to a thin component that is not among the largest by volume.
    longest = max(finding.longest_diameter_mm for finding in findings)
    for index in _worth_measuring(found, geometry, longest):
        longest = max(longest, _diameter_mm(*found.mask(index), geometry))
    centre = geometry.world_from_index(_centre(found.runs))
    voxels = int(found.voxels.sum())
    return SegmentMeasurements(
        segment.number,
        segment.label,
        voxels,
        float(voxels) * geometry.voxel_ml,
        longest,
        (float(centre[0]), float(centre[1]), float(centre[2])),
        len(found.voxels),
        findings,
        len(found.voxels) - len(findings),
        segment.hu_range,
        _implausible(found, geometry),
    )


def _implausible(found: Components, geometry: Geometry) -> Implausible:
    fails = found.fails
    by_reason = {reason: int(np.count_nonzero(failed)) for reason, failed in found.implausible.items()}
    return Implausible(
        int(np.count_nonzero(fails)),
        float(found.voxels[fails].sum()) * geometry.voxel_ml,
        by_reason.get(OUTSIDE_BODY, 0),
        by_reason.get(HU_RANGE, 0),
    )


def _centre(runs: Runs) -> FloatArray:
    """Mean index d, h, w of all voxels; summed in integers from a corner, so that no precision is lost."""
    lengths = runs.lengths
    corner = np.array([*runs.lines.min(axis=0), runs.first.min()])
    along = (runs.first + runs.last - 2 * corner[2]) * lengths // 2
    sums = np.array([*((runs.lines - corner[:2]) * lengths[:, None]).sum(axis=0), along.sum()])
    centre: FloatArray = sums / lengths.sum() + corner
    return centre


def _worth_measuring(found: Components, geometry: Geometry, longest_mm: float) -> list[int]:
    """Components, not among the largest, whose bounding box is longer than the longest diameter so far."""
    if len(found.largest) == len(found.voxels):
        return []
    first, last = found.boxes()
    corners = np.array([[1, b, c] for b in (-1, 1) for c in (-1, 1)])  # a sheared box has four diagonals
    diagonals = ((last - first)[:, None, :] * corners[None]) @ geometry.affine_mm[:3, :3].T
    reach = np.linalg.norm(diagonals, axis=2).max(axis=1)
    reach[found.largest] = 0.0
    return np.flatnonzero(reach > longest_mm).tolist()


def _finding(found: Components, component: int, volume: Volume) -> Finding:
    mask, offset = found.mask(component)
    geometry = volume.geometry
    index = np.argwhere(mask) + offset
    x, y, z = geometry.world_from_index(index.mean(axis=0))
    long, short = axes_in_slices_mm(mask, geometry)
    hu = volume.array[tuple(index.T)].astype(np.float64)
    d, h, w = (int(mask.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))
    return Finding(
        len(index) * geometry.voxel_ml,
        _diameter_mm(mask, offset, geometry),
        long,
        short,
        float(hu.mean()),
        float(hu.std()),
        (float(x), float(y), float(z)),
        (d + int(offset[0]), h + int(offset[1]), w + int(offset[2])),
        None if found.outside_body is None else float(found.outside_body[component]),
        tuple(reason for reason, failed in found.implausible.items() if failed[component]),
    )


def _diameter_mm(mask: npt.NDArray[np.bool_], offset: npt.NDArray[np.int64], geometry: Geometry) -> float:
    return longest_distance_mm(geometry.world_from_index(ends_of_rows(mask) + offset))
