from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Activations, AsDiscrete

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import ModelSpec, NetworkSpec
from ctflow.transforms.postprocess import (
    bytes_on_host,
    fractions_from_probabilities,
    labels_from_probabilities,
    labels_from_restored,
    probabilities_from_logits,
)
from reasons import raises_reason


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
    assert np.array_equal(bytes_on_host(found), theirs)


@pytest.mark.parametrize(("activation", "threshold"), [("sigmoid", 0.5), ("sigmoid", 0.3), ("none", 0.1)])
def test_of_channels_that_overlap_in_monai_the_last_one_is_kept(activation, threshold):
    logits = logits_of(3)
    spec = replace(spec_of(3, activation, threshold), painted=(1, 2, 3))
    theirs = AsDiscrete(threshold=threshold)(Activations(sigmoid=activation == "sigmoid")(logits[0])).numpy()
    assert (theirs.sum(0) > 1).any()
    found = labels_from_probabilities(probabilities_from_logits(logits, spec), spec)
    expected = (theirs * np.arange(1, 4)[:, None, None, None]).max(0)
    assert np.array_equal(bytes_on_host(found), expected)
    restored = probabilities_from_logits(logits, replace(spec, restored="probabilities"))
    assert np.array_equal(bytes_on_host(labels_from_restored(restored, spec)), expected)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_sigmoid_and_threshold_equal_monai(threshold):
    logits = logits_of(1)
    spec = spec_of(1, "sigmoid", threshold)
    theirs = AsDiscrete(threshold=threshold)(Activations(sigmoid=True)(logits[0]))[0].numpy()
    found = labels_from_probabilities(probabilities_from_logits(logits, spec), spec)
    assert found.dtype == torch.uint8
    assert np.array_equal(bytes_on_host(found), theirs)


def test_logits_without_activation_stay_as_they_are():
    logits = logits_of(3)
    assert torch.equal(probabilities_from_logits(logits, spec_of(3, "none", None)), logits[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_become_an_empty_mask(bad):
    logits = logits_of(2)
    logits[0, 1, 2, 3, 4] = bad
    with raises_reason(BundleInvalid, "output-not-finite"):
        probabilities_from_logits(logits, spec_of(2, "softmax", None))


def test_another_number_of_channels_is_named():
    with raises_reason(BundleInvalid, "output-channels", names=("3 channels", "2")):
        probabilities_from_logits(logits_of(3), spec_of(2, "softmax", None))


@pytest.mark.parametrize(("channels", "activation", "threshold"), [(2, "softmax", None), (1, "sigmoid", 0.5)])
def test_one_half_of_a_fraction_is_the_border_of_the_mask(channels, activation, threshold):
    spec = spec_of(channels, activation, threshold)
    near = torch.tensor([0.0, 1e-7, -1e-7, 0.004, -0.004, 0.02, -0.02, 9.0, -9.0]).reshape(1, 1, 9, 1, 1)
    logits = torch.cat([torch.zeros_like(near), near], dim=1) if channels == 2 else near
    probabilities = probabilities_from_logits(logits, spec)
    labels = labels_from_probabilities(probabilities, spec)
    fractions = fractions_from_probabilities(probabilities, labels, spec)
    assert fractions.dtype == torch.uint8
    assert torch.equal(fractions[0] >= 128, labels > 0)
    assert (fractions[0] - probabilities[0] * 255).abs().max() <= 1
    assert fractions.flatten()[-2:].tolist() == [255, 0]


@given(channels=st.integers(3, 6), spread=st.floats(0.0, 3.0), seed=st.integers(0, 99))
def test_the_labels_of_several_classes_can_be_read_from_their_fractions(channels, spread, seed):
    spec = spec_of(channels, "softmax", None)
    values = np.random.default_rng(seed).standard_normal((1, channels, 6, 7, 8), np.float32)
    probabilities = probabilities_from_logits(torch.from_numpy(values) * spread, spec)
    labels = labels_from_probabilities(probabilities, spec)
    fractions = fractions_from_probabilities(probabilities, labels, spec).int()
    rest = 255 - fractions.sum(dim=0)
    largest = fractions.max(dim=0).values
    assert torch.equal(largest > rest, labels > 0)
    for number in range(1, channels):
        others = torch.cat([fractions[: number - 1], fractions[number:]]).max(dim=0).values
        assert bool((fractions[number - 1] > others)[labels == number].all())
    assert (fractions - probabilities[1:] * 255).abs().max() <= channels


def test_another_threshold_leaves_the_probabilities_as_they_are():
    spec = spec_of(1, "sigmoid", 0.3)
    probabilities = probabilities_from_logits(logits_of(1), spec)
    fractions = fractions_from_probabilities(probabilities, labels_from_probabilities(probabilities, spec), spec)
    assert torch.equal(fractions, (probabilities * 255).round().to(torch.uint8))
