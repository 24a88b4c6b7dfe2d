from __future__ import annotations

import shutil

import numpy as np
import pytest

from ctflow.dicom.assemble import geometry_of_series
from ctflow.dicom.geometry import stack_of_series
from ctflow.errors import BrokenSeries
from dicom_support import DEPTH, assembled, moved, selection_of, small_volume


def broken(folder) -> BrokenSeries:
    (candidate,) = selection_of(folder, force=True).chosen
    with pytest.raises(BrokenSeries) as caught:
        stack_of_series(candidate.series)
    assert candidate.series.digest in str(caught.value)
    assert f"[{caught.value.reason}]" in str(caught.value)
    return caught.value


def test_geometry_needs_no_pixels_and_has_the_slices_in_order(write, volume):
    (candidate,) = selection_of(write()).chosen
    geometry, instances = geometry_of_series(candidate.series)
    assert geometry.shape == volume.geometry.shape
    assert np.allclose(geometry.affine_mm, volume.geometry.affine_mm, atol=1e-5)
    assert [int(i.header.InstanceNumber) for i in instances] == list(range(1, DEPTH + 1))


def test_a_missing_middle_slice_is_a_gap(write):
    folder = write()
    (folder / "00007.dcm").unlink()
    (folder / "00011.dcm").unlink()
    (folder / "00012.dcm").unlink()
    error = broken(folder)
    assert error.reason == "gap"
    assert "3 slices are missing" in str(error)


def test_a_missing_first_or_last_slice_cannot_be_known_unless_a_tag_counts(write):
    folder = write()
    (folder / "00015.dcm").unlink()
    assert assembled(folder).warnings == ()
    counted = write(adjust=lambda dataset, _: dataset.__setattr__("ImagesInAcquisition", "16"))
    assert assembled(counted).warnings == ()
    (counted / "00000.dcm").unlink()
    assert assembled(counted).warnings == ("ImagesInAcquisition says 16, the series holds 15 slices",)


def test_two_acquisitions_at_the_same_places_are_doubled(write):
    error = broken(
        write(small_volume(shape=(32, 8, 8)), moved(lambda index: -(index // 2) * 2.5 - (index % 2) * 2.5, 1))
    )
    assert error.reason == "doubled"


def test_near_doubles_are_irregular(write):
    assert broken(write(adjust=moved(lambda index: index == 5, -2.2))).reason == "irregular"


def test_a_change_of_distance_is_irregular(write):
    assert broken(write(adjust=moved(lambda index: max(index - 8, 0), 1.0))).reason == "irregular"


@pytest.mark.parametrize(("offset", "regular"), [(0.02, True), (0.03, False)])
def test_regular_means_within_one_percent(write, offset, regular):
    folder = write(adjust=moved(lambda index: index == 8, offset))  # 2.5 mm apart
    if regular:
        assert assembled(folder).volume.array.shape[0] == DEPTH
    else:
        assert broken(folder).reason == "irregular"


def test_thin_slices_are_allowed_a_hundredth_of_a_millimetre(write):
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1.0]])
    folder = write(small_volume(affine), moved(lambda index: index == 8, 0.009))
    assert assembled(folder).volume.geometry.spacing_mm[0] == pytest.approx(0.5)


def test_gantry_tilt_is_refused_by_name(write):
    def tilt(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + 0.5 * index, z]

    error = broken(write(adjust=tilt))
    assert error.reason == "tilted"
    assert "11.3 degrees" in str(error)


def test_a_slice_beside_the_others_is_irregular(write):
    def shift(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [float(x) + (index == 7), y, z]

    assert broken(write(adjust=shift)).reason == "irregular"


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("ImageOrientationPatient", ["0", "1", "0", "1", "0", "0"], "mixed-orientation"),
        ("FrameOfReferenceUID", "1.2.3", "mixed-orientation"),
        ("Rows", 24, "mixed-size"),
        ("PixelSpacing", ["0.6", "0.91"], "mixed-size"),
        ("PixelSpacing", ["0.6"], "no-geometry"),
        ("ImagePositionPatient", ["0", "0"], "no-geometry"),
        ("ImagePositionPatient", None, "no-geometry"),
        ("ImageOrientationPatient", ["1", "0", "0", "0", "1", "x"], "no-geometry"),
    ],
)
def test_one_deviating_slice_is_refused(write, keyword, value, reason):
    def adjust(dataset, index):
        if index == 4:
            del dataset[keyword]
            if value is not None:
                # As text, which pydicom does not check, so that a number may be none.
                dataset.add_new(keyword, "US" if keyword == "Rows" else "LO", value)

    assert broken(write(adjust=adjust)).reason == reason


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PixelSpacing", ["0", "1"]),
        ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"]),
        ("ImageOrientationPatient", ["2", "0", "0", "0", "1", "0"]),
        ("Rows", 0),
        ("Columns", None),
    ],
)
def test_a_geometry_that_is_none_is_refused(write, keyword, value):
    assert broken(write(adjust=lambda dataset, _: setattr(dataset, keyword, value))).reason == "no-geometry"


def test_a_single_slice_has_no_depth(write):
    folder = write()
    for index in range(1, DEPTH):
        (folder / f"{index:05d}.dcm").unlink()
    assert broken(folder).reason == "no-geometry"


def test_the_same_file_twice_is_one_slice_and_a_warning(write):
    folder = write()
    shutil.copy(folder / "00003.dcm", folder / "again.dcm")
    result = assembled(folder)
    assert result.volume.array.shape[0] == DEPTH
    assert result.warnings == ("1 files repeat another one and were left out",)


def test_two_slices_with_one_uid_are_doubled(write):
    def adjust(dataset, index):
        if index == 3:
            dataset.SOPInstanceUID = adjust.first
        adjust.first = dataset.SOPInstanceUID if index == 0 else adjust.first

    error = broken(write(adjust=adjust))
    assert error.reason == "doubled"
    assert "00000.dcm and 00003.dcm" in str(error)


def test_the_tilted_head_ct_is_refused(data):
    assert broken(data / "tilted").reason == "tilted"
