from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ctflow.phantom import Phantom, draw_phantom, phantom_from_seed
from ctflow.phantom.scene.variety import METALS, Extent, Padding, Variety, variety_from_rng

SMALL = (20, 64, 64)
WHOLE = (40, 64, 64)
PLAIN = [-2595, -2625, -2696, -2655]
LOW, HIGH = -50.0, 0.0  # through the heart


def scan(tumours: int = 0, shape: tuple[int, int, int] = SMALL, **what: object) -> Phantom:
    variety = dataclasses.replace(Variety(extent=Extent("chest", LOW, HIGH)), **what)
    return draw_phantom(3, shape, tumours, variety)


@pytest.fixture(scope="module")
def varieties() -> list[Variety]:
    return [variety_from_rng(np.random.default_rng([seed, 20])) for seed in range(300)]


def test_a_plain_phantom_is_what_it_was():
    """Sums of HU over quarters of a plain phantom, as it was before there were varied ones; rounding may differ."""
    phantom = phantom_from_seed(3, WHOLE)
    assert phantom.variety is None
    assert phantom.volume.padding is None
    assert [int(part.astype(np.int64).sum()) // 10_000 for part in np.split(phantom.volume.array, 4)] == pytest.approx(
        PLAIN, abs=1
    )


def test_the_same_seed_draws_the_same_varied_phantom():
    one, other = (phantom_from_seed(11, SMALL, varied=True) for _ in range(2))
    assert np.array_equal(one.volume.array, other.volume.array)
    assert np.array_equal(one.numbers, other.numbers)
    assert one.variety == other.variety


def test_seeds_draw_every_feature_and_rarely_the_same(varieties):
    assert {v.extent.name for v in varieties} == {"chest", "no apices", "bases", "upper chest", "abdomen"}
    assert {v.arms for v in varieties} == {"out", "up", "down", "folded"}
    assert {v.table for v in varieties} == {"curved", "flat", "foam", "shell"}
    assert {name for v in varieties for name in v.metal} == set(METALS)
    assert {v.inflow for v in varieties} == {-1, 0, 1}
    assert {v.padding.hu for v in varieties if v.padding} == {-1024, -1000, -2000, -3024}
    assert {v.padding.declared for v in varieties if v.padding} == {True, False}
    assert any(v.padding is None for v in varieties)
    assert {v.clothes for v in varieties} == {0, 1, 2}
    assert {v.blanket for v in varieties} == {True, False}
    assert min(v.field_mm for v in varieties) < 300
    assert max(v.field_mm for v in varieties) > 450
    assert len(set(varieties)) == len(varieties)


@pytest.mark.parametrize(
    ("hu", "declared", "held"), [(-2000, False, -2000), (-3024, True, -1024), (-1000, False, -1000)]
)
def test_padding_is_constant_outside_the_circle(hu, declared, held):
    phantom = scan(padding=Padding((10.0, -5.0), 150.0, hu, declared))
    _, y, x = (
        phantom.volume.geometry.shape,
        *((np.arange(n) - (n - 1) / 2) * 358 / 64 - away for n, away in ((64, 10.0), (64, -5.0))),
    )
    outside = np.hypot(y[:, None], x[None]) > 150.001
    assert (phantom.volume.array[:, outside] == held).all()
    assert phantom.volume.array[:, ~outside].min() >= -1024
    assert (phantom.volume.padding is not None) == declared
    if declared:
        assert np.array_equal(phantom.volume.padding, np.broadcast_to(outside, SMALL))


@pytest.mark.parametrize(
    ("metal", "low"), [((), 60.0), (("pacemaker",), 60.0), (("sternal wires", "spinal rods"), 0.0), (("valve",), -40.0)]
)
def test_metal_is_far_denser_than_bone(metal, low):
    array = scan(metal=metal, shape=(24, 128, 128), extent=Extent("chest", low, low + 40)).volume.array
    assert (array[:, :100].max() > 2000) == bool(metal)  # rails and cables lie below


def test_metal_casts_streaks_on_its_slices_alone():
    plain, metal = (
        scan(metal=metal, shape=(24, 96, 96), extent=Extent("chest", -45.0, 15.0)).volume.array.astype(int)
        for metal in ((), ("valve",))
    )
    changed = np.abs(metal - plain)
    assert changed[:14, :20].max() > 5  # in air, far from the heart
    assert not changed[22:].any()  # above the valve


def test_inflow_is_denser_than_all_other_blood():
    array = scan(blood=300.0, uptake=0.3, inflow=1, extent=Extent("chest", 60.0, 110.0)).volume.array
    assert (array > 850).sum() > 50


def test_tumours_of_varied_phantoms_lie_in_the_lung_and_are_numbered():
    variety = Variety(
        extent=Extent("no apices", -60.0, 60.0),
        padding=Padding((0.0, 0.0), 140.0, -3024, False),
        blood=350.0,
        uptake=0.3,
        arms="down",
        metal=("spinal rods",),
    )
    shape = (60, 96, 96)
    phantom, healthy = (draw_phantom(4, shape, count, variety) for count in (4, 0))
    assert len(phantom.tumours) >= 2
    assert set(np.unique(phantom.numbers)) == set(range(len(phantom.tumours) + 1))
    assert np.array_equal(phantom.labels, phantom.numbers > 0)
    before, after = (p.volume.array[phantom.labels == 1] for p in (healthy, phantom))
    assert np.median(before) < -600
    assert -60 < np.median(after) < 140
    for number, tumour in enumerate(phantom.tumours, start=1):
        mask = phantom.numbers == number
        ball = (6 / np.pi * mask.sum() * phantom.volume.geometry.voxel_ml * 1000) ** (1 / 3)
        assert ball == pytest.approx(tumour.diameter_mm, abs=0.01)


def lung_share(phantom: Phantom) -> float:
    middle = phantom.volume.array[:, 16:48, 16:48]
    return float(((middle < -600) & (middle > -970)).mean())


def test_an_abdomen_has_little_lung_and_upper_chests_have_no_liver():
    abdomen = scan(extent=Extent("abdomen", -230.0, -180.0))
    chest = scan(extent=Extent("upper chest", 20.0, 70.0))
    assert lung_share(abdomen) < 0.05 < 0.2 < lung_share(chest)
    assert abdomen.volume.geometry.world_from_index([0, 0, 0])[2] < -220


def test_tight_fields_cut_the_skin_off_and_wide_ones_show_arms():
    tight, wide = scan(field_mm=270.0), scan(field_mm=500.0, arms="down")
    assert np.median(tight.volume.array[:, 32, 0]) > -200
    assert np.median(wide.volume.array[:, 5, :]) < -900
    trunk = scan(field_mm=500.0)
    assert (wide.volume.array > -200).sum() > 1.1 * (trunk.volume.array > -200).sum()


@pytest.mark.parametrize("seed", range(8))
def test_the_smallest_shape_is_drawn_with_anything(seed):
    assert phantom_from_seed(seed, (16, 32, 32), varied=True).labels.shape == (16, 32, 32)
