"""What somebody marked in a CT series, as a DICOM SEG or an RT Structure Set, to a label map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from ctflow.compat.pydicom import lenient
from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.read.structure_set import STORAGE, Drawn, read_structure_set


def read_truth(path: Path, sources: Sequence[Dataset], rois: Sequence[str] = ()) -> Drawn:
    """Read a truth onto the grid of its source series.

    Args:
        path: A SEG or an RT Structure Set.
        sources: Headers of the source images, in array order (index d of the volume).
        rois: Of a structure set: the names of each label's regions (`read_structure_set`). A SEG is read whole.

    Raises:
        BrokenSeries: The file is absent or damaged.
        UnsupportedPixels: It is neither, or does not suit the series; see `read_segmentation`, `read_structure_set`.
    """
    if _is_structure_set(path):
        return read_structure_set(path, sources, rois)
    return Drawn(read_segmentation(path, sources))


@lenient()
def _is_structure_set(path: Path) -> bool:
    try:
        return text(pydicom.dcmread(path, specific_tags=["SOPClassUID"]), "SOPClassUID") == STORAGE
    except PARSE_ERRORS:
        return False  # reading it as a SEG says what is wrong with it
