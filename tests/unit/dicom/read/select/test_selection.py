from __future__ import annotations

import shutil

import numpy as np
import pydicom
import pytest

from ctflow.core.errors import NoUsableSeries
from ctflow.core.volume import Geometry, Volume, digest_of_uid
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series
from dicom_support import DEPTH, selection_of, setter, small_volume
from reasons import raises_reason


def verdict(folder, **options):
    (candidate,) = selection_of(folder, **options).candidates
    return candidate


def test_an_eligible_series_is_selected(write):
    candidate = verdict(write())
    assert (candidate.selected, candidate.reason, candidate.forced) == (True, "selected", False)
    assert candidate.series.digest == digest_of_uid(candidate.series.uid)
    assert candidate.description["slices"] == DEPTH
    assert candidate.description["slice_spacing_mm"] == 2.5


def test_the_slice_spacing_is_that_of_the_positions_as_they_are(write):
    def adjust(dataset, index):
        x, y, _ = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, 0.4375 + 1.875 * index]

    assert verdict(write(adjust=adjust)).description["slice_spacing_mm"] == 1.875


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"SeriesInstanceUID": ""}, "no-uid"),
        ({"StudyInstanceUID": None}, "no-uid"),
        ({"SOPInstanceUID": ""}, "no-uid"),
        ({"Modality": "MR"}, "modality"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "modality"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "enhanced"),
        ({"SOPClassUID": "1.3.6.1.4.1.9999.1"}, "modality"),
        ({"NumberOfFrames": "2"}, "multi-frame"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"SamplesPerPixel": None}, "no-pixels"),
        ({"PixelData": None}, "no-pixels"),
        ({"FrameOfReferenceUID": None}, "no-frame-of-reference"),
        ({"FrameOfReferenceUID": ""}, "no-frame-of-reference"),
    ],
)
def test_what_cannot_be_run_is_refused_even_by_force(write, attributes, reason):
    folder = write(adjust=setter(**attributes))
    for force in (False, True):
        candidate = verdict(folder, force=force)
        assert (candidate.selected, candidate.reason) == (False, reason)


def test_one_slice_without_a_frame_of_reference_is_enough(write):
    folder = write(adjust=lambda dataset, index: index or setattr(dataset, "FrameOfReferenceUID", ""))
    scan = scan_folder(folder)
    selection = select_series(scan, force=True)
    with raises_reason(NoUsableSeries, "none-eligible", names="FrameOfReferenceUID"):
        require_selected(selection, scan)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "derived"),
        ({"ImageType": ["DERIVED", "PRIMARY", "PROJECTION IMAGE"]}, "derived"),
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}, "derived"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"BodyPartExamined": "HEAD"}, "body-part"),
    ],
)
def test_an_ineligible_series_runs_only_by_force(write, attributes, reason):
    folder = write(adjust=setter(**attributes))
    refused = verdict(folder, body_parts=["CHEST", "LUNG"])
    assert (refused.selected, refused.reason) == (False, reason)
    assert "--force" in refused.message
    forced = verdict(folder, body_parts=["CHEST", "LUNG"], force=True)
    assert (forced.selected, forced.reason, forced.forced) == (True, reason, True)


@pytest.mark.parametrize(
    "attributes",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "MIPMAP"]},
        {"ImageType": None},
        {"BodyPartExamined": None},
        {"BodyPartExamined": " chest "},
    ],
)
def test_an_eligible_variant_is_selected(write, attributes):
    assert verdict(write(adjust=setter(**attributes)), body_parts=["CHEST"]).selected


@pytest.mark.parametrize("value", ["CHEST_TO_PELVIS", "CHESTABDPELVIS", "LUNG", "Thorax", "CH_AB_PEL"])
def test_what_scanners_call_a_chest_suits_a_model_of_the_chest(write, value):
    assert verdict(write(adjust=setter(BodyPartExamined=value)), body_parts=["CHEST"]).selected


@pytest.mark.parametrize(
    ("value", "shown"),
    [("ABDOMEN_PELVIS", "(ABDOMEN_PELVIS)"), ("Head", "(HEAD)"), ("MILLER HANS", "(an unknown term)")],
)
def test_a_refused_body_part_is_shown_beside_the_list_if_it_is_a_known_term(write, value, shown):
    refused = verdict(write(adjust=setter(BodyPartExamined=value)), body_parts=["CHEST", "LUNG"])
    assert refused.reason == "body-part"
    assert f"its BodyPartExamined {shown} matches none of the bundle's (CHEST, LUNG)" in refused.message
    assert "MILLER" not in f"{refused.message} {refused.description}"


@pytest.mark.parametrize("count", [1, 2])
def test_force_takes_no_localizers_that_are_pictures_by_themselves(write, count):
    folder = write(small_volume(shape=(2, 8, 8)), setter(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    for path in sorted(folder.iterdir())[count:]:
        path.unlink()
    found = verdict(folder, force=True)
    assert (found.selected, found.reason) == (False, "localizer")
    assert "--force" not in found.message


def test_localizers_of_two_directions_are_no_volume(write):
    def adjust(dataset, index):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        if index == 3:
            dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]

    assert not verdict(write(adjust=adjust), force=True).selected


def test_force_takes_no_single_slice(write):
    folder = write(small_volume(shape=(2, 8, 8)))
    (folder / "00001.dcm").unlink()
    found = verdict(folder, force=True)
    assert (found.selected, found.reason, found.message) == (False, "too-few-slices", "one slice forms no volume")


def test_orphaned_slices_are_known_by_their_place_also_where_positions_are_rounded(write):
    affine = np.array([[0, 0, 0.7, 0], [0, 0.7, 0, 0], [0.625, 0, 0, -300.0], [0, 0, 0, 1.0]])

    def adjust(dataset, index):
        x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y, round(z, 1)]
        if index == 19:
            dataset.SeriesInstanceUID = "1.2.3"

    reasons = {one.reason for one in selection_of(write(small_volume(affine, shape=(20, 8, 8)), adjust)).candidates}
    assert reasons == {"selected", "orphaned"}


def test_slices_of_another_patient_are_named(write):
    found = verdict(write(adjust=lambda dataset, index: index != 4 or setattr(dataset, "PatientID", "B")))
    assert found.reason == "mixed-patients"
    assert "00004.dcm" in found.message


def test_too_few_slices(write):
    folder = write(small_volume(shape=(15, 8, 8)))
    assert verdict(folder).reason == "too-few-slices"
    assert verdict(folder, force=True).selected


@pytest.mark.parametrize(("spacing", "selected"), [(5.0, True), (5.004, True), (5.1, False)])
def test_thick_slices_are_set_aside(write, spacing, selected):
    affine = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]
    affine[2, 0] = spacing
    assert verdict(write(small_volume(affine))).selected is selected


def test_localizers_inside_a_series_are_left_out(write):
    def adjust(dataset, index):
        if index < 2:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    candidate = verdict(write(small_volume(shape=(18, 8, 8)), adjust))
    assert candidate.selected
    assert len(candidate.series.instances) == 16
    assert candidate.series.dropped == ("2 localizer images of the series omitted",)


def test_two_patients_in_one_series_are_refused_without_naming_them(write):
    folder = write(adjust=lambda dataset, index: setattr(dataset, "PatientID", f"SECRET{index % 2}"))
    candidate = verdict(folder, force=True)
    assert (candidate.selected, candidate.reason) == (False, "mixed-patients")
    assert "SECRET" not in candidate.message


def test_one_series_can_be_asked_for(write, tmp_path):
    for seed in range(3):
        write(small_volume(seed=seed), seed=seed)
    uids = [candidate.series.uid for candidate in selection_of(tmp_path).candidates]
    selection = selection_of(tmp_path, series_uid=uids[1])
    assert [candidate.reason for candidate in selection.candidates] == ["not-asked-for", "selected", "not-asked-for"]
    assert not selection_of(tmp_path, series_uid="1.2.3").selected


def test_series_of_several_patients_are_all_selected(write, tmp_path):
    write(adjust=setter(PatientID="A"), seed=1)
    write(adjust=setter(PatientID="B"), seed=2)
    assert len(selection_of(tmp_path).selected) == 2


def reconstruction(spacing, slices, seed):
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [spacing, 0, 0, 0], [0, 0, 0, 1.0]])
    return Volume(np.full((slices, 8, 8), seed, np.int16), Geometry((slices, 8, 8), affine))


def test_the_best_of_a_study_is_the_thinnest_from_one_mm_up(write, tmp_path):
    for seed, (spacing, slices) in enumerate([(2.5, 20), (1.0, 40), (0.5, 70), (1.0, 41)]):
        write(
            reconstruction(spacing, slices, seed),
            setter(StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4"),
            seed=seed,
        )
    (best,) = selection_of(tmp_path, pick="best").selected
    assert len(best.series.instances) == 70  # 0.5 mm ranks as 1 mm, and has the most slices
    assert {c.reason for c in selection_of(tmp_path, pick="best").candidates} == {"selected", "not-best"}
    assert len(selection_of(tmp_path, pick="all").selected) == 4


def test_the_rounding_of_positions_does_not_outweigh_the_number_of_slices(write, tmp_path):
    for seed, (spacing, slices) in enumerate([(1.1, 40), (1.0999, 20)]):
        write(
            reconstruction(spacing, slices, seed),
            setter(StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4"),
            seed=seed,
        )
    (best,) = selection_of(tmp_path, pick="best").selected
    assert len(best.series.instances) == 40


def test_studies_keep_their_own_best(write, tmp_path):
    write(seed=1)
    write(seed=2)
    assert len(selection_of(tmp_path, pick="best").selected) == 2


def test_nothing_selected_lists_every_reason(write, tmp_path):
    folder = write(adjust=setter(Modality="MR"))
    (folder / "bad.dcm").write_bytes(b"")
    scan = scan_folder(tmp_path)
    with pytest.raises(
        NoUsableSeries,
        match=r"series [0-9a-f]{12}: CT images whose Modality is MR.*file [0-9a-f]{12}/[0-9a-f]{12}\.dcm: empty",
    ):
        require_selected(select_series(scan), scan)


def test_a_long_list_of_reasons_is_cut(tmp_path, write):
    source = write(adjust=setter(Modality="MR"))
    dataset = pydicom.dcmread(next(source.iterdir()))
    for number in range(25):
        dataset.SeriesInstanceUID = f"1.2.{number}"
        dataset.save_as(tmp_path / f"{number}.dcm")
    scan = scan_folder(tmp_path)
    with raises_reason(NoUsableSeries, "none-eligible", names="6 more"):
        require_selected(select_series(scan), scan)


def test_an_empty_folder_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    scan = scan_folder(tmp_path)
    with raises_reason(NoUsableSeries, "no-dicom", names="1 file"):
        require_selected(select_series(scan), scan)


def test_something_selected_raises_nothing(write):
    scan = scan_folder(write())
    require_selected(select_series(scan), scan)


@pytest.mark.parametrize(
    "attributes",
    [
        {"ImagePositionPatient": None, "SliceThickness": "1"},
        {"ImageOrientationPatient": ["1", "0"]},
        {"SeriesNumber": None, "PixelSpacing": None},
        {"BodyPartExamined": "Mr. Smith's chest"},
    ],
)
def test_odd_values_never_raise_and_never_show_free_text(write, attributes):
    folder = write(adjust=setter(**attributes))
    candidate = verdict(folder, pick="best")
    assert "Smith" not in str(candidate.description) + candidate.message


def test_wrong_value_representations_never_raise(write):
    def adjust(dataset, _index):
        dataset.add_new("SeriesNumber", "LO", "abc")
        dataset.add_new("PixelSpacing", "OB", b"\xff\xfe")

    candidate = verdict(write(adjust=adjust))
    assert candidate.description["series_number"] is None


def test_copies_of_a_series_elsewhere_belong_to_it(write, tmp_path):
    folder = write()
    shutil.copytree(folder, tmp_path / "copy")
    (candidate,) = selection_of(tmp_path).candidates
    assert len(candidate.series.instances) == 2 * DEPTH
