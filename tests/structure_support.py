"""Readers of RT Structure Sets: plastimatch, dcmrtstruct2nii, and a rasteriser for each slice on its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as itk
from matplotlib.path import Path as Polygon
from pydicom.dataset import Dataset
from scipy.spatial import cKDTree

from tests_support import BIN

Points = npt.NDArray[np.float64]


def points_by_plastimatch(path: Path, ct: Path, folder: Path) -> dict[str, Points]:
    """(n, 3) LPS mm of every voxel that plastimatch marks, by the ROI's name."""
    words = ["--input", path, "--referenced-ct", ct, "--output-prefix", folder, "--prefix-format", "mha"]
    subprocess.run([BIN / "plastimatch", "convert", *words], check=True, capture_output=True)
    return {file.stem: _points_of_image(file) for file in sorted(folder.glob("*.mha"))}


def points_by_dcmrtstruct2nii(path: Path, ct: Path, folder: Path, monkeypatch) -> dict[str, Points]:
    """The same by dcmrtstruct2nii, which reads the CT with SimpleITK and fills polygons with scikit-image."""
    monkeypatch.setattr(pydicom, "read_file", pydicom.dcmread, raising=False)  # pydicom 3 has the other name alone
    from dcmrtstruct2nii import dcmrtstruct2nii  # noqa: PLC0415  # it prints when it is imported

    dcmrtstruct2nii(str(path), str(ct), str(folder), gzip=False, convert_original_dicom=False)
    return {file.stem.removeprefix("mask_"): _points_of_image(file) for file in sorted(folder.glob("mask_*.nii"))}


def _points_of_image(file: Path) -> Points:
    image = itk.ReadImage(str(file))
    index = np.argwhere(itk.GetArrayViewFromImage(image) > 0)[:, ::-1]
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return index @ direction.T + image.GetOrigin()


def masks_by_slice(structures: Dataset, headers: list[Dataset]) -> dict[int, npt.NDArray[np.bool_]]:
    """(D, H, W) by ROI number: contours filled in the image that each refers to, combined by exclusive or."""
    shape = (len(headers), headers[0].Rows, headers[0].Columns)
    places = {header.SOPInstanceUID: index for index, header in enumerate(headers)}
    masks = {}
    for roi in structures.ROIContourSequence:
        mask = masks[int(roi.ReferencedROINumber)] = np.zeros(shape, bool)
        for contour in roi.get("ContourSequence", []):
            (image,) = contour.ContourImageSequence
            index = places[image.ReferencedSOPInstanceUID]
            mask[index] ^= _filled(contour, headers[index])
    return masks


def _filled(contour: Dataset, header: Dataset) -> npt.NDArray[np.bool_]:
    along_row, along_column = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    offset = points_of_contour(contour) - np.array(header.ImagePositionPatient, float)
    between_rows, between_columns = map(float, header.PixelSpacing)
    rows, columns = np.indices((header.Rows, header.Columns))
    centres = np.column_stack([columns.ravel() * between_columns, rows.ravel() * between_rows])
    inside = Polygon(np.column_stack([offset @ along_row, offset @ along_column])).contains_points(centres)
    return inside.reshape(header.Rows, header.Columns)


def points_of_contour(contour: Dataset) -> Points:
    """(n, 3) LPS mm."""
    points = np.array(contour.ContourData, float).reshape(-1, 3)
    assert len(points) == contour.NumberOfContourPoints
    return points


def dice(ours: Points, theirs: Points) -> float:
    """Of two sets of points, which are the same where they lie within 0.01 mm."""
    apart, _ = cKDTree(ours).query(theirs)
    return 2 * int((apart < 0.01).sum()) / (len(ours) + len(theirs))
