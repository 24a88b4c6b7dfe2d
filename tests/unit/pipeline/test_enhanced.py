"""Results of an Enhanced CT refer to its frames, and readers put them where they are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.read.structure_set import read_structure_set
from ctflow.pipeline.case import look_for_cases
from ctflow.pipeline.run import run_case
from ctflow.settings.run import Settings
from dicom_support import setter, small_volume
from enhanced_support import ENHANCED, frames_of, write_enhanced
from marking_support import MarkingSegmenter, marking_model
from tests_support import dciodvfy_errors

SETTINGS = Settings(device="cpu", cache=None, secondary_capture=True, rtstruct=True, report="none")
SHAPE = (16, 32, 40)


def cases_of(folder: Path, output: Path, settings: Settings):
    model = marking_model()
    found = look_for_cases(folder, (), settings)
    return [run_case(case, MarkingSegmenter(model, settings), settings, output) for case in found.cases]


def expected() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[tuple(slice(size // 4, size // 2) for size in SHAPE)] = 1
    return labels


@pytest.fixture
def backwards(tmp_path):
    """Frames that run against the volume's slices, so that a number that is a place would be wrong."""
    (tmp_path / "in").mkdir()
    write_enhanced(tmp_path / "in" / "e.dcm", frames_of(small_volume(shape=SHAPE))[::-1])
    return tmp_path / "in"


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
@pytest.mark.parametrize("omit", [True, False], ids=["marked frames", "all frames"])
def test_a_seg_refers_to_frames_and_is_read_where_they_are(backwards, tmp_path, kind, omit):
    settings = replace(SETTINGS, seg=kind, omit_empty_frames=omit)
    (case,) = cases_of(backwards, tmp_path / "out", settings)
    assert case.error is None
    seg = hd.seg.segread(case.folder / "segmentation.dcm")
    assert dciodvfy_errors(case.folder / "segmentation.dcm") == []
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert (image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID) == (ENHANCED, "1.2.4.1")
    numbers = range(SHAPE[0], 0, -1)  # of the frames, in the order of the volume's slices
    pixels = seg.get_pixels_by_source_frame(
        "1.2.4.1", list(numbers), combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(pixels, expected())
    (series,) = seg.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == ["1.2.4.1"]


def test_ctflow_reads_its_seg_of_frames(backwards, tmp_path):
    (case,) = cases_of(backwards, tmp_path / "out", SETTINGS)
    headers = [
        instance.header for instance in look_for_cases(backwards, (), SETTINGS).cases[0].candidate.series.instances
    ]
    labels = read_segmentation(case.folder / "segmentation.dcm", headers[::-1])
    np.testing.assert_array_equal(labels, expected())


def test_the_other_objects_refer_to_the_file_and_its_frames(backwards, tmp_path):
    (case,) = cases_of(backwards, tmp_path / "out", SETTINGS)
    report = pydicom.dcmread(case.folder / "measurements.dcm")
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence[0].ReferencedSOPSequence] == ["1.2.4.1"]
    structures = pydicom.dcmread(case.folder / "structures.dcm")
    shown = {}
    for contour in structures.ROIContourSequence[0].ContourSequence:
        (image,) = contour.ContourImageSequence
        shown[int(image.ReferencedFrameNumber)] = float(contour.ContourData[2])
    enhanced = pydicom.dcmread(backwards / "e.dcm")
    assert set(shown) == set(range(SHAPE[0] - 7, SHAPE[0] - 3))
    for number, z_mm in shown.items():
        (place,) = enhanced.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence
        assert place.ImagePositionPatient[2] == pytest.approx(z_mm)
    picture = pydicom.dcmread(case.folder / "secondary_capture.dcm")
    assert len(picture.SourceImageSequence) == 1
    for name in ("measurements.dcm", "secondary_capture.dcm", "structures.dcm"):
        assert dciodvfy_errors(case.folder / name) == []


def test_a_structure_set_of_frames_is_truth_without_a_doubt(backwards, tmp_path):
    (case,) = cases_of(backwards, tmp_path / "out", SETTINGS)
    headers = [each.header for each in look_for_cases(backwards, (), SETTINGS).cases[0].candidate.series.instances]
    drawn = read_structure_set(case.folder / "structures.dcm", headers[::-1], ())
    assert drawn.warnings == ()
    np.testing.assert_array_equal(drawn.labels, expected())


def test_a_seg_of_a_concatenation_refers_to_each_object_s_own_frames(tmp_path):
    (tmp_path / "in").mkdir()
    frames = frames_of(small_volume(shape=SHAPE))
    for n, part in enumerate((frames[:6], frames[6:])):
        whole = {"ConcatenationUID": "1.2.9", "InConcatenationNumber": n + 1, "InConcatenationTotalNumber": 2}
        change = partial(setter(**whole, ConcatenationFrameOffsetNumber=6 * n), _index=0)
        write_enhanced(tmp_path / "in" / f"{n}.dcm", part, uid=f"1.2.4.{n + 1}", change=change)
    (case,) = cases_of(tmp_path / "in", tmp_path / "out", SETTINGS)
    seg = hd.seg.segread(case.folder / "segmentation.dcm")
    marks = expected()
    for uid, first, last in (("1.2.4.1", 0, 6), ("1.2.4.2", 6, SHAPE[0])):
        numbers = list(range(1, last - first + 1))
        pixels = seg.get_pixels_by_source_frame(
            uid, numbers, combine_segments=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(pixels, marks[first:last])
    headers = [
        each.header for each in look_for_cases(tmp_path / "in", (), SETTINGS).cases[0].candidate.series.instances
    ]
    np.testing.assert_array_equal(read_segmentation(case.folder / "segmentation.dcm", headers), marks)


def test_volumes_of_one_file_have_results_of_their_own(tmp_path):
    (tmp_path / "in").mkdir()
    frames = [
        frame for n in range(2) for frame in frames_of(small_volume(shape=SHAPE, seed=n), TemporalPositionIndex=n + 1)
    ]
    write_enhanced(tmp_path / "in" / "e.dcm", frames)
    cases = cases_of(tmp_path / "in", tmp_path / "out", SETTINGS)
    segs = [hd.seg.segread(case.folder / "segmentation.dcm") for case in cases]
    assert len({seg.SOPInstanceUID for seg in segs}) == len({seg.SeriesInstanceUID for seg in segs}) == 2
    for n, seg in enumerate(segs):
        numbers = [n * SHAPE[0] + d + 1 for d in range(SHAPE[0])]
        pixels = seg.get_pixels_by_source_frame(
            "1.2.4.1", numbers, combine_segments=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(pixels, expected())
