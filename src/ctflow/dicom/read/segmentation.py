"""A DICOM SEG to a label map on the grid of its source series."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from ctflow.compat.pydicom import lenient
from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.volume import LabelArray, digest_of_uid
from ctflow.dicom.attributes import PARSE_ERRORS, integer, text

_SEGMENTATION_STORAGE = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # the second: LABELMAP


@lenient()
def read_segmentation(path: Path, sources: Sequence[Dataset]) -> LabelArray:
    """Read a segmentation onto the grid of its source series.

    Args:
        path: The SEG.
        sources: Headers of the source images, in array order (index d of the volume).

    Returns:
        (D, H, W) uint8, or uint16 for more than 255 segments; value k marks segment k, images without a frame are 0.
        In a fractional SEG the largest fraction of a pixel counts, if it exceeds the remainder for the background.

    Raises:
        BrokenSeries: The file is absent or damaged.
        UnsupportedPixels: It is no SEG, marks another series, its frames do not lie on the source images, or its
            segments overlap.

    Source: DICOM PS3.3 A.51, C.8.20; Derivation Image Functional Group (C.7.6.16.2.6).
    """
    dataset = _read_dataset(path)
    if text(dataset, "SOPClassUID") not in _SEGMENTATION_STORAGE:
        raise UnsupportedPixels(f"{path.name}: not a DICOM SEG", reason="not-seg")
    _check_grid(path, dataset, sources)
    labels = _pixels_on_sources(path, dataset, sources)
    few = int(labels.max(initial=0)) <= np.iinfo(np.uint8).max
    return labels.astype(np.uint8) if few else labels.astype(np.uint16)


def _read_dataset(path: Path) -> Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about damage and quotes paths
            dataset = pydicom.dcmread(path)
            dataset.decode()  # converts every value: damage shows here, not in highdicom
    except PARSE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise BrokenSeries(f"{path.name}: cannot be read ({reason})", reason="unreadable") from error
    return dataset


def _check_grid(path: Path, dataset: Dataset, sources: Sequence[Dataset]) -> None:
    header = sources[0]
    series = digest_of_uid(text(header, "SeriesInstanceUID"))
    another = UnsupportedPixels(
        f"{path.name}: marks a series other than {series}: give the one that it was drawn on", reason="other-series"
    )
    if text(dataset, "FrameOfReferenceUID") != text(header, "FrameOfReferenceUID"):
        raise another
    try:
        referenced = {text(item, "ReferencedSOPInstanceUID") for item in _source_images(dataset)}
    except PARSE_ERRORS as error:
        raise UnsupportedPixels(
            f"{path.name}: does not say to which image each frame refers", reason="seg-layout"
        ) from error
    if not referenced or not referenced <= {text(source, "SOPInstanceUID") for source in sources}:
        raise another
    for keyword in ("Rows", "Columns"):
        if integer(dataset, keyword) != integer(header, keyword):
            raise UnsupportedPixels(f"{path.name}: its {keyword} are not those of series {series}", reason="other-grid")


def _source_images(dataset: Dataset) -> list[Dataset]:
    """Each frame's source image; a frame derived from several lies on none."""
    images = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (derivation,) = frame.DerivationImageSequence
        (image,) = derivation.SourceImageSequence
        images.append(image)
    return images


def _pixels_on_sources(path: Path, dataset: Dataset, sources: Sequence[Dataset]) -> npt.NDArray[np.unsignedinteger]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = hd.seg.Segmentation.from_dataset(dataset, copy=False)
            fractional = segmentation.segmentation_type == hd.seg.SegmentationTypeValues.FRACTIONAL
            pixels = _mapped(segmentation, sources, combine_segments=not fractional)
            return _most_likely(pixels, int(dataset.MaximumFractionalValue)) if fractional else pixels
    except (*PARSE_ERRORS, RuntimeError) as error:  # the text may quote values of the file
        raise UnsupportedPixels(
            f"{path.name}: its frames cannot be mapped to the series' images ({type(error).__name__}): a binary or"
            " label-map SEG without overlaps, or a fractional one, is needed",
            reason="seg-layout",
        ) from error


def _mapped(
    segmentation: hd.seg.Segmentation, sources: Sequence[Dataset], *, combine_segments: bool
) -> npt.NDArray[np.unsignedinteger]:
    """The frames of each source image, or of each frame of Enhanced CTs."""
    options = {
        "combine_segments": combine_segments,
        "rescale_fractional": False,
        "assert_missing_frames_are_empty": True,
    }
    uids = [text(source, "SOPInstanceUID") for source in sources]
    numbers = [integer(source, "ReferencedFrameNumber") for source in sources]
    if None in numbers:
        found: npt.NDArray[np.unsignedinteger] = segmentation.get_pixels_by_source_instance(uids, **options)
        return found
    pieces = []
    for uid in dict.fromkeys(uids):
        own = [number for one, number in zip(uids, numbers, strict=True) if one == uid]
        pieces.append(segmentation.get_pixels_by_source_frame(uid, own, **options))
    of_slice = [[place for place, one in enumerate(uids) if one == uid] for uid in dict.fromkeys(uids)]
    order = np.argsort(np.concatenate(of_slice))
    together: npt.NDArray[np.unsignedinteger] = np.concatenate(pieces)[order]
    return together


def _most_likely(fractions: npt.NDArray[np.unsignedinteger], whole: int) -> npt.NDArray[np.unsignedinteger]:
    """(D, H, W, S) fractions to labels: the largest, where it exceeds the remainder for the background."""
    labels = np.zeros(fractions.shape[:3], np.uint16)
    for d, section in enumerate(fractions):
        of_segments = section.astype(np.int32)
        marked = of_segments.max(axis=-1) > whole - of_segments.sum(axis=-1)
        labels[d] = np.where(marked, of_segments.argmax(axis=-1) + 1, 0)
    return labels
