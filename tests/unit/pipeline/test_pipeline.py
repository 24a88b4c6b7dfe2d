from __future__ import annotations

import gc
import json
import logging
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import jsonschema
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from ctflow.bundle import read_bundle
from ctflow.core.errors import (
    BackendUnavailable,
    BundleInvalid,
    DeviceOutOfMemory,
    EngineMismatch,
    NotWritten,
    NoUsableSeries,
    StorageFull,
)
from ctflow.core.model import RESEARCH_ONLY, Code, Segment
from ctflow.core.steps import CropForeground
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import name_without_patient
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.read.select.series import Series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.engines.contract import EngineInfo
from ctflow.export.selection import Choice
from ctflow.pipeline import documents, run, stages, write
from ctflow.pipeline.case import find_cases, key_of_series
from ctflow.pipeline.documents import exit_code_of_errors
from ctflow.pipeline.finishing import finished
from ctflow.pipeline.run import announce, run_folder
from ctflow.pipeline.segmenter import Segmenter
from ctflow.pipeline.stages import load_case, prepare_result, segment_case
from ctflow.pipeline.write import write_case
from ctflow.settings.run import Settings
from ctflow.window.find_body import find_body, mask_of_body
from dicom_support import assembled, setter
from phantom_support import phantom_drawn_once
from reasons import raises_reason
from report_support import text_of_pdf
from tests_support import dciodvfy_errors, segment_points_by_dcmqi


@pytest.fixture(scope="module")
def model(coarse_bundle):
    return read_bundle(coarse_bundle)


@pytest.fixture
def settings():
    return Settings(device="cpu", cache=None)


def noting(call, steps, word):
    """The same call, which says first that it is made."""

    def noted(*arguments, **options):
        steps.append(word)
        return call(*arguments, **options)

    return noted


def another_series(folder: Path, seed: int, adjust=None) -> Path:
    write_ct_series(phantom_drawn_once(seed, (18, 80, 80)).volume, folder, seed=seed, adjust=adjust)
    return folder


def test_a_folder_becomes_a_result_a_series(model, series, settings, tmp_path):
    steps = []
    report = run_folder(series, tmp_path, model, settings, lambda *step: steps.append(step))
    assert report.exit_code == 0
    (case,) = report.cases
    assert case.folder == tmp_path / key_of_series(case.candidate.series)
    files = {"segmentation.dcm", "measurements.dcm", "preview.png", "report.html", "result.json"}
    assert {path.name for path in case.folder.iterdir()} == files
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "done"
    assert [stage for stage, done, total in steps if done == total] == ["scan", "read", "segment", "restore", "write"]
    assert case.assembled is None, "arrays of a finished case are let go"
    with pytest.raises(ValueError, match="load it first"):
        _ = case.loaded
    with pytest.raises(ValueError, match="segment it first"):
        _ = case.segmented


def test_the_report_can_be_left_out_and_a_secondary_capture_asked_for(model, series, tmp_path):
    settings = Settings(device="cpu", cache=None, report="none", secondary_capture=True)
    (case,) = run_folder(series, tmp_path, model, settings).cases
    files = {"segmentation.dcm", "measurements.dcm", "secondary_capture.dcm", "preview.png", "result.json"}
    assert {path.name for path in case.folder.iterdir()} == files
    assert dciodvfy_errors(case.folder / "secondary_capture.dcm") == []
    with Image.open(case.folder / "preview.png") as preview:
        assert np.array_equal(pydicom.dcmread(case.folder / "secondary_capture.dcm").pixel_array, np.asarray(preview))


def test_the_report_may_also_be_a_pdf_for_an_archive(model, series, tmp_path):
    written = {}
    for name, pdf in (("with", True), ("again", True), ("without", False)):
        settings = Settings(device="cpu", cache=None, report="none", pdf=pdf)
        (case,) = run_folder(series, tmp_path / name, model, settings).cases
        files = {path.name: path.read_bytes() for path in case.folder.iterdir()}
        document = json.loads(files.pop("result.json"))
        assert document["settings"]["pdf"] is pdf
        written[name] = files
    assert written["with"] == written["again"]
    assert written["with"].keys() - written["without"].keys() == {"report.dcm"}
    assert {**written["without"], "report.dcm": written["with"]["report.dcm"]} == written["with"]
    path = next((tmp_path / "with").glob("*/report.dcm"))
    assert dciodvfy_errors(path) == []
    report = pydicom.dcmread(path)
    page = text_of_pdf(report)[0]
    finding = document["segments"][0]["findings"][0]
    assert f" 1 {finding['volume_ml']:.2f} {finding['long_axis_mm']:.1f} " in page
    assert RESEARCH_ONLY in page
    objects = [pydicom.dcmread(path.with_name(f"{name}.dcm")) for name in ("segmentation", "measurements")]
    references = [item.ReferencedSOPInstanceUID for item in report.SourceInstanceSequence]
    assert references[:2] == [each.SOPInstanceUID for each in objects]
    assert len(references) == 2 + document["series"]["slices"]


def test_what_people_look_at_holds_no_patient_data(model, settings, tmp_path):
    markers = {
        "PatientName": "Marker^Name",
        "PatientID": "MARKER-ID",
        "PatientBirthDate": "19010203",
        "AccessionNumber": "MARKER-ACC",
        "StudyDescription": "MARKER study",
        "SeriesDescription": "MARKER </script><script>",
        "ProtocolName": "MARKER protocol",
        "OperatorsName": "Marker^Operator",
    }

    def adjust(dataset, _index):
        for keyword, value in markers.items():
            setattr(dataset, keyword, value)

    settings = replace(settings, pdf=True)
    (case,) = run_folder(another_series(tmp_path / "Marker" / "in", 3, adjust), tmp_path, model, settings).cases
    for page in text_of_pdf(pydicom.dcmread(case.folder / "report.dcm")):
        assert "marker" not in page.lower()
        assert "19010203" not in page
    for name in ("report.html", "result.json", "preview.png"):
        content = (case.folder / name).read_bytes().lower()
        assert b"marker" not in content, name
        assert b"19010203" not in content, name


def test_the_same_run_gives_the_same_bytes_and_another_overlap_another_uid(model, series, settings, tmp_path):
    files = []
    for name, chosen in (("a", settings), ("b", settings), ("c", Settings(device="cpu", cache=None, overlap=0.5))):
        (case,) = run_folder(series, tmp_path / name, model, chosen).cases
        files.append(case.folder / "segmentation.dcm")
    assert files[0].read_bytes() == files[1].read_bytes()
    reports = [path.with_name("measurements.dcm") for path in files]
    assert reports[0].read_bytes() == reports[1].read_bytes()
    assert pydicom.dcmread(reports[0]).SOPInstanceUID != pydicom.dcmread(reports[2]).SOPInstanceUID
    first, other = (pydicom.dcmread(path) for path in (files[0], files[2]))
    assert first.SOPInstanceUID != other.SOPInstanceUID
    assert first.SeriesInstanceUID != other.SeriesInstanceUID  # viewers show one object of a series


def test_broken_and_good_series_end_as_six(model, series, settings, tmp_path):
    folder = tmp_path / "in"
    another_series(folder / "broken", 1)
    (folder / "broken" / "00009.dcm").unlink()
    (folder / "good").symlink_to(series)
    report = run_folder(folder, tmp_path / "out", model, settings)
    assert report.exit_code == 6
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["status"] == "partly"
    refused = next(entry for entry in document["series"] if entry["status"] == "refused")
    assert refused["error"]["reason"] == "gap"
    assert refused["error"]["type"] == "BrokenSeries"


def test_an_unreadable_file_beside_a_good_series_ends_as_six(model, series, settings, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good").symlink_to(series)
    (folder / "empty.dcm").touch()
    report = run_folder(folder, tmp_path / "out", model, settings)
    assert report.exit_code == 6
    assert report.document["status"] == "partly"
    assert [entry["file"] for entry in report.document["unreadable"]] == [name_without_patient(Path("empty.dcm"))]


def tilted_in_pieces(dataset, index):
    """2 mm apart up to the tenth slice, then 3 mm, and 0.3 mm to the back for every mm upwards."""
    x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
    up = 2 * index + max(index - 9, 0)
    dataset.ImagePositionPatient = [x, y + 0.3 * up, z - index * float(dataset.SpacingBetweenSlices) + up]


def test_a_last_slice_that_a_damaged_uid_cuts_off_ends_as_six(model, settings, tmp_path):
    cut = setter(SeriesInstanceUID="1.2.3")
    another_series(tmp_path / "in", 1, lambda dataset, d: cut(dataset, d) if d == 17 else None)
    report = run_folder(tmp_path / "in", tmp_path / "out", model, settings)
    assert report.exit_code == 6
    assert report.document["set_aside"][0]["reason"] == "orphaned"
    (case,) = report.cases
    assert "may belong to it" in " ".join(case.document["warnings"])


def tilted(dataset, index):
    """0.3 mm to the back for every mm upwards."""
    x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
    dataset.ImagePositionPatient = [x, y + 0.3 * index * float(dataset.SpacingBetweenSlices), z]


def test_a_tilted_series_in_pieces_is_resampled_and_marked_on_its_own_slices(model, settings, tmp_path):
    another_series(tmp_path / "in", 1, tilted_in_pieces)
    (case,) = run_folder(tmp_path / "in", tmp_path / "out", model, settings).cases
    assert case.error is None
    said = " ".join(case.document["warnings"])
    assert "9 of 2.000 mm, 8 of 3.000 mm" in said
    assert "tilt of 16.7 degrees" in said
    assert case.document["series"]["shape"] == [22, 80, 80]
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((tmp_path / "in").iterdir())]
    labels = read_segmentation(case.folder / "segmentation.dcm", headers)
    assert labels.shape == (18, 80, 80)
    assert labels.any()
    volume_ml = sum(segment["volume_ml"] for segment in case.document["segments"])
    per_voxel = volume_ml / (np.prod(case.document["series"]["spacing_mm"]) * np.cos(np.arctan(0.3)) / 1000)
    assert per_voxel == pytest.approx(round(per_voxel), abs=1e-2), (
        "counted on the resampled grid, of its voxels' volume"
    )


def test_a_resampled_series_marks_the_same_slices_in_every_kind_of_seg(model, settings, tmp_path):
    another_series(tmp_path / "in", 1, tilted_in_pieces)
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted((tmp_path / "in").iterdir())]
    kinds = {"binary": {}, "labelmap": {"seg": "labelmap"}, "fractional": {"seg": "fractional"},
             "finding": {"segments": "finding", "nifti": True}}  # fmt: skip
    marked = {}
    for kind, chosen in kinds.items():
        (case,) = run_folder(tmp_path / "in", tmp_path / kind, model, replace(settings, **chosen)).cases
        marked[kind] = read_segmentation(case.folder / "segmentation.dcm", headers) > 0
    assert marked["binary"].shape == (18, 80, 80)
    assert marked["binary"].any()
    assert all(np.array_equal(mask, marked["binary"]) for mask in marked.values())
    image = nibabel.load(case.folder / "segmentation.nii.gz")
    assert image.shape == (80, 80, 22), "NIfTI has the resampled grid, which its affine can say"


def run_on_grid(model, settings, folder, output):
    """A run with a SEG on the right-angled grid, its NIfTI, and the points that highdicom finds marked, in LPS mm."""
    (case,) = run_folder(folder, output, model, replace(settings, seg_grid="resampled", nifti=True)).cases
    assert case.error is None
    volume = hd.seg.segread(case.folder / "segmentation.dcm").get_volume(
        combine_segments=True, allow_missing_positions=True
    )
    index = np.argwhere(volume.array > 0)
    return case, ordered(volume.map_indices_to_reference(index))


def points_of_nifti(case):
    image = nibabel.load(case.folder / "segmentation.nii.gz")
    index = np.argwhere(np.asarray(image.dataobj) > 0)
    return ordered(nibabel.affines.apply_affine(image.affine, index) * [-1, -1, 1])


def ordered(points):
    rounded = np.round(np.asarray(points, dtype=np.float64), 2) + 0.0
    return rounded[np.lexsort(rounded.T)]


@pytest.mark.parametrize("adjust", [tilted_in_pieces, tilted])
def test_a_seg_on_a_right_angled_grid_opens_where_one_on_tilted_slices_does_not(
    model, settings, tmp_path, adjust, caplog
):
    another_series(tmp_path / "in", 1, adjust)
    case, points = run_on_grid(model, settings, tmp_path / "in", tmp_path / "out")
    path = case.folder / "segmentation.dcm"
    assert len(points) > 0
    assert np.allclose(points, points_of_nifti(case), atol=0.02)
    assert np.allclose(points, ordered(segment_points_by_dcmqi(path)), atol=0.02)
    assert dciodvfy_errors(path) == []
    assert dciodvfy_errors(case.folder / "measurements.dcm") == []
    said = " ".join(case.document["warnings"])
    assert "The SEG lies on that volume's grid and not on the slices." in said
    assert "resampled to right angles; lengths" in said
    assert "put it elsewhere" not in said

    (other,) = run_folder(tmp_path / "in", tmp_path / "tilted", model, replace(settings, nifti=True)).cases
    said = " ".join(other.document["warnings"])
    assert "the SEG lies on tilted" in said
    assert "put it elsewhere or lose it" in caplog.text
    assert "dcmqi (3D Slicer uses it), pydicom-seg and ITK put it elsewhere or lose it" in said
    uids = [pydicom.dcmread(one.folder / "segmentation.dcm").SOPInstanceUID for one in (case, other)]
    assert uids[0] != uids[1]
    on_slices = points_of_nifti(other)
    distance_mm, _ = cKDTree(points).query(on_slices)
    assert distance_mm.max() < 4.5, "a pixel: what is marked on the slices is also marked there at right angles"


def askew(dataset, index):
    """Tilted, and rows not at right angles to columns: as a coarsely written orientation says it."""
    tilted(dataset, index)
    dataset.ImageOrientationPatient = [1, 0, 0, 0.005, 0.99999, 0]


def narrow(dataset, index):
    """Tilted by 40 degrees along rows and columns, of which 25,000 lie between the first slice and the last."""
    x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
    dataset.ImagePositionPatient = [x + 1.5 * index, y + 1.5 * index, z]
    dataset.PixelSpacing = [0.001, 0.001]


@pytest.mark.parametrize(
    ("adjust", "reason", "named"),
    [(askew, "tilted", "--seg-grid resampled"), (narrow, "implausible-spacing", "PixelSpacing")],
)
def test_a_series_that_no_right_angled_grid_holds_is_refused_and_stops_no_other(
    model, series, settings, tmp_path, adjust, reason, named
):
    another_series(tmp_path / "in" / "odd", 1, adjust)
    (tmp_path / "in" / "good").symlink_to(series)
    report = run_folder(tmp_path / "in", tmp_path / "out", model, replace(settings, seg_grid="resampled"))
    assert report.exit_code == 6
    (refused,) = [entry["error"] for entry in report.document["series"] if entry["error"]]
    assert refused["reason"] == reason
    assert named in refused["message"]


def test_a_seg_of_an_even_series_lies_on_its_slices_whatever_grid_is_asked_for(model, series, settings, tmp_path):
    run_folder(series, tmp_path / "source", model, settings)
    run_folder(series, tmp_path / "resampled", model, replace(settings, seg_grid="resampled"))
    paths = [sorted(folder.rglob("segmentation.dcm")) for folder in (tmp_path / "source", tmp_path / "resampled")]
    assert paths[0][0].read_bytes() == paths[1][0].read_bytes()


def test_every_kind_of_seg_marks_the_same_on_a_right_angled_grid(model, settings, tmp_path):
    another_series(tmp_path / "in", 1, tilted_in_pieces)
    _, points = run_on_grid(model, settings, tmp_path / "in", tmp_path / "out")
    for seg in ("labelmap", "fractional"):
        (case,) = run_folder(
            tmp_path / "in", tmp_path / seg, model, replace(settings, seg_grid="resampled", seg=seg)
        ).cases
        found = segment_points_by_dcmqi(case.folder / "segmentation.dcm", least=128 if seg == "fractional" else 1)
        assert np.allclose(points, ordered(found), atol=0.02)


def test_nothing_is_marked_beside_the_slices_of_a_tilted_series(model, settings, tmp_path, monkeypatch):
    another_series(tmp_path / "in", 1, tilted)
    everything = replace(model, spec=replace(model.spec, threshold=1e-6))
    case, points = run_on_grid(everything, settings, tmp_path / "in", tmp_path / "out")
    labels = np.asarray(nibabel.load(case.folder / "segmentation.nii.gz").dataobj).transpose(2, 1, 0)
    rows = np.flatnonzero(labels[0].any(axis=1))
    assert len(rows) == 80 < labels.shape[1]
    assert len(points) == labels.sum()


def test_a_missing_slice_runs_with_allow_gaps(model, tmp_path):
    another_series(tmp_path / "in", 1)
    (tmp_path / "in" / "00009.dcm").unlink()
    report = run_folder(tmp_path / "in", tmp_path / "out", model, Settings(device="cpu", cache=None, allow_gaps=True))
    assert report.exit_code == 0
    (case,) = report.cases
    assert case.document["series"]["shape"][0] == 18
    assert any("--allow-gaps" in warning for warning in case.document["warnings"])
    assert case.document["settings"]["allow_gaps"] is True


def test_a_finding_between_slices_is_told_of(model, settings, tmp_path):
    another_series(tmp_path / "in", 1)
    (tmp_path / "in" / "00009.dcm").unlink()
    chosen = replace(settings, allow_gaps=True)
    case = load_case(find_cases(tmp_path / "in", model.spec, chosen).cases[0])
    with Segmenter(model, chosen) as segmenter:
        case = segment_case(case, segmenter)
    labels = np.zeros_like(case.segmented.labels)
    (missing,) = set(range(18)) - set(case.loaded.slices)
    labels[missing, 30:34, 30:34] = 1
    labels[3, 10:14, 10:14] = 1
    again = replace(case, segmentation=replace(case.segmentation, labels=labels))
    case = write_case(again, model, chosen, tmp_path / "out")
    assert case.error is None
    said = "1 finding lies between the slices that there are: measured, but not in the SEG"
    said += " (--seg-grid resampled writes them)"
    assert said in case.document["warnings"]
    comments = pydicom.dcmread(case.folder / "measurements.dcm").to_json()
    assert said in comments
    assert "resampled to equal distances" in comments

    case = write_case(replace(again, seg_grid="resampled"), model, chosen, tmp_path / "grid")
    volume = hd.seg.segread(case.folder / "segmentation.dcm").get_volume(
        combine_segments=True, allow_missing_positions=True
    )
    assert int((volume.array > 0).sum()) == int((labels > 0).sum()), "on the grid, no finding is lost"
    assert not any("between the slices" in warning for warning in case.document["warnings"])


def test_a_write_failure_is_noted_and_leaves_only_the_run_s_document(model, series, settings, tmp_path, monkeypatch):
    def full(*_):
        raise StorageFull("the disk is full")

    monkeypatch.setattr(write, "write_dataset", full)
    report = run_folder(series, tmp_path / "out", model, settings)
    assert report.exit_code == 5
    assert report.document["series"][0]["status"] == "failed"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_a_report_that_cannot_be_written_takes_the_seg_with_it(model, series, settings, tmp_path, monkeypatch):
    true_write = write.write_dataset

    def full(dataset, path):
        if path.name == "measurements.dcm":
            raise StorageFull("the disk is full")
        true_write(dataset, path)

    monkeypatch.setattr(write, "write_dataset", full)
    assert run_folder(series, tmp_path / "out", model, settings).exit_code == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_no_series_is_named_before_an_engine_opens(model, tmp_path):
    (tmp_path / "in").mkdir()
    with raises_reason(NoUsableSeries, "no-dicom"):
        run_folder(tmp_path / "in", tmp_path / "out", model, Settings(engine="no such engine", cache=None))


@pytest.mark.parametrize(("folder", "named"), [("jpeg2000", "SOPClassUID"), ("tilted", "BodyPartExamined")])
def test_real_ct_that_is_not_for_the_model_is_refused_by_name(data, model, settings, tmp_path, folder, named):
    with raises_reason(NoUsableSeries, "none-eligible", names=named):
        run_folder(data / folder, tmp_path / "out", model, settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_real_ct_whose_files_share_a_uid_is_refused_by_name(data, model, settings, tmp_path):
    report = run_folder(data / "transfer-syntaxes", tmp_path / "out", model, settings)
    (case,) = report.cases
    assert (report.exit_code, case.error.reason) == (2, "doubled")


def test_real_ct_on_tilted_uneven_slices_is_marked_on_them(data, model, tmp_path):
    report = run_folder(data / "tilted", tmp_path / "out", model, Settings(device="cpu", cache=None, force=True))
    (case,) = report.cases
    assert report.exit_code == 0
    assert any("tilt of 18.5 degrees" in warning for warning in case.warnings)
    instances = case.candidate.series.instances
    places = {tuple(map(float, each.header.ImagePositionPatient)) for each in instances}
    assert len(places) == 28
    seg = pydicom.dcmread(next((tmp_path / "out").glob("*/segmentation.dcm")))
    frames = [each.PlanePositionSequence[0].ImagePositionPatient for each in seg.PerFrameFunctionalGroupsSequence]
    assert {tuple(map(float, frame)) for frame in frames} <= places


def test_forced_and_dropped_series_carry_warnings(model, settings, tmp_path):
    def localizer(dataset, index):
        dataset.BodyPartExamined = "HEAD"
        if index == 0:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    another_series(tmp_path / "in", 2, localizer)
    found = find_cases(tmp_path / "in", model.spec, Settings(force=True, cache=None))
    (case,) = found.cases
    assert len(case.warnings) == 2
    assert "localizer" in case.warnings[0]
    assert "--force" in case.warnings[1]
    with raises_reason(NoUsableSeries, "none-eligible", names="BodyPartExamined"):
        find_cases(tmp_path / "in", model.spec, settings)


def test_the_name_of_a_folder_does_not_depend_on_what_else_is_in_the_input(model, settings, tmp_path):
    for study in (1, 2):

        def adjust(dataset, _index, study=study):
            dataset.SeriesInstanceUID = "1.2.3"
            dataset.StudyInstanceUID = f"1.2.3.{study}"

        another_series(tmp_path / str(study), study, adjust)

    def keys(folder) -> list[str]:
        return [case.key for case in find_cases(folder, model.spec, settings).cases]

    assert keys(tmp_path) == keys(tmp_path / "1") + keys(tmp_path / "2")
    assert keys(tmp_path / "1") != keys(tmp_path / "2")


@pytest.mark.parametrize(
    ("uid", "safe"),
    [
        ("1.2.3", True),
        ("1" * 64, True),
        ("1" * 65, False),
        ("../../x", False),
        ("", False),
    ],
)
def test_a_folder_is_named_by_the_uid_only_if_that_is_safe(uid, safe):
    key = key_of_series(Series(uid, "", "1.2", ()))
    assert key.startswith(f"{uid}-" if safe else f"{digest_of_uid(uid)}-")
    assert "/" not in key


def test_a_later_stage_passes_an_earlier_error_on(model, settings, tmp_path):
    another_series(tmp_path / "in", 1)
    (tmp_path / "in" / "00009.dcm").unlink()
    (case,) = find_cases(tmp_path / "in", model.spec, settings).cases
    failed = load_case(case)
    assert failed.error is not None
    assert stages.segment_case(failed, Segmenter(model, settings)) is failed
    assert write.write_case(failed, model, settings, tmp_path / "out") is failed
    assert exit_code_of_errors([failed.error]) == 2


def test_a_segmenter_must_be_open(model, settings):
    volume = phantom_drawn_once(0, (16, 32, 32)).volume
    segmenter = Segmenter(model, settings)
    with pytest.raises(ValueError, match="open the segmenter"):
        segmenter.segment(volume)
    with segmenter:
        first, seconds = segmenter.segment(volume)
        second, _ = segmenter.segment(volume)
    segmenter.close()
    assert np.array_equal(first.labels, second.labels)
    assert first.labels.shape == volume.array.shape
    assert first.window == {"roi": [64, 64, 64], "overlap": 0.25, "blend": "gaussian", "batch_size": 1}
    assert set(seconds) == {"prepare", "segment", "restore"}
    assert first.engine.backend == "eager"


def test_a_result_is_prepared_while_the_mask_is_computed(model, series, settings, tmp_path, monkeypatch):
    case = load_case(find_cases(series, model.spec, settings).cases[0])
    with pytest.raises(ValueError, match="segment it first"):
        _ = case.prepared
    steps = []
    monkeypatch.setattr(stages, "prepare_result", noting(prepare_result, steps, "prepare"))
    with Segmenter(model, settings) as segmenter:
        target = "ctflow.pipeline.segmenter.finished"
        monkeypatch.setattr(target, noting(finished, steps, "begin restore"))
        case = segment_case(case, segmenter, lambda stage, done, total: steps.append(stage) if done == total else None)
    assert steps[:3] == ["segment", "prepare", "begin restore"]
    assert case.prepared.uids == tuple(each.header.SOPInstanceUID for each in case.loaded.instances)
    assert write_case(case, model, settings, tmp_path).sources is None


def test_report_and_preview_are_drawn_while_the_seg_is_made(model, series, settings, tmp_path, monkeypatch):
    case, beside = segmented(model, series, settings), threading.Event()
    real, write_report = write.segmentation_from_labels, write.write_html_report

    def make(*given, **named):
        assert beside.wait(60), "the report waits for the SEG"
        assert not (tmp_path / case.key).exists(), "nothing of a result is seen before all of it is there"
        return real(*given, **named)

    def drawn(*given):
        write_report(*given)
        beside.set()

    monkeypatch.setattr(write, "segmentation_from_labels", make)
    monkeypatch.setattr(write, "write_html_report", drawn)
    done = write_case(case, model, replace(settings, report="html"), tmp_path)
    names = {path.name for path in (tmp_path / case.key).iterdir()}
    assert names == {"segmentation.dcm", "measurements.dcm", "preview.png", "report.html", "result.json"}
    assert done.stage_seconds["seg"] > done.stage_seconds["measure"] + done.stage_seconds["preview"]


@pytest.mark.parametrize("step", ["segmentation_from_labels", "measure_segments", "draw_preview", "write_html_report"])
def test_an_error_of_any_part_of_a_result_is_the_cases_and_leaves_nothing(
    model, series, settings, tmp_path, monkeypatch, step
):
    case = segmented(model, series, settings)
    full = StorageFull("no space left for it")
    monkeypatch.setattr(write, step, lambda *_given, **_named: (_ for _ in ()).throw(full))
    assert write_case(case, model, replace(settings, report="html"), tmp_path / "out").error is full
    assert not (tmp_path / "out").exists()
    assert not [each for each in threading.enumerate() if each.name.startswith("beside the SEG")]


def segmented(model, series, settings):
    case = load_case(find_cases(series, model.spec, settings).cases[0])
    with Segmenter(model, settings) as segmenter:
        return segment_case(case, segmenter)


def test_an_error_of_preparation_is_the_cases(model, series, settings, monkeypatch):
    case = load_case(find_cases(series, model.spec, settings).cases[0])

    def fail(_case):
        raise MemoryError

    monkeypatch.setattr(stages, "prepare_result", fail)
    with Segmenter(model, settings) as segmenter:
        assert isinstance(segment_case(case, segmenter).error, DeviceOutOfMemory)


def test_a_network_that_returns_nan_is_a_named_error(model, series, settings, tmp_path, monkeypatch):
    segmenter = Segmenter(model, settings)
    with segmenter:
        monkeypatch.setattr(
            segmenter._engines[0], "predict", lambda windows: windows.new_full((1, 2, 64, 64, 64), float("nan"))
        )
        (case,) = find_cases(series, model.spec, settings).cases
        failed = run.run_case(case, segmenter, settings, tmp_path / "out")
    assert isinstance(failed.error, BundleInvalid)
    assert not (tmp_path / "out").exists()


def test_the_first_log_line_of_a_demonstration_says_so(model, caplog):
    with caplog.at_level(logging.INFO):
        announce(model)
    assert caplog.messages[0].startswith("RESEARCH ONLY - NOT FOR CLINICAL USE")
    assert model.weights_digest[:12] in caplog.messages[1]


def test_too_little_memory_is_a_named_error_of_that_series(model, series, settings, monkeypatch):
    def fail(*_, **_options):
        raise MemoryError

    monkeypatch.setattr(stages, "assemble_series", fail)
    (case,) = find_cases(series, model.spec, settings).cases
    failed = load_case(case)
    assert failed.error is not None
    assert failed.error.exit_code == 4
    assert case.candidate.series.digest in str(failed.error)


def test_with_a_cache_the_fastest_exact_engine_is_chosen_and_made(model, series, tmp_path):
    """Another engine marks the same but for voxels on the border, and its SEG has its own UID.

    The first CT is compared with PyTorch, a later one carries the figures, and both have the same SEG.
    """
    plain = run_folder(series, tmp_path / "plain", model, Settings(device="cpu", cache=None))
    chosen = Settings(device="cpu", engine="openvino", cache=tmp_path / "cache")
    quick, again = (run_folder(series, tmp_path / name, model, chosen) for name in ("quick", "again"))
    masks, uids = [], []
    for report in (plain, quick):
        dataset = pydicom.dcmread(report.cases[0].folder / "segmentation.dcm")
        uids.append(dataset.SOPInstanceUID)
        masks.append(read_segmentation(report.cases[0].folder / "segmentation.dcm", headers_of(series)) > 0)
    assert uids[0] != uids[1]
    assert 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()) > 0.995
    document = json.loads((quick.cases[0].folder / "result.json").read_text())
    assert document["engine"]["backend"] == "openvino"
    assert document["engine"]["out_channels"] == 2
    assert "cache" not in document["settings"]
    assert str(tmp_path) not in json.dumps(document)
    agreement = document["agreement"]
    assert (agreement["engine"], agreement["reference"], agreement["series"]) == (
        "openvino fp32",
        "eager fp32",
        "this series",
    )
    assert 1 <= agreement["windows"] <= agreement["of"]
    assert document["measured"] == [], "the engine was named"
    assert 0 < agreement["relative_error"] < 6e-3
    assert plain.cases[0].document["agreement"] is None, "PyTorch in fp32 is what it is compared with"
    later = json.loads((again.cases[0].folder / "result.json").read_text())
    assert later["agreement"] == {**agreement, "series": "an earlier series"}
    files = [report.cases[0].folder / "segmentation.dcm" for report in (quick, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_a_cache_auto_is_plain_pytorch(model):
    segmenter = Segmenter(model, Settings(device="cpu", cache=None))
    with segmenter:
        assert segmenter._engines[0].info.backend == "eager"


@pytest.fixture
def small_windows(model):
    """The model with so small a window that the test's chest has several."""
    return replace(model, spec=replace(model.spec, roi=(32, 32, 32), batch_size=4))


def test_several_devices_give_the_seg_of_one(small_windows, series, settings, tmp_path, monkeypatch):
    def predict(windows):
        place = torch.linspace(-1, 1, 32**3).reshape(32, 32, 32)
        return torch.cat([windows.new_zeros(windows.shape), windows - 0.6 + place / 4], dim=1)

    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(predict))
    one = run_folder(series, tmp_path / "one", small_windows, settings)
    monkeypatch.setattr("ctflow.pipeline.opened.devices_from_setting", lambda _: ("cpu", "cpu"))
    steps = []
    both = run_folder(series, tmp_path / "both", small_windows, settings, lambda *step: steps.append(step))
    assert max(total for stage, _, total in steps if stage == "segment") >= 4
    files = [report.cases[0].folder / "segmentation.dcm" for report in (one, both)]
    assert files[0].read_bytes() == files[1].read_bytes()
    document = json.loads((both.cases[0].folder / "result.json").read_text())
    assert document["engine"]["device"] == "cpu,cpu"
    assert document["segments"][0]["voxels"] > 1000
    assert document["warnings"] == one.cases[0].document["warnings"]


def test_no_engine_stays_open_if_the_next_device_has_none(model, settings, monkeypatch):
    opened, closed = [], []

    class Opened:
        def __init__(self, device):
            self.info = replace(INFO, device=device)

        def close(self):
            closed.append(self.info.device)

    def open_engine(request, _model, **_):
        opened.append((request.backend, request.device))
        if request.device == "cuda:2":
            raise BackendUnavailable("no", reason="device-failed")
        return Opened(request.device)

    monkeypatch.setattr("ctflow.pipeline.opened.devices_from_setting", lambda _: ("cuda:0", "cuda:1", "cuda:2"))
    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", open_engine)
    segmenter = Segmenter(model, settings)
    with raises_reason(BackendUnavailable, "device-failed"):
        segmenter.open()
    assert opened == [("auto", "cuda:0"), ("eager", "cuda:1"), ("eager", "cuda:2")]
    assert sorted(closed) == ["cuda:0", "cuda:1"]
    segmenter.close()
    assert len(closed) == 2


INFO = EngineInfo("eager", "fp32", "cpu", (32, 32, 32), (1, 4), "0", 2)


def test_too_little_memory_for_a_batch_is_a_warning_of_that_case_only(
    small_windows, series, settings, tmp_path, caplog, monkeypatch
):
    least = [1]

    def predict(windows):
        if len(windows) > least[0]:
            raise DeviceOutOfMemory("too little memory")
        return torch.zeros(len(windows), 2, 32, 32, 32)

    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(predict))
    with Segmenter(small_windows, settings) as segmenter:
        (case,) = find_cases(series, small_windows.spec, settings).cases
        done = run.run_case(case, segmenter, settings, tmp_path / "a")
        least[0] = 4
        again = run.run_case(case, segmenter, settings, tmp_path / "b")
    document = json.loads((done.folder / "result.json").read_text())
    warning = "cpu had too little memory for 4 windows at once; they were computed 1 at a time"
    assert warning in document["warnings"]
    assert document["window"]["batch_size"] == 1
    assert warning in caplog.messages
    assert again.document["window"]["batch_size"] == 4
    assert warning not in again.document["warnings"]
    files = [folder / "segmentation.dcm" for folder in (done.folder, again.folder)]
    assert files[0].read_bytes() == files[1].read_bytes(), "the batch size is no part of the SEG"


class FakeEngine:
    def __init__(self, predict):
        self.predict, self.info = predict, INFO

    def close(self):
        pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
)
@pytest.mark.parametrize("stage", ["prepare_volume", "predict_volume", "values_to_restore"])
def test_too_little_memory_anywhere_is_named_and_nothing_of_the_case_is_kept(
    model, series, settings, monkeypatch, error, stage
):
    held = []

    def fail(*_, **__):
        array = torch.zeros(10)
        held.append(weakref.ref(array))
        raise error

    modules = {
        "prepare_volume": "transforms.by_monai.case",
        "predict_volume": "pipeline.prediction",
        "values_to_restore": "pipeline.finishing",
    }
    monkeypatch.setattr(f"ctflow.{modules[stage]}.{stage}", fail)
    if stage == "values_to_restore":
        zeros = lambda volume, **_: torch.zeros(1, 2, *volume.shape[2:])  # noqa: E731
        monkeypatch.setattr("ctflow.pipeline.prediction.predict_volume", zeros)
    with Segmenter(model, settings) as segmenter:
        (case,) = find_cases(series, model.spec, settings).cases
        failed = stages.segment_case(load_case(case), segmenter)
    assert isinstance(failed.error, DeviceOutOfMemory)
    assert "too little memory for this volume" in str(failed.error)
    assert held[0]() is None


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("prepare_result", MemoryError()),
        ("write_result", NotWritten("no", reason="unwritable")),
        ("write_result", KeyError("fault")),
    ],
)
def test_a_case_that_fails_holds_no_array(model, series, settings, tmp_path, monkeypatch, error, stage):
    held, true_segment = [], Segmenter.segment

    def load(*arguments, **options):
        found = assemble_series(*arguments, **options)
        held.append(weakref.ref(found.volume.array))
        return found

    def segment(*arguments, **options):
        found = true_segment(*arguments, **options)
        held.append(weakref.ref(found[0].labels))
        return found

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(stages, "assemble_series", load)
    monkeypatch.setattr(Segmenter, "segment", segment)
    monkeypatch.setattr(stages if stage == "prepare_result" else write, stage, fail)
    found = find_cases(series, model.spec, settings)
    with Segmenter(model, settings) as segmenter:
        failed = run.run_case(found.cases[0], segmenter, settings, tmp_path / "out")
        gc.collect()
        assert len(held) == (1 if stage == "prepare_result" else 2)
        assert all(array() is None for array in held)
    assert failed.error is not None
    assert (failed.assembled, failed.sources, failed.segmentation, failed.body) == (None,) * 4
    monkeypatch.undo()
    (document,) = documents.document_of_run([failed], found, model.spec, tmp_path / "out")["series"]
    expected = assembled(series).volume.geometry
    assert document["series"]["shape"] == list(expected.shape)
    assert document["series"]["spacing_mm"] == pytest.approx(expected.spacing_mm)


def headers_of(folder: Path) -> list[pydicom.Dataset]:
    return [instance.header for instance in assembled(folder).instances]


def test_a_damaged_engine_costs_speed_with_auto_and_is_named_otherwise(model, series, tmp_path, monkeypatch):
    def damaged(*_, **__):
        raise EngineMismatch("stored engine onnx-1: manifest.json cannot be read", reason="stored-engine")

    monkeypatch.setattr("ctflow.pipeline.opened.choose_fastest", lambda *_, **__: Choice("openvino", "fp32", ()))
    monkeypatch.setattr("ctflow.pipeline.opened.prepare_to_open", damaged)
    settings = Settings(device="cpu", cache=tmp_path / "cache")
    with Segmenter(model, settings) as segmenter:
        assert segmenter._engines[0].info.backend == "eager"
        assert "onnx-1" in segmenter.warnings[0]
    with raises_reason(EngineMismatch, "stored-engine"):
        Segmenter(model, replace(settings, engine="openvino")).open()


@pytest.mark.parametrize("cache", ["cache", None])
def test_an_engine_that_may_be_made_for_this_device_is_told_of(model, tmp_path, monkeypatch, caplog, cache):
    monkeypatch.setattr("ctflow.pipeline.opened.choose_fastest", lambda *_, **__: Choice("eager", "fp32", ()))
    monkeypatch.setattr("ctflow.pipeline.opened.engines_not_made", lambda *_, **__: ("tensorrt-rtx",))
    settings = Settings(device="cpu", cache=cache and tmp_path / cache)
    with Segmenter(model, settings) as segmenter:
        assert segmenter._engines[0].info.backend == "eager"
        (said,) = segmenter.warnings
    assert "`ctflow export` makes one (tensorrt-rtx)" in said
    assert said in caplog.text


def test_a_cache_that_cannot_be_written_costs_speed_and_not_the_case(model, series, tmp_path, caplog):
    (tmp_path / "file").touch()
    settings = Settings(device="cpu", cache=tmp_path / "file" / "cache")
    (case,) = run_folder(series, tmp_path / "out", model, settings).cases
    document = json.loads((case.folder / "result.json").read_text())
    assert document["engine"]["backend"] == "eager"
    assert any("--cache" in warning for warning in document["warnings"])
    assert str(tmp_path) not in json.dumps(document)
    with raises_reason(NotWritten, "unwritable"):
        run_folder(series, tmp_path / "other", model, replace(settings, engine="openvino"))


def test_the_form_of_the_seg_changes_nothing_of_the_mask(model, series, settings, tmp_path):
    """Nor of the measurements; the fractional one's border is the mask's, voxel for voxel."""
    headers, documents, masks = headers_of(series), {}, {}
    for seg in ("binary", "labelmap", "fractional"):
        chosen = replace(settings, seg=seg, omit_empty_frames=seg != "labelmap")
        (case,) = run_folder(series, tmp_path / seg, model, chosen).cases
        path = case.folder / "segmentation.dcm"
        assert pydicom.dcmread(path).SegmentationType == seg.upper()
        documents[seg] = json.loads((case.folder / "result.json").read_text())
        masks[seg] = read_segmentation(path, headers)
        assert documents[seg]["settings"]["seg"] == seg
    assert masks["binary"].any()
    for seg in ("labelmap", "fractional"):
        assert np.array_equal(masks[seg], masks["binary"])
        assert documents[seg]["segments"] == documents["binary"]["segments"]
    assert int(pydicom.dcmread(tmp_path / "labelmap" / case.key / "segmentation.dcm").NumberOfFrames) == len(headers)


def test_a_segment_a_finding_and_nifti_by_option(model, series, settings, tmp_path):
    plain = run_folder(series, tmp_path / "plain", model, settings).cases[0]
    chosen = replace(settings, segments="finding", nifti=True)
    case = run_folder(series, tmp_path / "split", model, chosen).cases[0]
    assert not (plain.folder / "segmentation.nii.gz").exists()
    (segment,) = case.document["segments"]
    split = read_segmentation(case.folder / "segmentation.dcm", headers_of(series))
    whole = read_segmentation(plain.folder / "segmentation.dcm", headers_of(series))
    assert np.array_equal(split > 0, whole > 0)
    listed = len(segment["findings"])
    assert listed > 1
    assert int(split.max()) == listed + (segment["findings_left_out"] > 0)
    for number, finding in enumerate(segment["findings"], start=1):
        voxel_ml = segment["volume_ml"] / segment["voxels"]
        assert (split == number).sum() * voxel_ml == pytest.approx(finding["volume_ml"])
    image = nibabel.load(case.folder / "segmentation.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), split)


def test_several_classes_keep_their_codes_and_colours_in_every_form(
    small_windows, series, settings, tmp_path, monkeypatch
):
    codes = [Code("4147007", "SCT", "Mass"), Code("39607008", "SCT", "Lung")]
    segments = tuple(
        Segment(
            number, code.meaning, Code("123037004", "SCT", "Anatomical Structure"), code, colour=(40 * number, 9, 9)
        )
        for number, code in enumerate(codes, start=1)
    )
    several = replace(small_windows, spec=replace(small_windows.spec, out_channels=3, segments=segments))

    def predict(windows):
        place = torch.linspace(-2, 2, 32**3).reshape(32, 32, 32)
        return torch.cat([windows.new_zeros(windows.shape), windows - 0.6 + place, windows - 0.6 - place], dim=1)

    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(predict))
    masks = []
    for seg in ("binary", "labelmap", "fractional"):
        (case,) = run_folder(series, tmp_path / seg, several, replace(settings, seg=seg)).cases
        dataset = pydicom.dcmread(case.folder / "segmentation.dcm")
        described = dataset.SegmentSequence[-2:]
        assert [item.SegmentLabel for item in described] == ["Mass", "Lung"]
        assert [item.SegmentedPropertyTypeCodeSequence[0].CodeValue for item in described] == ["4147007", "39607008"]
        assert len({tuple(item.RecommendedDisplayCIELabValue) for item in described}) == 2
        masks.append(read_segmentation(case.folder / "segmentation.dcm", headers_of(series)))
    assert set(np.unique(masks[0])) == {0, 1, 2}
    assert np.array_equal(masks[1], masks[0])
    assert np.array_equal(masks[2], masks[0])


def test_a_fractional_seg_of_another_threshold_says_so(small_windows, series, settings, tmp_path, monkeypatch):
    spec = replace(small_windows.spec, out_channels=1, activation="sigmoid", threshold=0.3)
    monkeypatch.setattr(
        "ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(lambda windows: windows - 1.2)
    )
    chosen = replace(settings, seg="fractional")
    (case,) = run_folder(series, tmp_path / "out", replace(small_windows, spec=spec), chosen).cases
    assert any("voxels of 0.3 or more" in warning for warning in case.document["warnings"])
    (plain,) = run_folder(series, tmp_path / "plain", replace(small_windows, spec=spec), settings).cases
    assert not any("0.3" in warning for warning in plain.document["warnings"])


def everywhere(windows):
    """Marks air and tissue alike, here and there; depends on the place inside the window."""
    place = torch.linspace(-1, 1, windows[0, 0].numel()).reshape(windows.shape[2:])
    return torch.cat([windows.new_zeros(windows.shape), torch.sin(9 * windows + 40 * place)], dim=1)


@pytest.fixture
def body_windows(model, monkeypatch):
    """The model with windows of 36 mm, of which many lie in air, and a network that also marks air."""
    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(everywhere))
    return replace(model, spec=replace(model.spec, roi=(6, 6, 4), batch_size=4))


@pytest.mark.parametrize("seg", ["binary", "fractional"])
def test_where_the_body_is_the_result_is_that_of_all_windows_bit_for_bit(body_windows, settings, seg):
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    body = find_body(torch.from_numpy(volume.array), volume.geometry.spacing_mm)
    inside = mask_of_body(body, torch.device("cpu")).mask_of_slices(slice(0, 24)).numpy()
    found = {}
    for roi in ("none", "body"):
        with Segmenter(body_windows, replace(settings, roi=roi, seg=seg)) as segmenter:
            found[roi], _ = segmenter.segment(volume)
    none, body = found["none"], found["body"]
    assert none.labels[~inside].any(), "the network marks air"
    assert np.array_equal(body.labels, np.where(inside, none.labels, 0))
    if seg == "fractional":
        assert np.array_equal(body.fractions, np.where(inside, none.fractions, 0))
    assert "part" not in none.window
    assert body.window["part"] == "body"
    assert 0 < body.window["windows"] < 0.9 * body.window["windows_of_all"]
    assert body.warnings == none.warnings


def test_a_tilted_body_is_that_of_all_windows_too(body_windows, settings):
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    affine = volume.geometry.affine_mm.copy()
    affine[:3, 0] += 0.3 * affine[:3, 1]
    volume = replace(volume, geometry=replace(volume.geometry, affine_mm=affine))
    body = find_body(torch.from_numpy(volume.array), volume.geometry.spacing_mm)
    inside = mask_of_body(body, torch.device("cpu")).mask_of_slices(slice(0, 24)).numpy()
    with Segmenter(body_windows, settings) as segmenter:
        expected, _ = segmenter.segment(volume)
    with Segmenter(body_windows, replace(settings, roi="body")) as segmenter:
        found, _ = segmenter.segment(volume)
    assert np.array_equal(found.labels, np.where(inside, expected.labels, 0))
    assert found.window["windows"] < found.window["windows_of_all"]


def in_a_circle(volume, radius=0.35):
    """The volume with -1024 HU outside a circle of each slice, as a scanner writes it where it has measured nothing."""
    _, height, width = volume.array.shape
    h, w = np.ogrid[:height, :width]
    circle = np.hypot((h + 0.5) / height - 0.5, (w + 0.5) / width - 0.5) <= radius
    return replace(volume, array=np.where(circle, volume.array, -1024).astype(np.int16)), circle


@pytest.mark.parametrize("seg", ["binary", "fractional"])
def test_padding_that_fills_windows_is_background_and_every_other_voxel_is_as_monai_has_it(body_windows, settings, seg):
    volume, circle = in_a_circle(phantom_drawn_once(5, (24, 96, 96)).volume)
    found = {}
    for chosen in ("compute", "background"):
        with Segmenter(body_windows, replace(settings, constant_windows=chosen, seg=seg)) as segmenter:
            found[chosen], _ = segmenter.segment(volume)
    computed, ours = found["compute"], found["background"]
    assert computed.window["constant_windows"] == "compute"
    assert "windows_constant" not in computed.window
    assert ours.window["windows_constant"] > 0
    assert "constant_windows" not in ours.window
    cleared = computed.labels != ours.labels
    assert cleared.any()
    assert not ours.labels[cleared].any()
    assert not (cleared & circle).any(), "where there is an image, nothing changes"
    corner = (slice(None), slice(0, 5), slice(0, 5))
    assert computed.labels[corner].any()
    assert not ours.labels[corner].any()
    if seg == "fractional":
        assert not ours.fractions[(slice(None), *corner)].any()
        differs = ours.fractions != computed.fractions
        assert not ours.fractions[differs].any()
        assert not differs[:, np.broadcast_to(circle, ours.labels.shape)].any()


def air_and_tissue(windows):
    """Marks what is darker than -999 HU, and what is as dense as soft tissue."""
    marked = (windows <= 0) | (windows > 0.7)
    return torch.cat([windows.new_zeros(windows.shape), torch.where(marked, 9.0, -9.0)], dim=1)


@pytest.mark.parametrize("roi", ["none", "body"])
def test_a_model_that_marks_air_is_caught_in_every_output(model, settings, tmp_path, monkeypatch, roi):
    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(air_and_tissue))
    padded, _ = in_a_circle(phantom_drawn_once(5, (24, 96, 96)).volume)
    write_ct_series(padded, tmp_path / "in", seed=5)
    (case,) = run_folder(tmp_path / "in", tmp_path / "out", model, replace(settings, roi=roi)).cases
    document = json.loads((case.folder / "result.json").read_text())
    jsonschema.validate(document, json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text()))
    (segment,) = document["segments"]
    warned = [warning for warning in document["warnings"] if "implausible" in warning]
    plausible = [finding for finding in segment["findings"] if not finding["implausible"]]
    assert plausible, "soft tissue"
    assert all(-700 <= finding["mean_hu"] <= 300 and finding["outside_body"] <= 0.5 for finding in plausible)
    if roi == "body":
        assert segment["implausible"]["outside_body"] == 0
        return
    largest = max(segment["findings"], key=lambda finding: finding["volume_ml"])
    assert largest["implausible"] == ["outside-body", "hu-range"], "the air around the chest"
    assert segment["implausible"]["volume_ml"] >= largest["volume_ml"]
    assert segment["findings"].index(largest) == len(plausible)
    assert len(warned) == 1
    assert "mostly outside the body" in warned[0]
    assert warned[0] in (case.folder / "report.html").read_text().replace("&#x27;", "'")
    assert "Implausible: " in (case.folder / "measurements.dcm").read_bytes().decode("latin-1")


def test_windows_of_padding_are_computed_once_on_each_device(body_windows, settings, monkeypatch):
    volume, _ = in_a_circle(phantom_drawn_once(5, (24, 96, 96)).volume)
    windows = []

    def counted(some):
        windows.append(len(some))
        return everywhere(some)

    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(counted))
    found = []
    for devices in (("cpu",), ("cpu", "cpu")):
        monkeypatch.setattr("ctflow.pipeline.opened.devices_from_setting", lambda _, devices=devices: devices)
        windows.clear()
        with Segmenter(body_windows, settings) as segmenter:
            found.append(segmenter.segment(volume)[0])
        assert sum(windows) <= 900 - found[-1].window["windows_constant"] + len(devices)
    assert np.array_equal(found[0].labels, found[1].labels)
    assert found[0].window == found[1].window


def test_a_choice_about_constant_windows_changes_the_uids(body_windows, series, settings, tmp_path):
    (ours,) = run_folder(series, tmp_path / "ours", body_windows, settings).cases
    chosen = replace(settings, constant_windows="compute")
    (computed,) = run_folder(series, tmp_path / "computed", body_windows, chosen).cases
    assert uid_of(ours) != uid_of(computed)
    schema = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())
    jsonschema.validate(json.loads((computed.folder / "result.json").read_text()), schema)
    parameters = pydicom.dcmread(computed.folder / "segmentation.dcm").SegmentSequence[0]
    (identification,) = parameters.SegmentationAlgorithmIdentificationSequence
    assert "constant_windows=compute" in identification.AlgorithmParameters


def test_a_slab_thinner_than_half_a_window_is_warned_about(model, settings, monkeypatch):
    monkeypatch.setattr("ctflow.pipeline.opened.open_engine", lambda *_, **__: FakeEngine(everywhere))
    volume = phantom_drawn_once(5, (20, 96, 96)).volume
    deep = volume.geometry.spacing_mm[0] * 20
    thin = replace(model, spec=replace(model.spec, roi=(8, 8, 64)))
    with Segmenter(thin, settings) as segmenter:
        (warning,) = segmenter.segment(volume)[0].warnings
    assert "less than half of the model's window" in warning
    said_mm, window_mm = (int(number) for number in re.findall(r"(\d+) of (\d+) mm along the slices", warning)[0])
    spacing_mm = window_mm / 64
    assert said_mm == pytest.approx(deep, abs=spacing_mm)
    assert "rows" not in warning
    with Segmenter(replace(thin, spec=replace(thin.spec, roi=(8, 8, 8))), settings) as segmenter:
        assert segmenter.segment(volume)[0].warnings == ()


def test_the_result_says_that_only_the_body_was_looked_at(body_windows, series, settings, tmp_path, monkeypatch):
    steps = []
    chosen = replace(settings, roi="body")
    (one,) = run_folder(series, tmp_path / "one", body_windows, chosen, lambda *step: steps.append(step)).cases
    document = json.loads((one.folder / "result.json").read_text())
    schema = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document["settings"]["roi"] == document["window"]["part"] == "body"
    assert ("segment", document["window"]["windows"], document["window"]["windows"]) in steps
    assert f"the body only ({document['window']['windows']} of" in (one.folder / "report.html").read_text()
    (none,) = run_folder(series, tmp_path / "none", body_windows, settings).cases
    assert "part" not in none.document["window"]
    assert uid_of(none) != uid_of(one)
    monkeypatch.setattr("ctflow.pipeline.opened.devices_from_setting", lambda _: ("cpu", "cpu"))
    (both,) = run_folder(series, tmp_path / "both", body_windows, chosen).cases
    assert both.document["window"] == one.document["window"]
    assert both.document["segments"] == one.document["segments"]


def uid_of(case) -> str:
    return pydicom.dcmread(case.folder / "segmentation.dcm", stop_before_pixels=True).SOPInstanceUID


def test_a_volume_without_a_body_gets_all_windows_and_a_warning(body_windows, settings, caplog):
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    noise = np.random.default_rng(0).integers(-1010, -990, volume.array.shape)
    air = replace(volume, array=noise.astype(np.int16))
    with Segmenter(body_windows, settings) as segmenter:
        expected, _ = segmenter.segment(air)
    with Segmenter(body_windows, replace(settings, roi="body")) as segmenter:
        found, _ = segmenter.segment(air)
    assert np.array_equal(found.labels, expected.labels)
    assert found.labels.any()
    assert found.window == expected.window
    assert found.warnings == ("no body was found in the volume (--roi body): all windows were computed",)
    assert found.warnings[0] in caplog.messages


def test_a_body_that_a_cropped_tilted_grid_passes_by_is_no_body(body_windows, settings):
    """A bone window crops the input to a metal bar, which in the slices with tissue lies elsewhere."""
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    affine = volume.geometry.affine_mm.copy()
    affine[:3, 0] += 0.6 * affine[:3, 1]
    array = np.full_like(volume.array, -1000)
    array[:, 44:47, 40:60] = 3000
    array[:6, 8:32, 30:70] = 40
    volume = replace(volume, array=array, geometry=replace(volume.geometry, affine_mm=affine))
    orient, _, scale = body_windows.spec.preprocessing
    steps = (orient, replace(scale, a_min=200.0, a_max=2000.0), CropForeground(margin=0))
    cropped = replace(body_windows, spec=replace(body_windows.spec, preprocessing=steps))
    with Segmenter(cropped, replace(settings, roi="body")) as segmenter:
        found, _ = segmenter.segment(volume)
    assert "part" not in found.window
    assert found.warnings == ("no body was found in the volume (--roi body): all windows were computed",)
