"""A DICOM RT Structure Set to a label map on the grid of the CT series that it was drawn on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from ctflow.compat.pydicom import lenient
from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.volume import FloatArray, LabelArray, digest_of_uid
from ctflow.dicom.attributes import PARSE_ERRORS, integer, numbers, text, texts
from ctflow.dicom.read.filled import region_of_lines

STORAGE = "1.2.840.10008.5.1.4.1.1.481.3"
BESIDE = 0.1  # of the distance between slices: as far as a contour may lie from its slice, and bend
_LEAST_BESIDE_MM = 0.02  # files have hundredths of a millimetre at least
_FARTHEST_MM = 1e9  # numbers near the largest that there are overflow when a contour is filled
_MOST_LINES = 10_000  # of a region on a slice, each of which takes memory
_CLOSED = {"CLOSED_PLANAR": False, "CLOSEDPLANAR_XOR": True}  # whether contours are combined by exclusive or
_OPEN = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a file marks.

    Attributes:
        labels: (D, H, W) uint8, or uint16 for more than 255 labels; 0 is unmarked.
        warnings: Sentences on what of the file is not in the labels.
    """

    labels: LabelArray
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Region:
    """A region of interest (ROI) with contours: its name, its frame of reference ("" if absent) and its contours."""

    name: str
    frame_uid: str
    contours: tuple[Dataset, ...]


@lenient()
def read_structure_set(path: Path, sources: Sequence[Dataset], rois: Sequence[str] = ()) -> Drawn:
    """Read contours onto the grid of a CT series.

    A pixel is marked if its centre lies inside; on a border, at its upper and left sides. A CLOSED_PLANAR contour
    within another of its slice is a hole, as planning systems write it; others add up. Contours of the type
    CLOSEDPLANAR_XOR are combined by exclusive or. A keyhole's channel has no width.

    Args:
        path: The structure set.
        sources: Headers of the source images, in array order (index d of the volume).
        rois: ROI names, where `*` is any text and `?` any letter; case is ignored. Label k marks every region that the
            k-th matches. Without any the file must have a single region, which is label 1.

    Returns:
        The labels. A contour's place counts, not the image that it refers to; where they contradict each other there is
        a warning. Points and open contours are left out, with a warning.

    Raises:
        BrokenSeries: The file is absent or damaged.
        UnsupportedPixels: It belongs to another frame of reference or, without one, to other images; a name matches no
            region, or there are several and no name; contours lie between the slices, not within one, or only on every
            second or third; regions of two labels overlap.

    Source: DICOM PS3.3 A.19, C.8.8.5, C.8.8.6.
    """
    dataset = _read(path)
    stack = _ContourSlices(sources)
    regions = _regions(path.name, dataset)
    labels = np.zeros(stack.shape, np.uint16)
    doubts: Counter[str] = Counter()
    for number, own in enumerate(_chosen(path.name, regions, rois), start=1):
        for region in own:
            _check_series(path.name, region, sources, stack)
            for plane, mask in _masks(path.name, region, stack, doubts):
                if np.setdiff1d(labels[plane][mask], (0, number)).size:
                    raise UnsupportedPixels(
                        f"{path.name}: regions of several labels overlap: join them under one name, or name fewer",
                        reason="regions-overlap",
                    )
                labels[plane][mask] = number
    few = labels.max(initial=0) <= np.iinfo(np.uint8).max
    return Drawn(
        labels.astype(np.uint8) if few else labels, tuple(f"{what}: {count}" for what, count in sorted(doubts.items()))
    )


class _ContourSlices:
    """Where the slices of a series lie, each by its own position: a tilted or uneven stack is as good as a regular one.

    Attributes:
        shape: (D, H, W).
        places: SOPInstanceUID -> index of the slice; of a frame of an Enhanced CT with its number.
        objects: SOPInstanceUIDs of Enhanced CTs: without a frame they name no slice.
    """

    def __init__(self, sources: Sequence[Dataset]) -> None:
        header = sources[0]
        orientation, pixel_mm = numbers(header, "ImageOrientationPatient", 6), numbers(header, "PixelSpacing", 2)
        positions = [numbers(source, "ImagePositionPatient", 3) for source in sources]
        rows, columns = integer(header, "Rows"), integer(header, "Columns")
        if orientation is None or pixel_mm is None or None in positions or rows is None or columns is None:
            raise ValueError("source images do not say where they lie")
        self.shape = (len(sources), rows, columns)
        uids = [text(source, "SOPInstanceUID") for source in sources]
        frames = [text(source, "ReferencedFrameNumber") for source in sources]  # of the reader (`read.enhanced`)
        self.objects = {uid for uid, frame in zip(uids, frames, strict=True) if frame}
        names = [_name_of_frame(uid, frame) if frame else uid for uid, frame in zip(uids, frames, strict=True)]
        self.places = {name: index for index, name in enumerate(names)}
        self._origins = np.array(positions, float)
        self._along = np.array(orientation, float).reshape(2, 3)[::-1]  # (down, across)
        self._pixel_mm = np.array(pixel_mm)
        self._normal = np.cross(*self._along[::-1])
        self._heights = self._origins @ self._normal
        apart = np.abs(np.diff(self._heights))
        self._beside_mm = max(BESIDE * float(np.median(apart)) if len(apart) else 0.0, _LEAST_BESIDE_MM)

    def plane_of(self, points_mm: FloatArray) -> int | None:
        """Index of the slice in which points lie; None if in none."""
        heights = points_mm @ self._normal
        plane = int(np.abs(self._heights - heights.mean()).argmin())
        return plane if np.abs(heights - self._heights[plane]).max() <= self._beside_mm else None

    def index_of(self, points_mm: FloatArray, plane: int) -> FloatArray:
        """(n, 2) row and column of points in a slice."""
        offset = (points_mm - self._origins[plane]) @ self._along.T
        index: FloatArray = np.round(offset / self._pixel_mm, 6)  # a point on a pixel's centre is just there
        return index


def _read(path: Path) -> Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about damage and quotes paths
            return pydicom.dcmread(path)
    except PARSE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise BrokenSeries(f"{path.name}: cannot be read ({reason})", reason="unreadable") from error


def _regions(name: str, dataset: Dataset) -> list[_Region]:
    """Every region that has contours, in the file's order."""
    try:
        frames = [text(item, "FrameOfReferenceUID") for item in dataset.get("ReferencedFrameOfReferenceSequence") or ()]
        common = text(dataset, "FrameOfReferenceUID") or (frames[0] if len(frames) == 1 else "")
        described = {integer(item, "ROINumber"): item for item in dataset.get("StructureSetROISequence") or ()}
        regions = []
        for item in dataset.get("ROIContourSequence") or ():
            roi = described.get(integer(item, "ReferencedROINumber"), Dataset())
            frame_uid = text(roi, "ReferencedFrameOfReferenceUID") or common
            contours = tuple(item.get("ContourSequence") or ())
            if not all(isinstance(contour, Dataset) for contour in contours):
                raise TypeError("no sequence")  # as any other damage
            if contours:
                regions.append(_Region(text(roi, "ROIName"), frame_uid, contours))
    except PARSE_ERRORS as error:
        raise BrokenSeries(f"{name}: cannot be read ({type(error).__name__})", reason="unreadable") from error
    return regions


def _chosen(name: str, regions: Sequence[_Region], rois: Sequence[str]) -> list[list[_Region]]:
    """The regions of each label."""
    if not rois:
        if len(regions) > 1:
            raise UnsupportedPixels(
                f"{name}: has {len(regions)} regions: say which are meant by their names (--truth-roi)",
                reason="several-regions",
            )
        return [[region] for region in regions]
    chosen, left = [], list(regions)
    for pattern in rois:
        own = [region for region in left if fnmatchcase(region.name.casefold(), pattern.strip().casefold())]
        if not own:
            raise UnsupportedPixels(f"{name}: no region with contours matches {pattern!r}", reason="no-region")
        left = [region for region in left if region not in own]
        chosen.append(own)
    return chosen


def _check_series(name: str, region: _Region, sources: Sequence[Dataset], stack: _ContourSlices) -> None:
    """Check that contours are in the series' space."""
    frame_uid = text(sources[0], "FrameOfReferenceUID")
    if frame_uid and region.frame_uid:
        is_own = frame_uid == region.frame_uid
    else:
        known = stack.places.keys() | stack.objects
        images = [_images_of(contour, stack) for contour in region.contours]
        is_own = all(each and each <= known for each in images)
    if not is_own:
        series = digest_of_uid(text(sources[0], "SeriesInstanceUID"))
        raise UnsupportedPixels(
            f"{name}: marks a series other than {series}: give the one that it was drawn on", reason="other-series"
        )


def _images_of(contour: Dataset, stack: _ContourSlices) -> set[str]:
    """The image that a contour refers to, if any: it is optional, and often absent."""
    found = set()
    try:
        for item in contour.get("ContourImageSequence") or ():
            uid = text(item, "ReferencedSOPInstanceUID")
            frames = texts(item, "ReferencedFrameNumber") if uid in stack.objects else ()
            found |= {_name_of_frame(uid, frame) for frame in frames} or {uid}
    except PARSE_ERRORS:
        return set()
    return found


def _name_of_frame(uid: str, frame: str) -> str:
    return f"{uid} frame {frame}"


def _masks(
    name: str, region: _Region, stack: _ContourSlices, doubts: Counter[str]
) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Slice and mask of every slice in which a region lies."""
    by_plane: dict[int, list[FloatArray]] = {}
    by_exclusion = False
    for contour in region.contours:
        kind, points = text(contour, "ContourGeometricType").upper(), _points(name, contour)
        if kind not in _CLOSED or len(points) < 3:
            named = kind if kind in _OPEN else "unknown"  # never any text of the file
            what = "fewer than three points" if kind in _CLOSED else f"type {named}"
            doubts[f"contours of {what}, which enclose nothing, are left out"] += 1
            continue
        by_exclusion |= _CLOSED[kind]
        plane = _plane(name, points, stack)
        images = _images_of(contour, stack) - stack.objects
        if images and plane not in {stack.places.get(uid) for uid in images}:
            other = "slice" if images <= stack.places.keys() else "series"
            doubts[f"contours that refer to an image of another {other}; their place counts"] += 1
        by_plane.setdefault(plane, []).append(stack.index_of(points, plane))
    _check_dense(name, sorted(by_plane))
    for plane, lines in by_plane.items():
        if len(lines) > _MOST_LINES:
            raise BrokenSeries(
                f"{name}: more than {_MOST_LINES} contours on one slice: have it drawn again", reason="unreadable"
            )
        yield plane, region_of_lines(lines, stack.shape[1:], by_exclusion=by_exclusion)


def _points(name: str, contour: Dataset) -> FloatArray:
    """(n, 3) LPS mm. From the bytes where pydicom has not converted them: that takes long, and stumbles over blanks."""
    try:
        element: Any = contour.get_item("ContourData")  # raw or converted
        value = None if element is None else element.value
        if isinstance(element, RawDataElement) and value is not None:
            value = bytes(value).decode("ascii").strip("\\ \0")
            value = value.split("\\") if value else []
        points = np.array([] if value is None else value, dtype=np.float64).reshape(-1, 3)
    except PARSE_ERRORS as error:
        raise BrokenSeries(f"{name}: a contour's points cannot be read", reason="unreadable") from error
    if not (np.abs(points) <= _FARTHEST_MM).all():  # nor if one is not a number
        raise BrokenSeries(f"{name}: a contour's points are not finite, or far beyond any scanner", reason="unreadable")
    return points


def _plane(name: str, points: FloatArray, stack: _ContourSlices) -> int:
    plane = stack.plane_of(points)
    if plane is None:
        raise UnsupportedPixels(
            f"{name}: a contour does not lie in a slice of the series: give the series that it was drawn on",
            reason="between-slices",
        )
    return plane


def _check_dense(name: str, planes: Sequence[int]) -> None:
    """Check that a region was not drawn on a coarser stack: that would leave out every second slice, or more."""
    steps = set(np.diff(planes).tolist())
    if len(planes) > 2 and len(steps) == 1 and steps != {1}:
        raise UnsupportedPixels(
            f"{name}: has contours in one of {steps.pop()} slices: give the series that it was drawn on",
            reason="between-slices",
        )
