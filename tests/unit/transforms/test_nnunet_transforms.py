"""Preprocessing of nnU-Net's models, compared with nnU-Net's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, ZScoreNormalization
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import ClipNormalize, ResampleSpline, Spline, ZScore
from ctflow.transforms.nnunet import axis_apart, clip_and_normalize, crop_nonzero, resample_spline, zscore
from ctflow.transforms.state import GridState
from reasons import raises_reason

spacings = st.tuples(*[st.sampled_from([0.5, 0.78125, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0])] * 3)
sizes = st.tuples(*[st.integers(2, 24)] * 3)
apart = st.sampled_from([None, True, False])


def state_of(array, spacing_mm=(1.0, 1.0, 1.0)):
    eyes = tuple(np.eye(size) for size in array.shape)
    picks = tuple(np.arange(size) for size in array.shape)
    return GridState(torch.from_numpy(array), np.diag([*spacing_mm, 1.0]), (0, 1, 2), eyes, picks)


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@settings(max_examples=30, deadline=None)
@given(
    size=sizes, old=spacings, new=spacings,
    forward=st.builds(Spline, st.sampled_from([0, 1, 3]), st.sampled_from([0, 1]), apart),
    back=st.builds(Spline, st.sampled_from([0, 1]), st.sampled_from([0, 1]), apart),
)  # fmt: skip
def test_resampling_equals_nnunets_there_and_back(size, old, new, forward, back):
    shape = tuple(int(n) for n in compute_new_shape(size, old, new))
    if min(shape) < 1:
        return
    image = noise(size)
    found = resample_spline(state_of(image, old), ResampleSpline(new, forward, back))
    assert tuple(found.image.shape) == shape
    theirs = resample_data_or_seg_to_shape(
        image[None], shape, old, new, order=forward.order, order_z=forward.order_z, force_separate_z=forward.apart
    )[0]
    assert np.allclose(found.image.numpy(), theirs, atol=2e-5)
    logits = noise((2, *shape), 1)
    theirs = resample_data_or_seg_to_shape(
        logits, size, new, old, order=back.order, order_z=back.order_z, force_separate_z=back.apart
    )
    ours = np.einsum("cxyz,ax,by,dz->cabd", logits, *found.back)
    assert np.allclose(ours, theirs, atol=2e-5)


@settings(max_examples=200, deadline=None)
@given(first=spacings, second=spacings, wanted=st.sampled_from([None, True, False]))
def test_the_axis_that_is_resampled_apart_is_nnunets(first, second, wanted):
    _, theirs = determine_do_sep_z_and_axis(wanted, first, second)
    assert axis_apart(wanted, first, second) == theirs


def test_the_new_grid_keeps_the_edges_of_the_old_one():
    found = resample_spline(
        state_of(noise((10, 8, 6)), (1.0, 2.0, 3.0)), ResampleSpline((2.0, 1.0, 3.0), *[Spline(1, 0, False)] * 2)
    )
    corner = found.affine @ [-0.5, -0.5, -0.5, 1]
    assert np.allclose(corner[:3], [-0.5, -1.0, -1.5])
    end = found.affine @ [*(np.array(found.image.shape) - 0.5), 1]
    assert np.allclose(end[:3], [9.5, 15.0, 16.5])


def test_a_grid_without_voxels_is_rejected():
    with raises_reason(UnsupportedPixels, "implausible-spacing"):
        resample_spline(
            state_of(noise((2, 2, 2)), (0.1, 1.0, 1.0)), ResampleSpline((5.0, 1.0, 1.0), *[Spline(1, 0, None)] * 2)
        )


@settings(max_examples=60, deadline=None)
@given(size=sizes, box=st.tuples(*[st.tuples(st.integers(0, 23), st.integers(0, 23))] * 3), masked=st.booleans())
def test_cropping_and_z_scores_equal_nnunets(size, box, masked):
    image = np.zeros(size, np.float32)
    place = tuple(slice(min(pair), max(pair) + 1) for pair in box)
    image[place] = noise(size)[place] + 3
    cropped = crop_nonzero(state_of(image))
    theirs, mask, bounds = crop_to_nonzero(image[None])
    assert np.array_equal(cropped.image.numpy(), theirs[0])
    for axis, (low, high) in enumerate(bounds):
        assert np.array_equal(cropped.back[axis], np.eye(size[axis])[:, low:high])
    if not theirs.any():
        return
    normalization = ZScoreNormalization(use_mask_for_norm=masked, intensityproperties={})
    expected = normalization.run(theirs[0].copy(), mask[0])
    assert np.allclose(zscore(cropped.image, ZScore(masked)).numpy(), expected, atol=1e-3, rtol=1e-3)


def test_holes_inside_a_body_count_for_masked_z_scores():
    image = np.zeros((9, 9, 9), np.float32)
    image[1:8, 1:8, 1:8] = 5
    image[4, 4, 4] = 0
    found = zscore(torch.from_numpy(image), ZScore(masked=True))
    assert found[4, 4, 4] < -5  # normalized, as it lies inside
    assert found[0, 0, 0] == 0  # left alone


@pytest.mark.parametrize("deviation", [400.0, 1e-12])
def test_ct_normalization_equals_nnunets(deviation):
    image = noise((4, 5, 6)) * 1000
    figures = {"mean": -300.0, "std": deviation, "percentile_00_5": -1000.0, "percentile_99_5": 400.0}
    theirs = CTNormalization(use_mask_for_norm=False, intensityproperties=figures).run(image.copy())
    ours = clip_and_normalize(torch.from_numpy(image), ClipNormalize(-1000.0, 400.0, -300.0, deviation))
    assert np.allclose(ours.numpy(), theirs, rtol=1e-6)
