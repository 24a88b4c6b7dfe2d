"""Find the regular grid of slices at given distances, and which of its slices must be interpolated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctflow.core.errors import BrokenSeries, counted
from ctflow.core.volume import FloatArray
from ctflow.dicom.read.geometry.agreement import listed
from ctflow.dicom.regularity import is_within, unevenness

Refuse = Callable[[str, str], BrokenSeries]
_DOUBLED_MM = 0.01
_MOST_GROWTH = 8  # grid slices per slice of the series: real series need 2 or 3, and memory is limited
_LEAST_RUN = 3  # equal gaps that form a piece of a piecewise regular series; fewer are chance


@dataclass(frozen=True, eq=False)
class Spacing:
    """A regular grid along the normal.

    Attributes:
        count: Slices of the grid.
        places: (slices of the series,) position of each in grid steps; first and last coincide with the grid's.
        warnings: For the user.
    """

    count: int
    places: FloatArray
    warnings: tuple[str, ...] = ()

    @property
    def weights(self) -> FloatArray | None:
        """(count, slices of the series) weights of linear interpolation; None if the grid is the slices' own."""
        own = np.arange(self.count)
        if np.array_equal(self.places, own):
            return None
        upper = np.clip(np.searchsorted(self.places, own, side="right"), 1, len(self.places) - 1)
        share = (own - self.places[upper - 1]) / (self.places[upper] - self.places[upper - 1])
        weights = np.zeros((self.count, len(self.places)))
        weights[own, upper - 1] = 1 - np.clip(share, 0, 1)
        weights[own, upper] += np.clip(share, 0, 1)
        return weights

    @property
    def nearest(self) -> tuple[int, ...]:
        """The nearest grid slice of each slice of the series."""
        return tuple(int(place) for place in np.rint(self.places))


def spacing_of_slices(
    distances_mm: FloatArray,
    numbers: Sequence[int | None],
    *,
    allow_gaps: bool,
    refuse: Refuse,
    names: Sequence[str] = (),
) -> Spacing:
    """Find the grid.

    Args:
        distances_mm: (n,) of each slice along the normal, ascending; n is at least 2.
        numbers: InstanceNumber of each slice: further evidence on whether slices are missing.
        allow_gaps: Interpolate a single missing slice.
        refuse: Makes the error from a reason and a message.
        names: The slices' names in messages; empty names none.

    Returns:
        The slices' own grid if each lies within a tenth of the spacing of the line fitted through all. Otherwise a grid
        with the smallest gap as step, if the series consists of runs of equal gaps; or one with the missing slices.

    Raises:
        BrokenSeries: `doubled`, `gap` or `irregular`.
    """
    gaps = np.diff(distances_mm)
    if gaps.min() <= _DOUBLED_MM:
        second = np.flatnonzero(gaps <= _DOUBLED_MM) + 1
        lie, which = counted(len(second), "slice lies", "slices lie"), _named(names, second)
        raise refuse(
            "doubled",
            f"{lie} at the position of another slice{which}: send one acquisition at a time",
        )
    median = float(np.median(gaps))
    own = np.arange(len(distances_mm), dtype=np.float64)
    if is_within(unevenness(distances_mm, own)):
        return Spacing(len(distances_mm), own)
    runs = _runs(gaps)
    if _is_piecewise(gaps, runs) and not _may_lack_slices(gaps, runs, numbers):
        return _piecewise(distances_mm, gaps, runs, refuse)
    steps = np.round(gaps / median)
    if steps.min() >= 1 and is_within(unevenness(distances_mm, np.concatenate([[0.0], np.cumsum(steps)]))):
        return _with_gaps(steps, allow_gaps, refuse, names)
    raise refuse("irregular", f"distances between slices vary from {gaps.min():.3f} to {gaps.max():.3f} mm")


def tolerance_mm(gap_mm: float) -> float:
    """How far gaps of one piece of a piecewise regular series may differ from a gap of this width."""
    return max(0.01 * gap_mm, 0.01)


def _runs(gaps: FloatArray) -> list[slice]:
    """Runs of equal neighbouring gaps, as slices of the gaps."""
    starts = [0]
    for index in range(1, len(gaps)):
        if abs(gaps[index] - gaps[starts[-1]]) > tolerance_mm(float(gaps[starts[-1]])):
            starts.append(index)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(gaps)], strict=True)]


def _is_long(run: slice) -> bool:
    return int(run.stop - run.start) >= _LEAST_RUN


def _is_piecewise(gaps: FloatArray, runs: Sequence[slice]) -> bool:
    """Whether long runs follow each other, with at most one gap between two, no wider than theirs.

    The pieces on either side of such a gap must differ: within one piece it would be a missing or surplus slice.
    """
    if sum(_is_long(run) for run in runs) < 2:
        return False
    for index, run in enumerate(runs):
        if _is_long(run):
            continue
        if run.stop - run.start > 1 or not 0 < index < len(runs) - 1:
            return False
        before, after = runs[index - 1], runs[index + 1]
        widths = float(gaps[before].mean()), float(gaps[after].mean())
        if not (_is_long(before) and _is_long(after)) or abs(widths[0] - widths[1]) <= tolerance_mm(max(widths)):
            return False
        if gaps[run.start] > max(widths) + tolerance_mm(max(widths)):
            return False
    return True


def _piecewise(distances_mm: FloatArray, gaps: FloatArray, runs: Sequence[slice], refuse: Refuse) -> Spacing:
    long = [run for run in runs if _is_long(run)]
    extent = float(distances_mm[-1] - distances_mm[0])
    count = round(extent / min(float(gaps[run].mean()) for run in long)) + 1
    if count > _MOST_GROWTH * len(distances_mm):
        raise refuse("irregular", f"distances between slices, {gaps.min():.3f} to {gaps.max():.3f} mm, differ too much")
    step = extent / (count - 1)
    pieces = ", ".join(f"{run.stop - run.start} of {gaps[run].mean():.3f} mm" for run in runs)
    warning = f"distances between slices change ({pieces}): the series was resampled by position, every {step:.3f} mm"
    return Spacing(count, (distances_mm - distances_mm[0]) / step, (warning,))


def _may_lack_slices(gaps: FloatArray, runs: Sequence[slice], numbers: Sequence[int | None]) -> bool:
    """Whether slices may be missing where gaps are wider.

    They may if InstanceNumber increases by one in some runs and skips numbers in others. If not all slices have it,
    they may if gaps are whole multiples of the narrowest.
    """
    long = [run for run in runs if _is_long(run)]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        widths = np.array([gaps[run].mean() for run in long])
        times = widths / widths.min()
        return bool(np.all(np.abs(times - np.round(times)) <= 0.01 * times))
    steps = np.abs(np.diff(known))
    inside = [steps[run] for run in long]
    return any((found == 1).all() for found in inside) and any((found > 1).all() for found in inside)


def _named(names: Sequence[str], places: npt.NDArray[np.intp], word: str = "") -> str:
    """The slices at these places, in brackets; empty if slices have no names."""
    return f" ({word}{listed([names[place] for place in places])})" if names else ""


def _with_gaps(steps: FloatArray, allow_gaps: bool, refuse: Refuse, names: Sequence[str]) -> Spacing:
    lost = int((steps - 1).sum())
    single = bool((steps <= 2).all())
    if not single or not allow_gaps:
        hint = "; --allow-gaps interpolates single ones" if single else ""
        where = _named(names, np.flatnonzero(steps > 1), "behind ")
        raise refuse(
            "gap",
            f"{counted(lost, 'slice is', 'slices are')} missing in the middle{where}: send the whole series{hint}",
        )
    places = np.concatenate([[0.0], np.cumsum(steps)])
    warning = f"{counted(lost, 'missing slice')} interpolated between neighbours (--allow-gaps)"
    return Spacing(int(places[-1]) + 1, places, (warning,))
