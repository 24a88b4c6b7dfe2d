"""Masks, and readers of RT Structure Sets: plastimatch, dcmrtstruct2nii, and a rasteriser for each slice on its own."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as itk
from matplotlib.path import Path as Polygon
from pydicom.dataset import Dataset
from scipy import ndimage
from scipy.spatial import cKDTree

from ctflow.core.model import Code, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.derived import Provenance
from dicom_support import axes, rotation, spec_of
from tests_support import BIN

Points = npt.NDArray[np.float64]
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
LUNG = Code("39607008", "SCT", "Lung")
MASS = Code("4147007", "SCT", "Mass")
LEFT = Code("7771000", "SCT", "Left")
SEGMENTS = (
    Segment(1, "Mass", ABNORMAL, MASS, (LUNG,), colour=(214, 39, 40), side=LEFT),
    Segment(2, "Shell", ORGAN, LUNG),
)
SPEC = spec_of(SEGMENTS)
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager"})
SHAPE = (24, 60, 50)
SPACING = (2.5, 0.8, 0.9)
OBLIQUE = axes((2, 1, 0), (1, 1, 1), SPACING)
OBLIQUE[:3, :3] = rotation((0.3, 0.2, -0.15)) @ OBLIQUE[:3, :3]
PLACEMENTS = {
    "axial": axes((2, 1, 0), (1, 1, 1), SPACING),
    "feet first": axes((2, 1, 0), (-1, 1, 1), SPACING),
    "prone": axes((2, 1, 0), (1, -1, -1), SPACING),
    "oblique": OBLIQUE,
}


needs_plastimatch = pytest.mark.skipif(platform.machine() == "aarch64", reason="plastimatch has no wheel for Arm")


def labels_of() -> np.ndarray:
    """A ragged mass of 8 ml, and a shell of 10 ml around a hole; one touches the volume's side."""
    d, h, w = np.indices(SHAPE)
    noise = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 2)
    noise /= noise.std()
    labels = np.zeros(SHAPE, np.uint8)
    labels[((d - 8) * 2.5) ** 2 + ((h - 20) * 0.8) ** 2 + ((w - 9) * 0.9) ** 2 < (12 + 2 * noise) ** 2] = 1
    radius = np.sqrt(((d - 15) * 2.5) ** 2 + ((h - 40) * 0.8) ** 2 + ((w - 33) * 0.9) ** 2)
    labels[(radius < 14) & (radius > 7 + noise)] = 2
    return labels


def fractions_of(labels: np.ndarray) -> np.ndarray:
    """Smooth probabilities that give the labels: a marked voxel's own is above 127, any other's below 128."""
    fractions = []
    for number in (1, 2):
        smooth = ndimage.gaussian_filter((labels == number) * 255.0, 0.7)
        fractions.append(np.where(labels == number, np.clip(smooth, 130, 255), np.clip(smooth, 0, 110)))
    fractions[0][labels == 2] = np.minimum(fractions[0], 255 - fractions[1])[labels == 2]
    fractions[1][labels == 1] = np.minimum(fractions[1], 255 - fractions[0])[labels == 1]
    return np.round(fractions).astype(np.uint8)


def volume_on(affine) -> Volume:
    return Volume(np.zeros(SHAPE, np.int16), Geometry(SHAPE, affine))


def displaced(along_y: float, uneven: bool):
    """Moves slices: further apart from the middle on, and along the rows' normal with their height."""

    def adjust(dataset, index):
        x, y, z = map(float, dataset.ImagePositionPatient)
        beyond = 1.5 * max(index - 11, 0) if uneven else 0.0
        dataset.ImagePositionPatient = [x, y + along_y * (2.5 * index + beyond), z + beyond]

    return adjust


MOVES = {"oblique": None, "tilted": displaced(0.3, False), "uneven": displaced(0, True), "both": displaced(0.3, True)}


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
