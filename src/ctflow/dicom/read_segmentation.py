"""A DICOM SEG to a label map on the grid of the series that it marks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset

from ctflow.dicom.attributes import PARSE_ERRORS, integer, text
from ctflow.errors import BrokenSeries, UnsupportedPixels
from ctflow.volume import digest_of_uid

# highdicom logs values of attributes, which may be patient data.
logging.getLogger("highdicom").setLevel(logging.CRITICAL)

_SEGMENTATION_STORAGE = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # the second: LABELMAP


def read_segmentation(path: Path, sources: Sequence[Dataset]) -> npt.NDArray[np.uint8]:
    """Read a segmentation onto the grid of its source series.

    Args:
        path: The SEG.
        sources: Headers of the source images, in array order (index d of the volume).

    Returns:
        (D, H, W) uint8; value k marks segment k, images without a frame are 0.

    Raises:
        BrokenSeries: The file is absent or damaged.
        UnsupportedPixels: It is no SEG, marks another series, or its frames do not lie on the source images; or its
            segments overlap, are too many, or are fractional.

    Source: DICOM PS3.3 A.51, C.8.20; Derivation Image Functional Group (C.7.6.16.2.6).
    """
    dataset = _read_dataset(path)
    if text(dataset, "SOPClassUID") not in _SEGMENTATION_STORAGE:
        raise UnsupportedPixels(f"{path.name}: not a DICOM SEG")
    _check_grid(path, dataset, sources)
    labels = _pixels_on_sources(path, dataset, [text(source, "SOPInstanceUID") for source in sources])
    if int(labels.max(initial=0)) > np.iinfo(np.uint8).max:
        raise UnsupportedPixels(f"{path.name}: more than 255 segments")
    return labels.astype(np.uint8)


def _read_dataset(path: Path) -> Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of damage and quotes paths
            dataset = pydicom.dcmread(path)
            dataset.decode()  # every value is converted here: damage shows now, not in highdicom
    except PARSE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise BrokenSeries(f"{path.name}: cannot be read ({reason}) [unreadable]", reason="unreadable") from error
    return dataset


def _check_grid(path: Path, dataset: Dataset, sources: Sequence[Dataset]) -> None:
    header = sources[0]
    series = digest_of_uid(text(header, "SeriesInstanceUID"))
    another = UnsupportedPixels(f"{path.name}: marks another series than {series}: give the one that it was drawn on")
    if text(dataset, "FrameOfReferenceUID") != text(header, "FrameOfReferenceUID"):
        raise another
    try:
        referenced = {text(item, "ReferencedSOPInstanceUID") for item in _source_images(dataset)}
    except PARSE_ERRORS as error:
        raise UnsupportedPixels(f"{path.name}: does not say which image each frame marks") from error
    if not referenced or not referenced <= {text(source, "SOPInstanceUID") for source in sources}:
        raise another
    for keyword in ("Rows", "Columns"):
        if integer(dataset, keyword) != integer(header, keyword):
            raise UnsupportedPixels(f"{path.name}: its {keyword} are not those of series {series}")


def _source_images(dataset: Dataset) -> list[Dataset]:
    """The source image that each frame was derived from; frames derived from several are not on one image."""
    images = []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (derivation,) = frame.DerivationImageSequence
        (image,) = derivation.SourceImageSequence
        images.append(image)
    return images


def _pixels_on_sources(path: Path, dataset: Dataset, uids: list[str]) -> npt.NDArray[np.unsignedinteger]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels: npt.NDArray[np.unsignedinteger] = hd.seg.Segmentation.from_dataset(
                dataset, copy=False
            ).get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    except (*PARSE_ERRORS, RuntimeError) as error:  # its text may quote values of the file
        raise UnsupportedPixels(
            f"{path.name}: its frames cannot be laid on the series' images ({type(error).__name__}): a binary or"
            " label-map SEG without overlaps is needed"
        ) from error
    return labels
