from __future__ import annotations

import numpy as np
import pytest

from ctflow.core.volume import Geometry, Volume, box_of_marked, digest_of_uid, marked_lines


def geometry(spacing=(2.5, 0.6, 0.9), shape=(4, 5, 6)) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]]) * np.array(spacing)
    affine[:3, 3] = [-10, -20, -30]
    return Geometry(shape, affine)


def test_an_index_becomes_a_point_in_the_patient():
    assert geometry().world_from_index([2, 1, 3]).tolist() == pytest.approx([-10 + 2.7, -20 + 0.6, -30 + 5.0])
    assert geometry().world_from_index(np.zeros((7, 2, 3))).shape == (7, 2, 3)


def test_spacing_follows_the_array_axes():
    assert geometry().spacing_mm == pytest.approx((2.5, 0.6, 0.9))
    assert geometry().voxel_ml == pytest.approx(2.5 * 0.6 * 0.9 / 1000)


def test_a_sheared_grid_is_not_orthogonal_and_keeps_its_volume():
    sheared = np.array(geometry().affine_mm)
    sheared[:3, 0] += [0, 0.5, 0]
    assert geometry().is_orthogonal
    assert not Geometry((4, 5, 6), sheared).is_orthogonal
    assert Geometry((4, 5, 6), sheared).voxel_ml == pytest.approx(geometry().voxel_ml)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.eye(3), np.full((4, 4), np.nan)])
def test_an_impossible_affine_is_refused(affine):
    with pytest.raises(ValueError, match="invertible"):
        Geometry((1, 1, 1), affine)


def test_a_geometry_cannot_be_changed_behind_its_back():
    affine = np.eye(4)
    fixed = Geometry((1, 1, 1), affine)
    affine[0, 0] = 5
    assert fixed.spacing_mm == (1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        fixed.affine_mm[0, 0] = 5


def test_a_volume_checks_shape_dtype_and_padding():
    shape = geometry().shape
    assert Volume(np.zeros(shape, np.int16), geometry()).padding is None
    with pytest.raises(ValueError, match="shape"):
        Volume(np.zeros((1, 2, 3), np.int16), geometry())
    with pytest.raises(ValueError, match="uint16"):
        Volume(np.zeros(shape, np.uint16), geometry())
    with pytest.raises(ValueError, match="padding"):
        Volume(np.zeros(shape, np.float32), geometry(), np.zeros((1, 1, 1), bool))


def test_a_digest_hides_the_uid_and_bears_any_text():
    assert len(digest_of_uid("1.2.3")) == 12
    assert digest_of_uid("1.2.3") != digest_of_uid("1.2.4")
    assert len(digest_of_uid("\udcff")) == 12


def test_the_box_of_what_is_marked():
    marks = np.zeros((3, 5, 6, 7), np.uint8)
    assert box_of_marked(marks) is None
    assert box_of_marked(marks[:0]) is None
    marks[1, 2, 3, 4] = marks[2, 2, 5, 1] = 9
    assert box_of_marked(marks) == np.s_[1:3, 2:3, 3:6, 1:5]
    assert box_of_marked(np.asfortranarray(marks)) == np.s_[1:3, 2:3, 3:6, 1:5]
    assert box_of_marked(np.zeros(8, np.uint8)) is None
    assert box_of_marked(np.uint8([0, 0, 3, 0, 1])) == (slice(2, 5),)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.dtype(">u2")])
@pytest.mark.parametrize("width", [1, 4, 7, 8, 24])
def test_marked_lines_and_boxes_are_those_of_a_plain_search(dtype, width):
    rng = np.random.default_rng(width)
    for _ in range(20):
        marks = (rng.random((5, 6, width)) < rng.choice([0.003, 0.05, 0.5])).astype(dtype)
        for view in (marks, np.asfortranarray(marks), marks[::-1, :, ::-1], marks[::2], marks.transpose(2, 0, 1)):
            np.testing.assert_array_equal(marked_lines(view), view.any(axis=-1))
            places = np.argwhere(view)
            expected = (
                tuple(slice(low, high + 1) for low, high in zip(places.min(0), places.max(0), strict=True))
                if len(places)
                else None
            )
            assert box_of_marked(view) == expected
