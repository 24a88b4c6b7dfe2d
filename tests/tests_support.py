"""Independent readers of what ctflow writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as itk
from scipy.spatial import cKDTree

BIN = Path(sys.executable).parent

# What tests/conftest.py does for its own process, for those that compute much: glibc keeps what is freed.
KEEPS_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def dciodvfy_errors(path: Path) -> list[str]:
    """What dciodvfy (dicom3tools) calls an error."""
    done = subprocess.run([BIN / "dciodvfy", path], capture_output=True, text=True, errors="replace", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert lines, "dciodvfy says nothing at all"
    return [line for line in lines if line.startswith("Error")]


def segments_by_dcmqi(path: Path) -> tuple[dict, list]:
    """The meta information and the images, one a segment, that dcmqi reads from a SEG."""
    folder = Path(tempfile.mkdtemp())
    try:
        command = [
            BIN / "segimage2itkimage",
            "--inputDICOM",
            path,
            "--outputDirectory",
            folder,
            "-t",
            "nrrd",
            "-p",
            "seg",
        ]
        subprocess.run(command, check=True, capture_output=True)
        meta = json.loads(next(folder.glob("*.json")).read_text())
        return meta, [itk.ReadImage(file) for file in sorted(folder.glob("*.nrrd"))]
    finally:
        shutil.rmtree(folder)


def segment_points_by_dcmqi(path: Path, least: int = 1) -> npt.NDArray[np.float64]:
    """(n, 3) LPS mm of every voxel that any segment marks; in a fractional SEG, with `least` 255ths or more."""
    points = [np.zeros((0, 3))]
    for image in segments_by_dcmqi(path)[1]:
        index = np.argwhere(itk.GetArrayViewFromImage(image) >= least)[:, ::-1]
        direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        points.append(index @ direction.T + image.GetOrigin())
    return np.concatenate(points)


def report_by_dcmqi(path: Path) -> dict:
    """What dcmqi's reader of TID 1500 finds in a measurement report."""
    folder = Path(tempfile.mkdtemp())
    try:
        command = [BIN / "tid1500reader", "--inputDICOM", path, "--outputMetadata", folder / "report.json"]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads((folder / "report.json").read_text())
    finally:
        shutil.rmtree(folder)


def assert_same_points(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], within_mm: float = 0.01) -> None:
    """Two sets of points, in any order, are the same."""
    assert len(ours) == len(theirs) > 0
    for a, b in ((ours, theirs), (theirs, ours)):
        assert cKDTree(a).query(b)[0].max() < within_mm
