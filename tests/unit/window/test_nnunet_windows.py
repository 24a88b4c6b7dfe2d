"""Windows, weights and mirroring of nnU-Net's models, compared with nnU-Net."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from ctflow.window.blend import importance_map
from ctflow.window.grid import window_axes
from ctflow.window.mirror import mirrored
from ctflow.window.predict import predict_volume

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 200), st.integers(1, 96))] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
)
def test_the_grid_is_nnunets(sizes, overlap):
    size, roi = (tuple(max(pair) for pair in sizes), tuple(window for _, window in sizes))
    theirs = compute_steps_for_sliding_window(size, roi, 1 - overlap)
    assert list(window_axes(size, roi, overlap, "even")) == theirs


@settings(max_examples=40, deadline=None)
@given(roi=st.tuples(*[st.integers(1, 40)] * 3))
def test_the_weights_are_nnunets(roi):
    theirs = compute_gaussian(roi, value_scaling_factor=10, device=CPU)
    ours = importance_map(roi, "nnunet", CPU)
    assert ours.min() > 0
    # Products of three Gaussians round to halves in another order here and there.
    assert torch.allclose(ours, theirs.float(), rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("axes", [axes for count in range(4) for axes in itertools.combinations(range(3), count)])
def test_every_combination_of_the_axes_is_mirrored_once(axes):
    def network(windows):  # knows where it is
        return windows * torch.arange(windows[0, 0].numel()).view(windows.shape[2:])

    windows = torch.randn(2, 1, 3, 4, 5)
    found = mirrored(network, axes)(windows)
    flips = [
        [axis + 2 for axis in some] for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)
    ]
    expected = torch.stack([network(windows.flip(some)).flip(some) for some in flips]).mean(0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_mirroring_keeps_what_an_engine_returns_in_the_same_memory():
    memory = torch.empty(1, 1, 2, 2, 2)

    def network(windows):
        return memory.copy_(windows)

    windows = torch.arange(8.0).view(1, 1, 2, 2, 2)
    assert torch.equal(mirrored(network, (0, 1, 2))(windows), windows)


def test_even_windows_blend_to_the_same_logits_where_the_network_is_local():
    volume = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 13, 17, 11), dtype=np.float32))
    found = predict_volume(volume, lambda x: x * 2, roi=(8, 6, 12), overlap=0.5, blend="nnunet", placement="even")
    assert torch.allclose(found, volume * 2, atol=1e-5)
