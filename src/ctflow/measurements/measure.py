"""What was marked: its findings, in millilitres, millimetres and Hounsfield units.

Apart from `postprocess`, because the DICOM room reads it and knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctflow.core.model import HuRange, Segment
from ctflow.core.volume import FloatArray, Geometry, LabelArray, Volume, box_of_marked, marked_lines
from ctflow.measurements.lengths import axes_in_slices_mm, ends_of_rows, longest_distance_mm
from ctflow.measurements.plausibility import HU_RANGE, MOST_OUTSIDE, OUTSIDE_BODY, Checks, CountInBody, Implausible

MOST_FINDINGS = 100  # more are counted, not listed

Labels = npt.NDArray[np.uint8]
_Indices = npt.NDArray[np.int64]


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
        largest_at: Slice, row and column (array index d, h, w) that hold most of its voxels, each by itself.
        outside_body: Share of its voxels that lie outside the body; None where no body is known.
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
    """What was marked of one segment.

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
        volume: The CT in HU that the labels lie on, of the same shape.
        segments: What the label values mean.
        count_in_body: How many voxels of runs are the body's; None where no body is known.

    Returns:
        One entry a segment, also for those of which nothing is marked.

    Raises:
        ValueError: Labels and volume differ in shape.
    """
    if labels.shape != volume.array.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a volume of {volume.array.shape}")
    marked, checks = _marked_part(labels), Checks(volume, count_in_body)
    return tuple(_measure(_ranked(marked, segment, checks), volume, segment) for segment in segments)


def split_findings(
    labels: Labels, segments: Sequence[Segment], checks: Checks | None = None
) -> tuple[LabelArray, tuple[Segment, ...]]:
    """Give every finding a segment of its own, so that a viewer can show and name each.

    Args:
        labels: (D, H, W) uint8; value k marks the segment with number k.
        segments: What the label values mean.
        checks: What findings were checked against when they were measured; None ranks them by volume alone.

    Returns:
        The labels (D, H, W), uint16 where uint8 has too few values, and their segments, numbered from 1: of each class
        the largest `MOST_FINDINGS` findings, in the order of `SegmentMeasurements.findings`, then one segment for all
        others, if there are any. A class of which nothing is marked keeps its own, empty segment.
    """
    split = np.zeros(labels.shape, np.uint16)
    marked = _marked_part(labels)
    parts: list[Segment] = []
    for segment in segments:
        found = _ranked(marked, segment, checks)
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
    if not len(between):
        return 0
    marked, lost = _marked_part(labels), 0
    for segment in segments:
        found = _components_of(marked, segment.number)
        if found is not None:
            seen = np.unique(found.component[np.isin(found.runs.lines[:, 0], slices)])
            lost += len(found.voxels) - len(seen)
    return lost


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of a label map that holds all marks, and the array index (d, h, w) of its first voxel."""

    labels: Labels
    corner: _Indices


def _marked_part(labels: Labels) -> _Part | None:
    """What of a label map is to be looked at, one segment after another; None if nothing is marked."""
    box = box_of_marked(labels)
    return None if box is None else _Part(labels[box], np.array([axis.start for axis in box]))


@dataclass(frozen=True, eq=False)
class _Runs:
    """Marked voxels without a gap along w, in the order in which they lie in memory.

    Attributes:
        lines: (n, 2) d and h of each.
        first: (n,) w of its first voxel.
        last: (n,) w of its last.
    """

    lines: _Indices
    first: _Indices
    last: _Indices

    @property
    def lengths(self) -> _Indices:
        """(n,) voxels."""
        return self.last - self.first + 1

    def voxels(self, shape: Sequence[int]) -> _Indices:
        """Index of every voxel in a flat array of this shape."""
        starts = (self.lines[:, 0] * shape[1] + self.lines[:, 1]) * shape[2] + self.first
        lengths = self.lengths
        before = np.cumsum(lengths) - lengths
        return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))

    def __getitem__(self, some: slice) -> _Runs:
        return _Runs(self.lines[some], self.first[some], self.last[some])


@dataclass(frozen=True, eq=False)
class _Components:
    """The connected components of one segment, numbered from 0 by their first voxels.

    Attributes:
        runs: All of the segment, each component's together.
        component: Of each run.
        starts: Number of each component's first run.
        voxels: Of each component.
        largest: The `MOST_FINDINGS` components that are listed, in their order.
        outside_body: Share of each component's voxels outside the body; None where no body is known.
        implausible: The checks that each component fails, by name; (n,) bool.
    """

    runs: _Runs
    component: _Indices
    starts: _Indices
    voxels: _Indices
    largest: _Indices
    outside_body: FloatArray | None = None
    implausible: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def fails(self) -> npt.NDArray[np.bool_]:
        """(n,) whether each component fails any check."""
        fails = np.zeros(len(self.voxels), bool)
        for failed in self.implausible.values():
            fails |= failed
        return fails

    def boxes(self) -> tuple[_Indices, _Indices]:
        """(n, 3) first and last index d, h, w of each component."""
        runs = self.runs
        first = np.minimum.reduceat(np.column_stack([runs.lines, runs.first]), self.starts)
        return first, np.maximum.reduceat(np.column_stack([runs.lines, runs.last]), self.starts)

    def mask(self, index: int) -> tuple[npt.NDArray[np.bool_], _Indices]:
        """One component in its smallest box, and where the box begins."""
        runs = self.runs[slice(self.starts[index], [*self.starts[1:], None][index])]
        corner = np.array([*runs.lines.min(axis=0), runs.first.min()])
        end = np.array([*runs.lines.max(axis=0), runs.last.max()])
        mask = np.zeros(end - corner + 1, bool)
        inside = _Runs(runs.lines - corner[:2], runs.first - corner[2], runs.last - corner[2])
        mask.reshape(-1)[inside.voxels(mask.shape)] = True
        return mask, corner


def _components_of(marked: _Part | None, number: int) -> _Components | None:
    """The components (26 neighbours) of the segment with this number; None if nothing of it is marked."""
    if marked is None:
        return None
    runs = _runs_of(marked.labels, number)
    if not len(runs.first):
        return None
    pairs = _touching(runs, marked.labels.shape)
    links = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(runs.first),) * 2)
    count, names = connected_components(links, directed=False)
    first = np.empty(count, np.int64)
    first[names[::-1]] = np.arange(len(names))[::-1]  # of a name's runs the first is written last
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(first)] = np.arange(count)
    component = numbers[names]
    order = np.argsort(component, kind="stable")
    moved = _Runs(runs.lines + marked.corner[:2], runs.first + marked.corner[2], runs.last + marked.corner[2])
    sorted_runs = _Runs(moved.lines[order], moved.first[order], moved.last[order])
    component = component[order]
    starts = np.searchsorted(component, np.arange(count))
    voxels = np.add.reduceat(sorted_runs.lengths, starts)
    return _Components(sorted_runs, component, starts, voxels, np.argsort(-voxels, kind="stable")[:MOST_FINDINGS])


def _ranked(marked: _Part | None, segment: Segment, checks: Checks | None) -> _Components | None:
    """The components of a segment, checked, those that pass before the others; None if nothing of it is marked."""
    found = _components_of(marked, segment.number)
    if found is None or checks is None:
        return found
    runs, outside = found.runs, None
    failed: dict[str, npt.NDArray[np.bool_]] = {}
    if checks.count_in_body is not None:
        inside = np.add.reduceat(checks.count_in_body(runs.lines, runs.first, runs.last), found.starts)
        outside = 1.0 - inside / found.voxels
        failed[OUTSIDE_BODY] = outside > MOST_OUTSIDE
    if segment.hu_range is not None:
        hu = checks.volume.array.reshape(-1)[runs.voxels(checks.volume.array.shape)]
        starts = np.cumsum(found.voxels) - found.voxels
        mean_hu = np.add.reduceat(hu, starts, dtype=np.float64) / found.voxels
        low, high = segment.hu_range
        failed[HU_RANGE] = (mean_hu < low) | (mean_hu > high)
    found = replace(found, outside_body=outside, implausible=failed)
    return replace(found, largest=np.lexsort((-found.voxels, found.fails))[:MOST_FINDINGS])


def _runs_of(labels: Labels, number: int) -> _Runs:
    # On both sides of each line lies a voxel of nothing, so that no run goes over from one line to the next.
    lines = marked_lines(labels)
    marked = np.zeros((labels.shape[1], labels.shape[2] + 2), bool)
    found, places = [], []
    for index in np.flatnonzero(lines.any(axis=1)).tolist():  # a slice at a time stays in the cache
        rows = np.flatnonzero(lines[index])
        part = marked[: len(rows)]
        np.equal(labels[index][rows], number, out=part[:, 1:-1])
        flat = part.reshape(-1)
        edges = np.flatnonzero(flat[1:] != flat[:-1])  # a beginning and an end in turn
        line, first = np.divmod(edges[::2], marked.shape[1])
        found.append(np.column_stack([np.full(len(line), index), rows[line]]))
        places.append(np.column_stack([first, first + edges[1::2] - edges[::2] - 1]))
    if not found:
        return _Runs(np.empty((0, 2), np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    first, last = np.concatenate(places).T
    return _Runs(np.concatenate(found), first, last)


def _touching(runs: _Runs, shape: Sequence[int]) -> _Indices:
    """(m, 2) pairs of runs of neighbouring lines with voxels that touch, if only at a corner."""
    # A line's numbers and those of the next do not touch, nor do the last line's of a slice and the next slice's first.
    rows, columns = shape[1] + 2, shape[2] + 2
    starts = (runs.lines[:, 0] * rows + runs.lines[:, 1]) * columns + runs.first
    ends = starts + runs.last - runs.first
    pairs = []
    for slices, lines in ((0, 1), (1, -1), (1, 0), (1, 1)):  # the other four are these, seen from the other side
        step = (slices * rows + lines) * columns
        low = np.searchsorted(ends, starts + step - 1)
        high = np.searchsorted(starts, ends + step + 1, side="right")
        counts = np.maximum(high - low, 0)
        before = np.cumsum(counts) - counts
        others = np.repeat(low - before, counts) + np.arange(int(counts.sum()))
        pairs.append(np.column_stack([np.repeat(np.arange(len(starts)), counts), others]))
    return np.concatenate(pairs)


def _measure(found: _Components | None, volume: Volume, segment: Segment) -> SegmentMeasurements:
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


def _implausible(found: _Components, geometry: Geometry) -> Implausible:
    fails = found.fails
    by_reason = {reason: int(np.count_nonzero(failed)) for reason, failed in found.implausible.items()}
    return Implausible(
        int(np.count_nonzero(fails)),
        float(found.voxels[fails].sum()) * geometry.voxel_ml,
        by_reason.get(OUTSIDE_BODY, 0),
        by_reason.get(HU_RANGE, 0),
    )


def _centre(runs: _Runs) -> FloatArray:
    """Mean index d, h, w of all voxels; summed in whole numbers from a corner, so that nothing is lost on the way."""
    lengths = runs.lengths
    corner = np.array([*runs.lines.min(axis=0), runs.first.min()])
    along = (runs.first + runs.last - 2 * corner[2]) * lengths // 2
    sums = np.array([*((runs.lines - corner[:2]) * lengths[:, None]).sum(axis=0), along.sum()])
    centre: FloatArray = sums / lengths.sum() + corner
    return centre


def _worth_measuring(found: _Components, geometry: Geometry, longest_mm: float) -> list[int]:
    """Components, not among the largest, whose bounding box is longer than the longest diameter so far."""
    if len(found.largest) == len(found.voxels):
        return []
    first, last = found.boxes()
    corners = np.array([[1, b, c] for b in (-1, 1) for c in (-1, 1)])  # a sheared box has four diagonals
    diagonals = ((last - first)[:, None, :] * corners[None]) @ geometry.affine_mm[:3, :3].T
    reach = np.linalg.norm(diagonals, axis=2).max(axis=1)
    reach[found.largest] = 0.0
    return np.flatnonzero(reach > longest_mm).tolist()


def _finding(found: _Components, component: int, volume: Volume) -> Finding:
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
