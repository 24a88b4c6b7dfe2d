from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ctflow.phantom import LARGEST_VOXELS, Phantom, phantom_from_seed
from ctflow.phantom.body.patient import patient_from_rng
from ctflow.phantom.body.tumours import MOST, PLACES, plans_from_rng
from ctflow.phantom.grid import Field, Grid
from ctflow.phantom.paint import coverage, paint_tubes, smooth_max, tubes_along

SHAPE = (120, 150, 160)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return phantom_from_seed(3, SHAPE, tumours=4)


@pytest.fixture(scope="module")
def healthy() -> Phantom:
    return phantom_from_seed(3, SHAPE, tumours=0)


def test_the_same_seed_draws_the_same_phantom():
    one, other = (phantom_from_seed(8, (32, 64, 72)) for _ in range(2))
    assert np.array_equal(one.volume.array, other.volume.array)
    assert np.array_equal(one.numbers, other.numbers)
    assert one.tumours == other.tumours


def test_another_seed_draws_another_anatomy(healthy):
    other = phantom_from_seed(4, SHAPE, tumours=0)
    body, other_body = (p.volume.array > -300 for p in (healthy, other))
    overlap = 2 * (body & other_body).sum() / (body.sum() + other_body.sum())
    assert 0.6 < overlap < 0.98


def test_it_is_an_axial_head_first_ct_in_hounsfield_units(phantom):
    volume = phantom.volume
    assert volume.array.dtype == np.int16
    assert volume.geometry.shape == SHAPE
    assert np.allclose(volume.geometry.directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert np.allclose(volume.geometry.spacing_mm, [2.5, 358 / 150, 358 / 150])
    assert volume.array.min() >= -1024
    assert abs(float(np.median(volume.array[:, 0])) + 1000) < 15  # air in front of the chest


def test_tissues_have_the_attenuation_and_volume_of_a_chest(healthy):
    """Shares of the middle third, within what adults have."""
    hu = healthy.volume.array[40:80]
    parts, _ = ndimage.label(hu < -500)
    sizes = np.bincount(parts.ravel())
    outside = parts[0, 0, 0]
    lung_ml = (sizes[1:].sum() - sizes[outside]) * healthy.volume.geometry.voxel_ml
    assert 700 < lung_ml < 4000
    assert -900 < np.median(hu[(parts > 0) & (parts != outside)]) < -780
    body = hu > -300
    assert 0.1 < ((hu > -150) & (hu < -50)).sum() / body.sum() < 0.6  # fat
    assert 0.2 < ((hu > 0) & (hu < 120)).sum() / body.sum() < 0.75  # muscle and blood
    assert 0.02 < (hu > 250).sum() / body.sum() < 0.2  # bone, contrast medium


def test_noise_is_correlated_in_the_slice_and_stronger_inside_the_body(healthy):
    hu = healthy.volume.array.astype(np.float32)
    corner = hu[:60, 1:9, 1:9]  # beside the body, below the shoulders
    air = corner.std()
    differences = np.diff(corner, axis=0).std() / np.sqrt(2)
    assert 2 < air < 20
    assert differences < 0.95 * air  # neighbouring slices share noise
    muscle = hu[(hu > 0) & (hu < 110)].std()
    assert muscle > air


def test_truth_marks_soft_tissue_at_the_named_places(phantom):
    assert len(phantom.tumours) == 4
    assert np.array_equal(phantom.labels, phantom.numbers > 0)
    assert -20 < np.median(phantom.volume.array[phantom.labels == 1]) < 120
    for number, tumour in enumerate(phantom.tumours, start=1):
        mask = phantom.numbers == number
        ball = (6 / np.pi * mask.sum() * phantom.volume.geometry.voxel_ml * 1000) ** (1 / 3)
        assert ball == pytest.approx(tumour.diameter_mm, abs=0.01)
        centre = phantom.volume.geometry.world_from_index(np.argwhere(mask).mean(axis=0))
        assert np.allclose(centre, tumour.centre_mm, atol=1e-3)


def test_tumours_replace_lung_and_leave_the_rest(phantom, healthy):
    """The same seed without tumours differs only at them, and was lung there."""
    changed = np.abs(phantom.volume.array.astype(int) - healthy.volume.array) > 60
    near = ndimage.binary_dilation(phantom.labels, iterations=6)
    assert changed[phantom.labels == 1].mean() > 0.9
    assert changed[~near].mean() < 1e-4
    assert np.median(healthy.volume.array[phantom.labels == 1]) < -600


@pytest.mark.parametrize("seed", range(4))
def test_three_tumours_are_already_mixed(seed):
    plans = plans_from_rng(np.random.default_rng(seed), 3)
    assert min(plan.diameter_mm for plan in plans) <= 10
    assert {plan.place for plan in plans} == set(PLACES)
    assert len({plan.form for plan in plans}) == 3


def test_every_size_is_drawn():
    sizes = [plan.diameter_mm for seed in range(60) for plan in plans_from_rng(np.random.default_rng(seed), MOST)]
    assert min(sizes) < 6.5
    assert max(sizes) > 57
    assert all(6 <= size <= 60 for size in sizes)


def test_the_number_of_tumours_is_drawn_from_the_seed():
    counts = {len(phantom_from_seed(seed, (16, 32, 32)).tumours) for seed in range(6)}
    assert len(counts) > 2


@pytest.mark.parametrize("shape", [(15, 64, 64), (16, 31, 64), (1, 1, 1), (LARGEST_VOXELS, 64, 64)])
def test_a_shape_out_of_range_is_refused(shape):
    with pytest.raises(ValueError, match="at least"):
        phantom_from_seed(0, shape)


@pytest.mark.parametrize("tumours", [-1, 6])
def test_a_number_of_tumours_out_of_range_is_refused(tumours):
    with pytest.raises(ValueError, match="0 to 5 tumours"):
        phantom_from_seed(0, (16, 32, 32), tumours=tumours)


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_shape_is_drawn(seed):
    assert phantom_from_seed(seed, (16, 32, 32)).labels.shape == (16, 32, 32)


def test_bending_and_unbending_are_inverse():
    patient = patient_from_rng(np.random.default_rng(1))
    points = np.random.default_rng(2).uniform(-120, 120, (50, 3))
    back = patient.unbend(points)
    bent = np.column_stack(patient.bend(*(back[:, axis].astype(np.float32) for axis in range(3))))
    assert np.abs(bent - points).max() < 0.05


def test_a_linear_field_is_read_exactly_in_any_box():
    grid = Grid((20, 30, 25), (2.0, 0.9, 1.1))
    coarse = grid.coarse()
    z, y, x = coarse.axes
    field = Field(2 * z - y + 0.5 * x, coarse, grid)
    box = slice(3, 11), slice(5, 30), slice(0, 7)
    fz, fy, fx = grid.axes_in(box)
    assert np.allclose(field.in_box(box), 2 * fz - fy + 0.5 * fx, atol=1e-3)


def test_a_tube_has_its_volume_and_never_darkens():
    grid = Grid((40, 40, 40), (1.0, 1.0, 1.0))
    hu = np.full(grid.shape, -800, np.float32)
    hu[:, :5] = 500
    paint_tubes(hu, grid, tubes_along([(-12, 0, 0), (12, 0, 0)], 4.0), 50.0, 1.0)
    volume = ((hu[:, 5:] + 800) / 850).sum()
    assert volume == pytest.approx(np.pi * 16 * 24 + 4 / 3 * np.pi * 64, rel=0.03)
    assert (hu[:, :5] == 500).all()


def test_coverage_and_smooth_intersection():
    distance = np.array([-2.0, -0.25, 0.0, 0.25, 2.0], np.float32)
    assert np.allclose(coverage(distance, 1.0), [1, 0.75, 0.5, 0.25, 0])
    a, b = np.float32(-3.0), np.float32(5.0)
    assert smooth_max(a, b, 2.0) == pytest.approx(5.0)
    assert smooth_max(a, a, 2.0) == pytest.approx(-2.5)
