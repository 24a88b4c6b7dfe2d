from __future__ import annotations

import shutil

import numpy as np
import pytest

from ctflow.core.errors import BrokenSeries
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.geometry.stack import stack_of_series
from dicom_support import DEPTH, assembled, moved, selection_of, small_volume
from reasons import raises_reason


def broken(folder) -> BrokenSeries:
    (candidate,) = selection_of(folder, force=True).selected
    with pytest.raises(BrokenSeries) as caught:
        stack_of_series(candidate.series)
    assert candidate.series.digest in str(caught.value)
    return caught.value


def test_geometry_needs_no_pixels_and_has_the_slices_in_order(write, volume):
    (candidate,) = selection_of(write()).selected
    stack = stack_of_series(candidate.series)
    geometry, instances = stack.geometry, stack.instances
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
    assert "3 slices are missing in the middle (behind 00006.dcm, 00010.dcm)" in str(error)


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


def test_pieces_of_other_distances_are_resampled_by_position(write):
    """8 gaps of 2.5 mm, 7 of 3.5 mm: every 2.5 mm, the last slice where it was."""
    folder = write(adjust=moved(lambda index: max(index - 8, 0), 1.0))
    result = assembled(folder)
    assert "8 of 2.500 mm, 7 of 3.500 mm" in result.warnings[0]
    geometry = result.volume.geometry
    assert geometry.shape[0] == 19
    assert geometry.world_from_index([18, 0, 0])[2] == pytest.approx(-300 + 8 * 2.5 + 7 * 3.5)
    assert result.volume.array.dtype == np.float32
    assert (result.slices[0], result.slices[8], result.slices[15]) == (0, 8, 18)


def without_one_slice(write, count=1):
    folder = write(small_volume(shape=(DEPTH + 2, 12, 10)))
    for index in range(7, 7 + count):
        (folder / f"{index:05d}.dcm").unlink()
    (candidate,) = selection_of(folder).selected
    return candidate.series


def test_a_missing_slice_is_interpolated_only_if_allowed(write):
    series = without_one_slice(write)
    with raises_reason(BrokenSeries, "gap", names=("00006.dcm", "--allow-gaps")):
        assemble_series(series)
    result = assemble_series(series, allow_gaps=True)
    volume = small_volume(shape=(DEPTH + 2, 12, 10))
    assert result.warnings == ("1 missing slice interpolated between neighbours (--allow-gaps)",)
    present = [d for d in range(DEPTH + 2) if d != 7]
    assert np.array_equal(result.volume.array[present], volume.array[present])
    assert np.array_equal(result.volume.array[7], (volume.array[6] / 2 + volume.array[8] / 2).astype(np.float32))
    assert np.allclose(result.volume.geometry.affine_mm, volume.geometry.affine_mm, atol=1e-5)
    labels = np.arange(DEPTH + 2, dtype=np.uint8)[:, None, None]
    assert result.on_instances(labels)[:, 0, 0].tolist() == present


def test_two_missing_slices_in_a_row_are_never_interpolated(write):
    with raises_reason(BrokenSeries, "gap") as caught:
        assemble_series(without_one_slice(write, 2), allow_gaps=True)
    assert caught.value.reason == "gap"
    assert "--allow-gaps" not in str(caught.value)


@pytest.mark.parametrize(("offset", "outcome"), [(0.02, None), (0.25, "% of a voxel"), (0.3, "irregular")])
def test_regular_means_within_a_tenth_of_the_spacing(write, offset, outcome):
    folder = write(adjust=moved(lambda index: index == 8, offset))  # 2.5 mm apart
    if outcome == "irregular":
        assert broken(folder).reason == "irregular"
        return
    result = assembled(folder)
    assert result.volume.array.shape[0] == DEPTH
    assert len(result.warnings) == (outcome is not None)
    assert outcome is None or outcome in result.warnings[0]


def rounding(places: int):
    def adjust(dataset, _index):
        dataset.ImagePositionPatient = [round(float(mm), places) for mm in dataset.ImagePositionPatient]

    return adjust


@pytest.mark.parametrize("spacing", [0.625, 1.25])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_one_volume(write, spacing):
    affine = np.array([[0, 0, 0.7, 1.0], [0, 0.7, 0, 2.0], [spacing, 0, 0, -300.0], [0, 0, 0, 1.0]])
    result = assembled(write(small_volume(affine, shape=(60, 12, 10)), rounding(1)))
    assert np.abs(result.volume.geometry.world_from_index([[0, 0, 0], [59, 0, 0]]) - [
        [1, 2, -300], [1, 2, -300 + 59 * spacing]]).max() < 0.02  # fmt: skip
    assert "ImagePositionPatient puts slices by up to 0.0" in result.warnings[0]
    assert "at most a tenth is ignored" in result.warnings[0]


def test_a_gap_between_rounded_positions_is_a_gap(write):
    affine = np.array([[0, 0, 0.7, 1.0], [0, 0.7, 0, 2.0], [0.625, 0, 0, -300.0], [0, 0, 0, 1.0]])
    folder = write(small_volume(affine, shape=(30, 12, 10)), rounding(1))
    (folder / "00007.dcm").unlink()
    assert broken(folder).reason == "gap"


def test_a_jitter_beside_the_line_is_no_tilt(write):
    """0.04 mm sideways over 16 slices of 0.625 mm would be 0.2 degrees."""
    affine = np.array([[0, 0, 0.7, 1.0], [0, 0.7, 0, 2.0], [0.625, 0, 0, -300.0], [0, 0, 0, 1.0]])

    def adjust(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [float(x) + 0.04 * (index > 7), y, z]

    result = assembled(write(small_volume(affine), adjust))
    assert result.volume.geometry.tilt_degrees < 1e-6
    assert "(3% of a voxel)" in " ".join(result.warnings)


@pytest.mark.parametrize(
    ("keyword", "change", "share"),
    [
        ("ImageOrientationPatient", [0, 4e-4, 0, -4e-4, 0, 0], "of a voxel"),
        ("PixelSpacing", [0.001, 0.001], "of a voxel"),
        ("ImageOrientationPatient", [0, 0, 9e-4, 0, 0, 0], "mixed-orientation"),
        ("ImageOrientationPatient", [0, 2e-3, 0, 0, 0, 0], "mixed-orientation"),
        ("PixelSpacing", [0.004, 0], "mixed-size"),
    ],
)
def test_rounded_directions_and_pixels_are_taken_up_to_a_tenth_of_a_voxel(write, keyword, change, share):
    """A slice of 64 x 64 pixels of 0.7 mm; 0.0009 of its 44 mm would be 0.04 mm, and 0.06 of slices 0.625 mm apart."""
    spacing = 0.3 if share == "mixed-orientation" else 0.625
    affine = np.array([[0, 0, 0.7, 1.0], [0, 0.7, 0, 2.0], [spacing, 0, 0, -300.0], [0, 0, 0, 1.0]])

    def adjust(dataset, index):
        if index == 4:
            setattr(
                dataset, keyword, [float(value) + by for value, by in zip(dataset[keyword].value, change, strict=True)]
            )

    folder = write(small_volume(affine, shape=(DEPTH, 64, 64)), adjust)
    if share != "of a voxel":
        error = broken(folder)
        assert error.reason == share
        assert f"{keyword}" in str(error)
        assert "00004.dcm" in str(error)
        return
    result = assembled(folder)
    assert f"{keyword} puts slices by up to 0.0" in result.warnings[0]
    corners = [[4, h, w] for h in (0, 63) for w in (0, 63)]
    own = result.instances[4].header
    row, column = np.array(own.ImageOrientationPatient[:3], float), np.array(own.ImageOrientationPatient[3:], float)
    between_rows, between_columns = map(float, own.PixelSpacing)
    for (_, h, w), found in zip(corners, result.volume.geometry.world_from_index(corners), strict=True):
        true = np.array(own.ImagePositionPatient, float) + row * between_columns * w + column * between_rows * h
        assert np.abs(found - true).max() < 0.07


def tilted(by):
    def tilt(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + by * index, z]

    return tilt


@pytest.mark.parametrize("sign", [1, -1])
def test_gantry_tilt_is_a_sheared_affine(write, volume, sign):
    result = assembled(write(adjust=tilted(sign * 0.5)))
    assert "tilt of 11.3 degrees was resampled to right angles for the model" in result.warnings[0]
    expected = volume.geometry.affine_mm.copy()
    expected[1, 0] = sign * 0.5
    assert np.allclose(result.volume.geometry.affine_mm, expected, atol=1e-5)
    assert np.array_equal(result.volume.array, volume.array)


def test_more_than_any_gantry_tilts_is_refused(write):
    assert broken(write(adjust=tilted(2.6))).reason == "tilted"


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
        ("PixelSpacing", ["0.6", "0.95"], "mixed-size"),
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

    error = broken(write(adjust=adjust))
    assert error.reason == reason
    assert "00004.dcm" in str(error)


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
    (candidate,) = selection_of(folder, force=True).candidates
    with raises_reason(BrokenSeries, "no-geometry"):
        stack_of_series(candidate.series)


def test_the_same_file_twice_is_one_slice_and_a_warning(write):
    folder = write()
    shutil.copy(folder / "00003.dcm", folder / "again.dcm")
    result = assembled(folder)
    assert result.volume.array.shape[0] == DEPTH
    assert result.warnings == ("1 duplicate file omitted",)


def test_two_slices_with_one_uid_are_doubled(write):
    def adjust(dataset, index):
        if index == 3:
            dataset.SOPInstanceUID = adjust.first
        adjust.first = dataset.SOPInstanceUID if index == 0 else adjust.first

    error = broken(write(adjust=adjust))
    assert error.reason == "doubled"
    assert "00000.dcm and 00003.dcm" in str(error)


def test_the_tilted_head_ct_is_resampled_by_position(data):
    result = assembled(data / "tilted")
    assert "13 of 4.002 mm, 1 of 1.081 mm, 13 of 6.999 mm" in result.warnings[0]
    assert "18.5 degrees" in result.warnings[1]
    assert len(result.instances) == len(result.slices) == 28
    for instance, d in zip(result.instances, result.slices, strict=True):
        place = result.volume.geometry.world_from_index([d, 0, 0])
        away = place - [float(mm) for mm in instance.header.ImagePositionPatient]
        assert np.linalg.norm(away) <= result.volume.geometry.spacing_mm[0] / 2 + 1e-3
