from __future__ import annotations

import numpy as np
import pytest
import torch

from ctflow.window.constant import ConstantWindows, alike_windows, seen_from_boxes

CPU = torch.device("cpu")


def box(*ends):
    return tuple(slice(low, high) for low, high in ends)


def test_windows_are_grouped_by_the_one_value_that_they_hold():
    volume = torch.zeros(2, 2, 2, 8)
    volume[0, :, :, 4:] = 3  # only in one of the channels
    volume[1, 0, 1, 7] = 1
    places = [box((0, 2), (0, 2), (w, w + 2)) for w in (0, 2, 4, 6, 3)]
    groups = alike_windows(volume, places)
    assert groups == [[places[0], places[1]], [places[2]], [places[3]], [places[4]]]


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_what_lies_in_windows_of_one_hu_value_alone_is_not_seen(dtype):
    array = np.full((4, 6, 40), -1024, dtype)
    array[1, 2, 3] = -1000
    windows = ConstantWindows(array)
    for start in (0, 8, 16, 24):
        windows.look_at(box((0, 4), (0, 6), (start, start + 12)))
    assert windows.count == 3
    mask = windows.seen(CPU).mask_of_slices(slice(1, 3)).numpy()
    assert mask.shape == (2, 6, 40)
    assert mask[..., :12].all()
    assert not mask[..., 12:].any()


def test_where_no_window_is_constant_every_voxel_is_seen():
    windows = ConstantWindows(np.random.default_rng(0).integers(-1010, -990, (4, 6, 8)).astype(np.int16))
    windows.look_at(box((0, 4), (0, 6), (0, 8)))
    assert windows.count == 0
    assert windows.seen(CPU) is None


def test_a_voxel_beside_the_window_counts_because_it_may_have_been_interpolated_with_it():
    array = np.full((4, 4, 20), -1024, np.int16)
    array[0, 0, 10] = 40
    windows = ConstantWindows(array)
    windows.look_at(box((0, 4), (0, 4), (0, 9)))
    windows.look_at(box((0, 4), (0, 4), (0, 10)))
    assert windows.count == 1


def test_a_window_that_no_voxel_takes_anything_from_is_constant_and_shows_nothing():
    windows = ConstantWindows(np.zeros((4, 4, 4), np.int16))
    windows.look_at(box((0, 0), (0, 4), (0, 4)))
    assert windows.count == 1
    assert not windows.seen(CPU).mask_of_slices(slice(0, 4)).any()


def test_a_single_voxel_between_those_of_a_first_look_is_found():
    array = np.full((40, 40, 40), -1024, np.int16)
    array[17, 5, 33] = -1023
    windows = ConstantWindows(array)
    windows.look_at(box((0, 40), (0, 40), (0, 40)))
    assert windows.count == 0


def test_the_union_of_boxes_is_that_of_their_voxels():
    random = np.random.default_rng(3)
    for _ in range(20):
        shape = tuple(random.integers(3, 12, 3).tolist())
        expected = np.zeros(shape, bool)
        boxes = []
        for _ in range(int(random.integers(0, 5))):
            ends = [sorted(random.choice(count + 1, 2, replace=False).tolist()) for count in shape]
            boxes.append(box(*ends))
            expected[boxes[-1]] = True
        assert np.array_equal(seen_from_boxes(boxes, shape, CPU).mask_of_slices(slice(0, shape[0])).numpy(), expected)
