"""CTs whose lesions somebody has drawn, as a SEG or an RT Structure Set, on the model's grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from backgrounds import EVALUATION_ONLY
from real_chests import cubic_grid, on_cubic_grid
from scipy import ndimage

from ctflow.bench.evaluate import SERIES, TRUTH, case_folders
from ctflow.core.errors import CtflowError
from ctflow.core.volume import Geometry, LabelArray, Labels
from ctflow.dicom.attributes import text
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series
from ctflow.dicom.read.truth import read_truth


def read_drawn(folder: Path, rois: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Each case of a folder on cubic voxels, head first and supine.

    Args:
        folder: One case (ct/ and truth.dcm), or a folder of cases.
        rois: Names of regions, if a truth is an RT Structure Set (`ctflow.dicom.read.truth.read_truth`).
        most: The largest number of a lesion; further ones begin at 1 again.

    Returns:
        name, hu, numbers (0 is no lesion) and thickness_mm of each.

    Raises:
        ValueError: A case cannot be read, or its patient is for evaluation alone.
    """
    try:
        return [_drawn(path, rois, most) for path in case_folders(folder)]
    except CtflowError as error:
        raise ValueError(str(error)) from error


def _drawn(path: Path, rois: Sequence[str], most: int) -> dict[str, Any]:
    try:
        scan = scan_folder(path / SERIES)
        selection = select_series(scan, force=True)  # any region and slice thickness
        require_selected(selection, scan)
        if len(selection.selected) > 1:
            raise ValueError(f"{path}: {SERIES}/ holds several series: keep the one that the truth was drawn on")
        series = assemble_series(selection.selected[0].series)
        headers = [instance.header for instance in series.instances]
        truth = read_truth(path / TRUTH, headers, rois)
    except CtflowError as error:
        raise ValueError(f"{path}: {error}") from error
    if text(headers[0], "PatientID").upper() == EVALUATION_ONLY:
        raise ValueError(f"{path}: {EVALUATION_ONLY} is for evaluation alone; remove it")
    if series.volume.geometry.is_tilted or series.is_resampled:
        raise ValueError(f"{path}: it is tilted or was resampled, and its truth lies on its own slices")
    for warning in truth.warnings:
        print(f"{path}: {warning}")
    hu, _ = on_cubic_grid(series.volume)
    return {
        "name": path.resolve().name,
        "hu": np.rint(hu).astype(np.int16),
        "numbers": numbers_on_cubic_grid(truth.labels, series.volume.geometry, most),
        "thickness_mm": series.volume.geometry.spacing_mm[0],
    }


def numbers_on_cubic_grid(labels: LabelArray, geometry: Geometry, most: int) -> Labels:
    """A truth's lesions by number: its labels if there are several, else its connected components (26 neighbours).

    A voxel is marked where the truth, interpolated, is at least a half; its number is the nearest one's.
    """
    numbers = labels if int(labels.max(initial=0)) > 1 else ndimage.label(labels, np.ones((3, 3, 3)))[0]
    shape, grid_to_world = cubic_grid(geometry)
    to_source = np.linalg.inv(geometry.affine_mm) @ grid_to_world
    marked = ndimage.affine_transform(
        (numbers > 0).astype(np.float32), to_source[:3, :3], to_source[:3, 3], shape, order=1
    )
    inside = np.argwhere(marked >= 0.5)
    nearest: npt.NDArray[np.int32] = np.zeros(shape, np.int32)
    if len(inside):
        places = ndimage.distance_transform_edt(
            numbers == 0, sampling=geometry.spacing_mm, return_distances=False, return_indices=True
        )
        source = np.rint(inside @ to_source[:3, :3].T + to_source[:3, 3]).astype(int)
        source = np.clip(source, 0, np.array(numbers.shape) - 1)
        at = tuple(places[(slice(None), *source.T)])
        nearest[tuple(inside.T)] = np.asarray(numbers)[at]
    found: Labels = np.where(nearest > 0, (nearest - 1) % most + 1, 0).astype(np.uint8)
    return found
