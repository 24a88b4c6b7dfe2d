from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctflow.bundle import read_bundle
from ctflow.export.examples import COUNT, anything_marked, example_windows, telling_windows, window_at
from ctflow.window.grid import window_starts
from ctflow.window.predict import predict_volume

ROI = (8, 8, 8)


@pytest.fixture(scope="module")
def model(coarse_bundle):
    return read_bundle(coarse_bundle)


def test_the_windows_of_a_phantom_hold_tumours_and_borders(model):
    windows = example_windows(model, (16, 16, 16))
    assert len(windows) == COUNT
    assert all(window.shape == (1, 1, 16, 16, 16) for window in windows)
    assert 0 <= windows[0].min() < 0.2 < windows[0].max() <= 1
    # 6 mm voxels: a tumour of 20 to 40 mm fills the middle, unless the window ends at the volume's border.
    assert windows[0][0, 0, 7:10, 7:10, 7:10].mean() > 0.6
    assert all(window.std() > 0.1 for window in windows), "none is air alone"
    assert all(not torch.equal(windows[0], other) for other in windows[1:])
    assert all(torch.equal(*both) for both in zip(windows, example_windows(model, (16, 16, 16)), strict=True))


def test_where_one_window_holds_the_whole_phantom_its_mirror_images_are_compared_too(model):
    windows = example_windows(model, model.spec.roi)
    assert len(windows) == COUNT
    assert len({tuple(window.flatten()[::97].tolist()) for window in windows}) == COUNT
    assert [float(window.sum()) for window in windows] == pytest.approx([float(windows[0].sum())] * COUNT)


def test_the_windows_of_a_ct_are_those_with_findings_then_those_with_structure(model):
    logits = torch.full((1, 1, 16, 16, 32), -1.0)
    logits[0, 0, 1:7, 1:7, 1:7] = 1.0
    logits[0, 0, 10:12, 10:12, 30:32] = 1.0
    volume = torch.rand(1, 1, 16, 16, 32) / 10
    volume[0, 0, 0:8, 8:16, 8:16] = torch.rand(8, 8, 8)
    volume[0, 0, :8, :8, 24:] = 0.5  # padding, in which a network marks what it likes
    logits[0, 0, :8, :8, 24:] = 1.0
    starts = window_starts((16, 16, 32), ROI, 0.0)
    taken = telling_windows(volume, anything_marked(logits[0], model), starts, ROI, count=3)
    assert taken == [(0, 0, 0), (8, 8, 24), (0, 8, 8)]
    assert len(telling_windows(volume, anything_marked(logits[0], model), starts[:2], ROI)) == 2
    assert set(telling_windows(volume, anything_marked(logits[0] * torch.nan, model), starts, ROI)) <= set(starts)


def test_several_findings_are_seen_although_windows_overlap(model):
    logits = torch.full((1, 1, 16, 16, 16), -1.0)
    logits[0, 0, 0:6, 0:6, 0:6] = 1.0
    logits[0, 0, 14, 14, 14] = 1.0
    starts = window_starts((16, 16, 16), ROI, 0.5)
    taken = telling_windows(torch.rand(logits.shape), anything_marked(logits[0], model), starts, ROI, count=2)
    assert taken == [(0, 0, 0), (8, 8, 8)]


@pytest.mark.parametrize(("channels", "activation", "threshold"), [(3, "softmax", None), (2, "sigmoid", 0.5)])
def test_what_is_marked_follows_the_model(model, channels, activation, threshold):
    spec = replace(model.spec, out_channels=channels, activation=activation, threshold=threshold)
    logits = torch.zeros(1, channels, 8, 8, 40) - 1
    if activation == "softmax":
        logits[0, 0] = 0
    logits[0, -1, 3, 3, 35] = 2
    starts = window_starts((8, 8, 40), ROI, 0.0)
    volume = torch.zeros(1, 1, 8, 8, 40)
    assert telling_windows(volume, anything_marked(logits[0], replace(model, spec=spec)), starts, ROI, count=1) == [
        (0, 0, 32)
    ]


@pytest.mark.parametrize("size", [(5, 8, 13), (20, 9, 7), (3, 3, 3), (8, 8, 8)])
def test_a_window_is_what_a_run_computes(size):
    volume = torch.rand(1, 1, *size)
    starts, given = [], []

    def predict(windows):
        given.extend(windows.clone())
        return windows

    predict_volume(
        volume, predict, roi=ROI, overlap=0.25, batch_size=2, is_wanted=lambda start: starts.append(start) or True
    )
    assert len(starts) == len(given)
    for start, window in zip(starts, given, strict=True):
        assert torch.equal(window_at(volume, start, ROI)[0], window)
