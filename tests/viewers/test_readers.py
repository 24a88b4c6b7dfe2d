"""Readers that programs are built on: dcmqi (3D Slicer's), highdicom, and itkwasm-dicom, dcmqi for the web."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from scipy.spatial import cKDTree

from needs import skip_without
from tests_support import segment_points_by_dcmqi
from viewer_record import agrees_with_record
from viewer_support import FORMS, SERIES, forms_of, objects_of, write_series

HALF = 128  # of 255: what a fraction marks
ITKWASM = Path(__file__).parents[2] / "build" / "itkwasm"  # where `make test-viewers` installs it
READ_BY_ITKWASM = """
import json, sys
import numpy as np
import itkwasm_dicom
for least, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        image, _ = itkwasm_dicom.read_segmentation(path)
        index = np.argwhere(np.asarray(image.data) >= int(least))[:, ::-1]
        points = (index @ (np.asarray(image.direction) * image.spacing).T + image.origin).tolist()
    except Exception:
        points = None
    print("ANSWER" + json.dumps(points), flush=True)
"""


@pytest.fixture(scope="module", params=SERIES)
def series(request, tmp_path_factory):
    """(Name, SEG of each form.)"""
    folder = tmp_path_factory.mktemp("readers")
    ct = write_series(request.param, folder / "ct")
    segs = {form: objects_of(ct, folder / form, **FORMS[form]) / "segmentation.dcm" for form in forms_of(request.param)}
    return request.param, segs


def points_of(path: Path) -> np.ndarray:
    """(n, 3) LPS mm of every marked pixel, by each frame's own place."""
    dataset = hd.seg.segread(path)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    along_row, along_column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    least = HALF if dataset.SegmentationType == "FRACTIONAL" else 1
    found = []
    for groups, frame in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        row, column = np.nonzero(frame >= least)
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        found.append(
            origin + column[:, None] * between_columns * along_row + row[:, None] * between_rows * along_column
        )
    return np.concatenate(found)


def outcome_of_points(found: np.ndarray | None, truth: np.ndarray) -> str:
    if found is None:
        return "rejects it"
    if len(found) == 0:
        return "shows nothing"
    apart = (cKDTree(truth).query(found)[0].max(), cKDTree(found).query(truth)[0].max())
    return "right" if len(found) == len(truth) and max(apart) < 0.01 else "wrong"


def least_of(form: str) -> int:
    return HALF if form == "fractional" else 1


def points_by_highdicom(path: Path) -> np.ndarray | None:
    try:
        volume = hd.seg.segread(path).get_volume(rescale_fractional=False)
    except (ValueError, RuntimeError):
        return None
    least = HALF if pydicom.dcmread(path).SegmentationType == "FRACTIONAL" else 1
    array = volume.array if volume.array.ndim == 4 else volume.array[..., None]
    index = np.concatenate([np.argwhere(array[..., channel] >= least) for channel in range(array.shape[-1])])
    return volume.map_indices_to_reference(index) if len(index) else index


def points_by_dcmqi(path: Path, form: str) -> np.ndarray | None:
    try:
        return segment_points_by_dcmqi(path, least_of(form))
    except subprocess.CalledProcessError:
        return None


def test_dcmqi_reads_what_the_record_says(series):
    name, segs = series
    for form, path in segs.items():
        outcome = outcome_of_points(points_by_dcmqi(path, form), points_of(path))
        agrees_with_record("reader dcmqi 1.5.7", form, name, outcome)


def test_highdicom_reads_what_the_record_says(series):
    name, segs = series
    for form, path in segs.items():
        agrees_with_record(
            "reader highdicom 0.28.2", form, name, outcome_of_points(points_by_highdicom(path), points_of(path))
        )


@pytest.mark.viewers
def test_itkwasm_reads_what_the_record_says(series):
    if not ITKWASM.is_dir():
        skip_without("itkwasm-dicom")
    name, segs = series
    words = [word for form, path in segs.items() for word in (str(least_of(form)), path)]
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_ITKWASM, *words], capture_output=True, text=True, check=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(ITKWASM)},
    )  # fmt: skip
    lines = [json.loads(line.removeprefix("ANSWER")) for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    for (form, path), points in zip(segs.items(), lines, strict=True):
        outcome = outcome_of_points(None if points is None else np.reshape(points, (-1, 3)), points_of(path))
        agrees_with_record("reader itkwasm-dicom 7.6.4", form, name, outcome)
