from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Activations, AsDiscrete

from ctflow.errors import BundleInvalid
from ctflow.model import Code, ModelSpec, NetworkSpec, Segment
from ctflow.postprocess import (
    MOST_FINDINGS,
    bits_from_mask,
    labels_from_probabilities,
    labels_on_host,
    longest_distance_mm,
    mask_from_bits,
    measure_segments,
    probabilities_from_logits,
)
from ctflow.volume import Geometry

SEGMENT = Segment(1, "tumour", Code("1", "SCT", "a"), Code("2", "SCT", "b"))


def spec_of(channels: int, activation: str, threshold: float | None) -> ModelSpec:
    return ModelSpec(
        "m", "1", NetworkSpec("UNet", {}), 1, channels, (), (8, 8, 8), 0.25, "constant", 1, activation, threshold, (),
        "", False,
    )  # fmt: skip


def logits_of(channels: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, channels, 6, 7, 8), np.float32))


@pytest.mark.parametrize("channels", [2, 3, 14])
def test_softmax_and_argmax_equal_monai(channels):
    logits = logits_of(channels)
    spec = spec_of(channels, "softmax", None)
    theirs = AsDiscrete(argmax=True)(Activations(softmax=True)(logits[0]))[0].numpy()
    found = labels_from_probabilities(probabilities_from_logits(logits, spec), spec)
    assert found.dtype == torch.uint8
    assert np.array_equal(labels_on_host(found, spec), theirs)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_sigmoid_and_threshold_equal_monai(threshold):
    logits = logits_of(1)
    spec = spec_of(1, "sigmoid", threshold)
    theirs = AsDiscrete(threshold=threshold)(Activations(sigmoid=True)(logits[0]))[0].numpy()
    found = labels_from_probabilities(probabilities_from_logits(logits, spec), spec)
    assert found.dtype == torch.uint8
    assert np.array_equal(labels_on_host(found, spec), theirs)


def test_logits_without_activation_stay_as_they_are():
    logits = logits_of(3)
    assert torch.equal(probabilities_from_logits(logits, spec_of(3, "none", None)), logits[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_become_an_empty_mask(bad):
    logits = logits_of(2)
    logits[0, 1, 2, 3, 4] = bad
    with pytest.raises(BundleInvalid, match="not finite"):
        probabilities_from_logits(logits, spec_of(2, "softmax", None))


def test_another_number_of_channels_is_named():
    with pytest.raises(BundleInvalid, match="3 channels; the bundle says 2"):
        probabilities_from_logits(logits_of(3), spec_of(2, "softmax", None))


@given(shape=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99))
def test_a_packed_mask_comes_back_as_it_was(shape, seed):
    mask = np.random.default_rng(seed).integers(0, 2, shape, np.uint8)
    bits = bits_from_mask(torch.from_numpy(mask))
    assert np.array_equal(bits.numpy(), np.packbits(mask))
    assert np.array_equal(mask_from_bits(bits.numpy(), shape), mask)


def oblique(shape, spacing=(2.0, 0.7, 0.9)) -> Geometry:
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = [10, -20, 30]
    return Geometry(shape, affine)


def ellipsoid(shape, spacing, centre, radii_mm):
    index = np.indices(shape).reshape(3, -1).T
    inside = ((((index - centre) * spacing) / radii_mm) ** 2).sum(axis=1) <= 1
    return inside.reshape(shape).astype(np.uint8)


def test_an_ellipsoid_has_its_volume_diameter_and_centre():
    shape, spacing, centre, radii = (40, 70, 60), (2.0, 0.7, 0.9), (20, 35, 30), (30.0, 14.0, 20.0)
    geometry = oblique(shape, spacing)
    (measured,) = measure_segments(ellipsoid(shape, spacing, centre, radii), geometry, [SEGMENT])
    assert measured.volume_ml == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.02)
    assert measured.longest_diameter_mm == pytest.approx(60.0, abs=2.0)
    assert measured.centroid_mm == pytest.approx(tuple(geometry.world_from_index(centre)), abs=0.1)
    assert measured.components == 1
    assert measured.findings[0].volume_ml == pytest.approx(measured.volume_ml)
    assert measured.findings_left_out == 0


def brute_force(mask, geometry) -> float:
    points = geometry.world_from_index(np.argwhere(mask))
    return float(np.linalg.norm(points[:, None] - points[None], axis=2).max())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 0.9), shape=st.tuples(*[st.integers(1, 8)] * 3))
def test_the_longest_diameter_is_exact(seed, density, shape):
    from scipy import ndimage  # noqa: PLC0415

    mask = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    geometry = oblique(shape)
    (measured,) = measure_segments(mask, geometry, [SEGMENT])
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert measured.components == count
    assert measured.voxels == int(mask.sum())
    if count:
        expected = max(brute_force(components == index, geometry) for index in range(1, count + 1))
        assert measured.longest_diameter_mm == pytest.approx(expected, abs=1e-9)
        assert sum(finding.volume_ml for finding in measured.findings) <= measured.volume_ml + 1e-9


@pytest.mark.parametrize("shape", [(50, 1, 1), (1, 40, 1), (1, 9, 12), (9, 1, 12), (7, 7, 1), (1, 1, 1)])
def test_flat_and_straight_components_are_measured(shape):
    geometry = oblique(shape)
    (measured,) = measure_segments(np.ones(shape, np.uint8), geometry, [SEGMENT])
    assert measured.longest_diameter_mm == pytest.approx(brute_force(np.ones(shape), geometry))


def test_many_points_are_measured_in_blocks():
    rng = np.random.default_rng(0)
    sphere = rng.standard_normal((3000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    expected = max(float(np.linalg.norm(sphere - point, axis=1).max()) for point in sphere)
    assert longest_distance_mm(sphere) == pytest.approx(expected)


def test_more_than_a_hundred_components_are_counted_not_listed():
    mask = np.zeros((9, 45, 45), np.uint8)
    mask[::4, ::3, ::3] = 1
    count = int(mask.sum())
    mask[0, 0, 1] = 1  # the largest
    (measured,) = measure_segments(mask, oblique(mask.shape), [SEGMENT])
    assert measured.components == count
    assert len(measured.findings) == MOST_FINDINGS
    assert measured.findings_left_out == count - MOST_FINDINGS
    assert measured.findings[0].volume_ml == pytest.approx(2 * oblique(mask.shape).voxel_ml)


def test_a_thin_component_beyond_the_list_decides_the_longest_diameter():
    mask = np.zeros((5, 120, 120), np.uint8)
    for row in range(0, 110, 8):
        for column in range(0, 60, 6):
            mask[:, row : row + 4, column : column + 4] = 1  # 140 blocks of 80 voxels
    mask[0, :60, 118] = 1  # a line of 60
    geometry = oblique(mask.shape)
    (measured,) = measure_segments(mask, geometry, [SEGMENT])
    assert measured.findings_left_out > 0
    assert measured.longest_diameter_mm == pytest.approx(59 * 0.7)
    assert max(finding.longest_diameter_mm for finding in measured.findings) < 59 * 0.7


def test_an_empty_segment_is_told_and_others_are_measured():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1] = 2
    other = Segment(2, "cyst", SEGMENT.category, SEGMENT.type)
    empty, single = measure_segments(labels, oblique(labels.shape), [SEGMENT, other])
    assert asdict(empty) == {
        "number": 1, "label": "tumour", "voxels": 0, "volume_ml": 0.0, "longest_diameter_mm": None,
        "centroid_mm": None, "components": 0, "findings": (), "findings_left_out": 0,
    }  # fmt: skip
    assert single.longest_diameter_mm == 0.0
    assert single.voxels == 1
