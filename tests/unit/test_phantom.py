from __future__ import annotations

import numpy as np
import pytest

from ctflow.phantom import LARGEST_VOXELS, phantom_from_seed

SHAPE = (40, 96, 112)


@pytest.fixture(scope="module")
def phantom():
    return phantom_from_seed(3, SHAPE)


def test_the_same_seed_draws_the_same_phantom(phantom):
    again = phantom_from_seed(3, SHAPE)
    assert np.array_equal(phantom.volume.array, again.volume.array)
    assert np.array_equal(phantom.labels, again.labels)
    assert phantom.tumours == again.tumours


def test_another_seed_draws_another(phantom):
    other = phantom_from_seed(4, SHAPE)
    assert not np.array_equal(phantom.volume.array, other.volume.array)
    assert phantom.tumours != other.tumours


def test_it_is_an_axial_head_first_ct_in_hounsfield_units(phantom):
    volume = phantom.volume
    assert volume.array.dtype == np.int16
    assert volume.geometry.shape == SHAPE
    assert np.allclose(volume.geometry.directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert volume.array.min() >= -1024
    assert abs(float(np.median(volume.array[:, 0])) + 1000) < 15  # air in front of the chest
    assert (volume.array < -700).mean() > 0.3
    assert (volume.array > 300).mean() > 0.005  # bone


def test_truth_marks_soft_tissue_at_the_named_places(phantom):
    assert len(phantom.tumours) == 3
    assert np.median(phantom.volume.array[phantom.labels == 1]) == pytest.approx(40, abs=60)
    inverse = np.linalg.inv(phantom.volume.geometry.affine_mm)
    for tumour in phantom.tumours:
        d, h, w = np.rint(inverse[:3, :3] @ np.array(tumour.centre_mm) + inverse[:3, 3]).astype(int)
        assert phantom.labels[d, h, w] == 1


@pytest.mark.parametrize("shape", [(15, 64, 64), (16, 31, 64), (1, 1, 1), (LARGEST_VOXELS, 64, 64)])
def test_a_shape_out_of_range_is_refused(shape):
    with pytest.raises(ValueError, match="at least"):
        phantom_from_seed(0, shape)


def test_the_smallest_shape_is_drawn():
    assert phantom_from_seed(0, (16, 32, 32)).labels.shape == (16, 32, 32)
