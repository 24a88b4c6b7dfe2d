"""A run's structures.dcm: beside the SEG, of the same segments, without specks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from ctflow.core.progress import silent
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline import segmenter
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from dicom_support import axes, spec_of
from marking_support import MarkingSegmenter, marking_model
from structure_support import masks_by_slice
from tests_support import dciodvfy_errors

SETTINGS = Settings(device="cpu", cache=None, force=True, report="none", rtstruct=True)
SHAPE, SPACING = (16, 40, 40), (2.0, 1.0, 1.0)  # 2 mm3 a voxel: 0.05 ml are 25 voxels
BLOCKS = ((slice(2, 8), slice(4, 20), slice(4, 20)), (slice(10, 13), slice(25, 30), slice(25, 30)))
SPECKS = ((3, 30, 30), (14, 2, 2))


class MarkingBlocks(MarkingSegmenter):
    """Marks two blocks and two voxels; or the voxels alone, if the model is called so."""

    def segment(self, volume, progress=silent, meanwhile=lambda: None):
        found, seconds = super().segment(volume, progress, meanwhile)
        labels = np.zeros_like(found.labels)
        for block in () if self.model.spec.name == "specks" else BLOCKS:
            labels[block] = 1
        for speck in SPECKS:
            labels[speck] = 1
        return replace(found, labels=labels), seconds


@pytest.fixture(autouse=True)
def _marks(monkeypatch):
    monkeypatch.setattr(segmenter, "Segmenter", MarkingBlocks)


@pytest.fixture
def ct(tmp_path):
    volume = Volume(np.zeros(SHAPE, np.int16), Geometry(SHAPE, axes((2, 1, 0), (1, 1, 1), SPACING)))
    write_ct_series(volume, tmp_path / "ct")
    return tmp_path / "ct"


def run_of(ct, output, model=None, **chosen):
    (case,) = run_folder(ct, output, model or marking_model(), replace(SETTINGS, **chosen)).cases
    assert case.error is None
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(ct.iterdir())]
    headers.sort(key=lambda header: header.ImagePositionPatient[2])
    return case.folder, headers


def names_of(structures):
    return {int(roi.ROINumber): roi.ROIName for roi in structures.StructureSetROISequence}


def test_it_lies_beside_the_seg_only_where_it_is_asked_for(ct, tmp_path):
    folder, _ = run_of(ct, tmp_path / "out")
    files = {"segmentation.dcm", "measurements.dcm", "structures.dcm", "preview.png", "result.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert dciodvfy_errors(folder / "structures.dcm") == []
    plain, _ = run_of(ct, tmp_path / "plain", rtstruct=False)
    assert {path.name for path in plain.iterdir()} == files - {"structures.dcm"}
    for name in ("segmentation.dcm", "measurements.dcm", "preview.png"):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("segments", ["class", "finding"])
def test_it_marks_what_the_seg_does_but_for_specks(ct, tmp_path, segments):
    folder, headers = run_of(ct, tmp_path / "out", segments=segments)
    structures = pydicom.dcmread(folder / "structures.dcm")
    marked = read_segmentation(folder / "segmentation.dcm", headers)
    for speck in SPECKS:
        assert marked[speck] > 0
        marked[speck] = 0
    masks = masks_by_slice(structures, headers)
    assert names_of(structures) == ({1: "Lung"} if segments == "class" else {1: "Lung 1", 2: "Lung 2"})
    assert sorted(masks) == sorted(names_of(structures)) == np.unique(marked)[1:].tolist()
    for number, mask in masks.items():
        assert np.array_equal(mask, marked == number)
    assert "2 findings below 0.05 ml have no contours." in structures.StructureSetDescription
    warnings = json.loads((folder / "result.json").read_text())["warnings"]
    assert "structures.dcm: 2 findings below 0.05 ml have no contours" in warnings


def test_a_class_of_specks_alone_has_an_empty_roi(ct, tmp_path):
    model = marking_model(spec_of(marking_model().spec.segments, name="specks"))
    for segments in ("class", "finding"):
        folder, _ = run_of(ct, tmp_path / segments, model, segments=segments)
        structures = pydicom.dcmread(folder / "structures.dcm")
        assert names_of(structures) == {1: "Lung"}
        assert "ContourSequence" not in structures.ROIContourSequence[0]
        assert dciodvfy_errors(folder / "structures.dcm") == []


def stretched(dataset, index):
    x, y, z = map(float, dataset.ImagePositionPatient)
    beyond = 2.0 * max(index - 7, 0)
    dataset.ImagePositionPatient = [x, y + 0.3 * (2 * index + beyond), z + beyond]


@pytest.mark.parametrize("grid", ["source", "resampled"])
def test_a_tilted_uneven_series_has_contours_where_its_seg_has_frames(tmp_path, grid):
    volume = Volume(np.zeros(SHAPE, np.int16), Geometry(SHAPE, axes((2, 1, 0), (1, 1, 1), SPACING)))
    write_ct_series(volume, tmp_path / "ct", adjust=stretched)
    folder, headers = run_of(tmp_path / "ct", tmp_path / "out", seg_grid=grid)
    assert dciodvfy_errors(folder / "structures.dcm") == []
    structures = pydicom.dcmread(folder / "structures.dcm")
    contours = structures.ROIContourSequence[0].ContourSequence
    if grid == "source":
        marked = read_segmentation(folder / "segmentation.dcm", headers) > 0
        whole = masks_by_slice(structures, headers)[1]
        assert whole.any()
        assert not (whole & ~marked).any()
        assert (marked & ~whole).sum() <= len(SPECKS)
        return
    assert not any("ContourImageSequence" in contour for contour in contours)
    frames = pydicom.dcmread(folder / "segmentation.dcm").PerFrameFunctionalGroupsSequence
    heights = {round(float(frame.PlanePositionSequence[0].ImagePositionPatient[2]), 2) for frame in frames}
    assert {round(float(contour.ContourData[2]), 2) for contour in contours} <= heights
