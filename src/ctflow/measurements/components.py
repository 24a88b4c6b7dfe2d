"""The findings of a label map: connected components, ranked, each as runs of voxels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ctflow.core.model import Segment
from ctflow.core.volume import FloatArray, Indices, LabelArray, box_of_marked, marked_lines
from ctflow.measurements.plausibility import HU_RANGE, MOST_OUTSIDE, OUTSIDE_BODY, Checks

MOST_FINDINGS = 100  # more are counted, not listed


@dataclass(frozen=True, eq=False)
class MarkedPart:
    """The part of a label map that holds all marks, and the array index (d, h, w) of its first voxel."""

    labels: LabelArray
    corner: Indices


def marked_part(labels: LabelArray) -> MarkedPart | None:
    """The part of a label map to process, one segment after another; None if nothing is marked."""
    box = box_of_marked(labels)
    return None if box is None else MarkedPart(labels[box], np.array([axis.start for axis in box]))


@dataclass(frozen=True, eq=False)
class Runs:
    """Marked voxels without a gap along w, in memory order.

    Attributes:
        lines: (n, 2) d and h of each.
        first: (n,) w of its first voxel.
        last: (n,) w of its last.
    """

    lines: Indices
    first: Indices
    last: Indices

    @property
    def lengths(self) -> Indices:
        """(n,) voxels."""
        return self.last - self.first + 1

    def voxels(self, shape: Sequence[int]) -> Indices:
        """Index of every voxel in a flat array of this shape."""
        starts = (self.lines[:, 0] * shape[1] + self.lines[:, 1]) * shape[2] + self.first
        lengths = self.lengths
        before = np.cumsum(lengths) - lengths
        return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))

    def __getitem__(self, some: slice) -> Runs:
        return Runs(self.lines[some], self.first[some], self.last[some])


@dataclass(frozen=True, eq=False)
class Components:
    """The connected components of one segment, numbered from 0 by their first voxels.

    Attributes:
        runs: All of the segment, each component's together.
        component: Of each run.
        starts: Number of each component's first run.
        voxels: Of each component.
        largest: The `MOST_FINDINGS` components that are listed, in their order.
        outside_body: Share of each component's voxels outside the body; None if no body is known.
        implausible: The checks that each component fails, by name; (n,) bool.
    """

    runs: Runs
    component: Indices
    starts: Indices
    voxels: Indices
    largest: Indices
    outside_body: FloatArray | None = None
    implausible: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def fails(self) -> npt.NDArray[np.bool_]:
        """(n,) whether each component fails any check."""
        fails = np.zeros(len(self.voxels), bool)
        for failed in self.implausible.values():
            fails |= failed
        return fails

    def boxes(self) -> tuple[Indices, Indices]:
        """(n, 3) first and last index d, h, w of each component."""
        runs = self.runs
        first = np.minimum.reduceat(np.column_stack([runs.lines, runs.first]), self.starts)
        return first, np.maximum.reduceat(np.column_stack([runs.lines, runs.last]), self.starts)

    def mask(self, index: int) -> tuple[npt.NDArray[np.bool_], Indices]:
        """One component in its smallest box, and where the box begins."""
        runs = self.runs[slice(self.starts[index], [*self.starts[1:], None][index])]
        corner = np.array([*runs.lines.min(axis=0), runs.first.min()])
        end = np.array([*runs.lines.max(axis=0), runs.last.max()])
        mask = np.zeros(end - corner + 1, bool)
        inside = Runs(runs.lines - corner[:2], runs.first - corner[2], runs.last - corner[2])
        mask.reshape(-1)[inside.voxels(mask.shape)] = True
        return mask, corner


def components_of(marked: MarkedPart | None, number: int) -> Components | None:
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
    first[names[::-1]] = np.arange(len(names))[::-1]  # the first run of a name is written last
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(first)] = np.arange(count)
    component = numbers[names]
    order = np.argsort(component, kind="stable")
    moved = Runs(runs.lines + marked.corner[:2], runs.first + marked.corner[2], runs.last + marked.corner[2])
    sorted_runs = Runs(moved.lines[order], moved.first[order], moved.last[order])
    component = component[order]
    starts = np.searchsorted(component, np.arange(count))
    voxels = np.add.reduceat(sorted_runs.lengths, starts)
    return Components(sorted_runs, component, starts, voxels, np.argsort(-voxels, kind="stable")[:MOST_FINDINGS])


def without_small(labels: LabelArray, least_voxels: float) -> tuple[LabelArray, int]:
    """The labels without components (26 neighbours) of fewer voxels.

    Args:
        labels: (D, H, W), not changed.
        least_voxels: Voxels that a component needs to stay.

    Returns:
        The labels, themselves if every component stays, and how many components do not.
    """
    marked, gone, kept = marked_part(labels), 0, labels
    for index, box in enumerate([] if marked is None else ndimage.find_objects(marked.labels)):
        if marked is None or box is None:
            continue
        corner = marked.corner + [axis.start for axis in box]
        found = components_of(MarkedPart(marked.labels[box], corner), index + 1)
        if found is None or found.voxels.min() >= least_voxels:
            continue
        small = found.voxels < least_voxels
        kept = labels.copy() if kept is labels else kept
        of_small = np.repeat(small[found.component], found.runs.lengths)
        kept.reshape(-1)[found.runs.voxels(labels.shape)[of_small]] = 0
        gone += int(small.sum())
    return kept, gone


def ranked(marked: MarkedPart | None, segment: Segment, checks: Checks | None) -> Components | None:
    """The components of a segment, checked, those that pass before the others; None if nothing of it is marked."""
    found = components_of(marked, segment.number)
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


def _runs_of(labels: LabelArray, number: int) -> Runs:
    # Each line has an empty voxel on both sides, so that no run continues into the next line.
    lines = marked_lines(labels)
    marked = np.zeros((labels.shape[1], labels.shape[2] + 2), bool)
    found, places = [], []
    for index in np.flatnonzero(lines.any(axis=1)).tolist():  # one slice at a time fits in the cache
        rows = np.flatnonzero(lines[index])
        part = marked[: len(rows)]
        np.equal(labels[index][rows], number, out=part[:, 1:-1])
        flat = part.reshape(-1)
        edges = np.flatnonzero(flat[1:] != flat[:-1])  # alternating starts and ends
        line, first = np.divmod(edges[::2], marked.shape[1])
        found.append(np.column_stack([np.full(len(line), index), rows[line]]))
        places.append(np.column_stack([first, first + edges[1::2] - edges[::2] - 1]))
    if not found:
        return Runs(np.empty((0, 2), np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    first, last = np.concatenate(places).T
    return Runs(np.concatenate(found), first, last)


def _touching(runs: Runs, shape: Sequence[int]) -> Indices:
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
