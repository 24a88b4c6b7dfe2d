"""Steps on label maps, and networks for slices, against MONAI."""

from __future__ import annotations

from types import SimpleNamespace

import monai.transforms as mt
import monai.transforms.utils as monai_utils
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from scipy import ndimage

from ctflow.core.model import NetworkSpec, WindowPadding
from ctflow.core.steps import FillHoles, FilterLabels, KeepLargest, MapLabels, RemoveSmall
from ctflow.networks.build import network_from_spec
from ctflow.transforms.labels import apply_label_steps, in_voxels
from ctflow.window.predict import predict_volume

CONNECTIVITY = st.integers(1, 3)
LABELS = st.none() | st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True).map(tuple)


def structure(ndim, connectivity):
    return ndimage.generate_binary_structure(ndim, ndim if connectivity is None else connectivity)


def numbered(image, connectivity=None, return_num=False):
    found, count = ndimage.label(image, structure(image.ndim, connectivity))
    return (found, count) if return_num else found


def without_small(image, min_size, connectivity):
    """scikit-image's: of whole numbers each value is one object."""
    objects = numbered(image, connectivity) if image.dtype == bool else image
    return np.where((np.bincount(objects.ravel()) < min_size)[objects], 0, image)


@pytest.fixture(autouse=True)
def scikit_image(monkeypatch):
    """What MONAI takes of scikit-image, which is not installed here, made of SciPy."""
    monkeypatch.setattr(monai_utils, "measure", SimpleNamespace(label=numbered))
    monkeypatch.setattr(monai_utils, "has_measure", True)
    monkeypatch.setattr(monai_utils, "morphology", SimpleNamespace(remove_small_objects=without_small))
    monkeypatch.setattr(monai_utils, "has_morphology", True)


def labels_of(seed: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.choice(4, (4, 5, 3), p=[1 - share, share / 3, share / 3, share / 3])
    return np.kron(coarse, np.ones((2, 2, 3))).astype(np.uint8)


STEPS = st.one_of(
    st.builds(KeepLargest, LABELS, st.booleans(), CONNECTIVITY, st.integers(1, 3)),
    st.builds(RemoveSmall, st.sampled_from([1, 13, 30, 100]), CONNECTIVITY, st.booleans()),
    st.builds(FillHoles, LABELS, CONNECTIVITY),
    st.builds(FilterLabels, st.lists(st.integers(0, 4), min_size=1).map(tuple)),
    st.just(MapLabels(((1, 3), (3, 7), (2, 0)))),
)


def monais(step):
    if isinstance(step, KeepLargest):
        return mt.KeepLargestConnectedComponent(
            step.labels, independent=step.independent, connectivity=step.connectivity, num_components=step.count
        )
    if isinstance(step, RemoveSmall):
        return mt.RemoveSmallObjects(step.least, step.connectivity, step.independent)
    if isinstance(step, FillHoles):
        return mt.FillHoles(step.labels, step.connectivity)
    if isinstance(step, FilterLabels):
        return mt.LabelFilter(step.labels)
    return mt.MapLabelValue(*zip(*step.pairs, strict=True))


@settings(max_examples=80, deadline=None)
@given(step=STEPS, seed=st.integers(0, 50), share=st.sampled_from([0.3, 0.6, 0.9]), single=st.booleans())
def test_steps_on_labels_are_monais(step, seed, share, single):
    labels = labels_of(seed, share)
    if single:
        labels = np.minimum(labels, 1)
    given_labels = labels.copy()
    expected = torch.as_tensor(monais(step)(torch.from_numpy(labels.copy())[None].float()))[0]
    assert np.array_equal(apply_label_steps(labels, [step]), expected.numpy().astype(np.uint8))
    assert np.array_equal(labels, given_labels)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of MONAI's `pixdim`
@settings(max_examples=40, deadline=None)
@given(
    step=st.builds(RemoveSmall, st.floats(0, 60), CONNECTIVITY, st.booleans(), st.just(True)),
    spacing=st.tuples(*[st.floats(0.4, 3)] * 3),
    seed=st.integers(0, 50),
)
def test_small_volumes_are_those_that_monai_removes_by_measure(step, spacing, seed):
    labels = labels_of(seed, 0.6)
    image = MetaTensor(torch.from_numpy(labels.copy())[None].float(), affine=np.diag([*spacing, 1]))
    expected = mt.RemoveSmallObjects(step.least, step.connectivity, step.independent, by_measure=True)(image)[0]
    found = apply_label_steps(labels, in_voxels([step], spacing))
    assert np.array_equal(found, expected.numpy().astype(np.uint8))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_network_for_slices_moves_through_the_volume_as_monais(axis):
    arguments = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [2, 3], "strides": [2]}
    made = network_from_spec(NetworkSpec("UNet", arguments, slice_axis=axis)).eval()
    volume = torch.rand(1, 1, 10, 12, 14)
    roi = [8, 8, 8]
    roi[axis] = 1
    inferer = SliceInferer(axis, roi_size=(8, 8), sw_batch_size=3, overlap=0.5, padding_mode="replicate")
    with torch.inference_mode():
        expected = inferer(volume, made.network)
        found = predict_volume(
            volume, made, roi=tuple(roi), overlap=0.5, blend="constant", padding=WindowPadding("replicate")
        )
    torch.testing.assert_close(found, expected)
