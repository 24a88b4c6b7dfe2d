"""Logits in blocks become the labels that they become whole, voxel by voxel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import SegResNet

from ctflow.bundle import read_bundle
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Code, Segment
from ctflow.core.progress import silent
from ctflow.core.steps import CropForeground, Orient, Resample, ResampleSpline, Spline
from ctflow.core.volume import Geometry, Volume
from ctflow.pipeline import prediction
from ctflow.pipeline.finishing import Finishing, finished
from ctflow.pipeline.prediction import Prediction
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from ctflow.transforms.prepare import prepare_volume
from ctflow.window.constant import seen_from_boxes
from dicom_support import spec_of
from phantom_support import phantom_drawn_once
from reasons import raises_reason
from zoo_bundles import ZOO, random_weights, written_bundle

TISSUE = Code("85756007", "SCT", "Tissue")
BACK = Spline(1, 0, apart=None)
STEPS = {
    "nothing": (),
    "turned": (Orient("RAS"),),
    "flipped": (Orient("LPI"), Resample((0.7, 1.4, 1.1))),
    "slices last": (Orient("RAS"), Resample((1.3, 1.1, 2.0))),
    "slices first": (Orient("SAR"), Resample((1.7, 0.9, 1.2))),
    "cropped": (Orient("SPL"), Resample((3.0, 1.5, 0.8)), CropForeground(0, above=0.0)),
    "by nnU-Net": (ResampleSpline((1.5, 1.1, 0.7), Spline(3, 0, apart=None), BACK),),
}


def spec_for(classes, activation, restored, steps, *, threshold=None, painted=False):
    segments = tuple(Segment(n, f"structure {n}", TISSUE, TISSUE) for n in range(1, max(classes, 2)))
    regions = tuple(range(1, classes + 1)) if painted else ()
    return replace(
        spec_of(segments), out_channels=classes, activation=activation, restored=restored, threshold=threshold,
        preprocessing=STEPS[steps], painted=regions,
    )  # fmt: skip


def volume_of(shape, *, tilted, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(-900, 900, shape).astype(np.int16)
    array[:2], array[:, :1] = -1000, -1000
    affine = np.array([[0, 0, 0.9, 3.0], [0.4 if tilted else 0.0, 1.1, 0, -5], [2.2, 0, 0, 11], [0, 0, 0, 1]], float)
    return Volume(array, Geometry(shape, affine))


MODELS = st.one_of(
    st.tuples(st.integers(2, 6), st.just("softmax"), st.sampled_from(["probabilities", "logits", "labels"])),
    st.tuples(st.just(1), st.just("sigmoid"), st.sampled_from(["probabilities", "labels"])),
)


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(3, 21), st.integers(2, 9), st.integers(2, 9)),
    model=MODELS,
    steps=st.sampled_from(sorted(STEPS)),
    painted=st.booleans(),
    fractional=st.booleans(),
    tilted=st.booleans(),
    cuts=st.sets(st.integers(1, 40), max_size=6),
    seed=st.integers(0, 9),
)
def test_blocks_become_what_the_whole_becomes(shape, model, steps, painted, fractional, tilted, cuts, seed):
    classes, activation, restored = model
    painted = painted and restored == "logits" and not fractional  # probabilities of regions are no label map
    spec = spec_for(
        classes, activation, restored, steps, threshold=0.5 if activation == "sigmoid" else None, painted=painted
    )
    volume = volume_of(shape, tilted=tilted and steps != "by nnU-Net", seed=seed)
    prepared = prepare_volume(volume, spec.preprocessing, "cpu")
    logits = torch.randn((1, classes, *prepared.tensor.shape[2:]), generator=torch.Generator().manual_seed(seed))
    parts = (None, seen_from_boxes([tuple(slice(0, max(n // 2, 1)) for n in shape)], shape, torch.device("cpu")))
    told = []
    whole = finished(
        prepared, logits, spec, parts, shape, fractional=fractional, progress=lambda *step: told.append(step)
    )
    assert told[-1] == ("restore", shape[0], shape[0])
    finishing = Finishing(prepared, spec, parts, shape, fractional=fractional, progress=silent)
    size = logits.shape[2 + finishing.axis]
    edges = [0, *sorted(cut for cut in cuts if cut < size), size]
    for first, end in itertools.pairwise(edges):
        block = logits.narrow(2 + finishing.axis, first, end - first).clone()
        finishing.take(slice(first, end), block)
        block.fill_(torch.nan)  # its memory is used again
    labels, fractions = finishing.result()
    assert np.array_equal(labels, whole[0])
    assert (fractions is None) == (not fractional)
    if fractional:
        assert np.array_equal(fractions, whole[1])


def test_a_result_that_is_not_finite_is_refused_in_the_last_block_too():
    spec = spec_for(3, "softmax", "probabilities", "slices last")
    prepared = prepare_volume(volume_of((9, 8, 7), tilted=False, seed=0), spec.preprocessing, "cpu")
    logits = torch.zeros((1, 3, *prepared.tensor.shape[2:]))
    logits[0, 0, 0, 0, -1] = torch.inf
    with raises_reason(BundleInvalid, "output-not-finite"):
        finished(prepared, logits, spec, (), (9, 8, 7), fractional=False, progress=silent)


# ------------------------------------------------------------------------------------------------------ whole models


def segmented(model, volume, given, monkeypatch, most):
    monkeypatch.setattr(prediction, "WHOLE_BYTES", most)
    steps, meanwhile = [], []
    with Segmenter(model, given) as segmenter:
        found, seconds = segmenter.segment(volume, lambda *step: steps.append(step), lambda: meanwhile.append(1))
    assert meanwhile == [1]
    assert [stage for stage, done, total in steps if done == total] == ["segment", "restore"]
    assert set(seconds) == {"prepare", "segment", "restore"}
    assert min(seconds.values()) >= 0
    return found


@pytest.mark.parametrize("roi", ["none", "body"])
@pytest.mark.parametrize("seg", ["binary", "fractional"])
def test_a_model_whose_probabilities_are_restored_marks_the_same(coarse_bundle, monkeypatch, roi, seg):
    model = read_bundle(coarse_bundle)
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    given = Settings(device="cpu", cache=None, engine="eager", precision="fp32", roi=roi, seg=seg)
    whole, blocks = (segmented(model, volume, given, monkeypatch, most) for most in (2**31, 0))
    # Along the slices, which are not this model's first axis, windows are added in another order.
    assert (whole.labels != blocks.labels).mean() < 1e-4
    assert whole.window == blocks.window
    if seg == "fractional":
        assert np.abs(whole.fractions.astype(int) - blocks.fractions).max() <= 1


def test_105_classes_whose_labels_are_restored_are_the_same(tmp_path, monkeypatch):
    bundle = next(each for each in ZOO if each.channels == 105)
    folder = written_bundle(tmp_path / "bundle", bundle)
    arguments = {key: value for key, value in bundle.make()["network_def"].items() if key != "_target_"}
    torch.save(random_weights(SegResNet(**arguments)), folder / "models" / bundle.weights)
    volume = volume_of((30, 40, 70), tilted=False, seed=3)
    given = Settings(device="cpu", cache=None, engine="eager", precision="fp32")
    whole, blocks = (segmented(read_bundle(folder), volume, given, monkeypatch, most) for most in (2**31, 0))
    assert len(np.unique(whole.labels)) > 3
    assert np.array_equal(whole.labels, blocks.labels)
    assert whole.window == blocks.window


def test_where_logits_mark_anything_is_known_of_blocks_too(coarse_bundle, monkeypatch):
    """For the comparison of an engine with PyTorch, whose windows are those in which most is marked."""
    model = read_bundle(coarse_bundle)
    volume = phantom_drawn_once(5, (24, 96, 96)).volume
    given = Settings(device="cpu", cache=None, engine="eager", precision="fp32")
    with Segmenter(model, given) as segmenter:
        prepared, _ = segmenter._prepare(volume)
        marked = []
        for most in (2**31, 0):
            monkeypatch.setattr(prediction, "WHOLE_BYTES", most)
            found = Prediction(model, given, segmenter._engines, prepared, None, volume)
            marked.append(found.run(silent, lambda: None, is_compared=True).marked(model))
    assert marked[0].any()
    assert (marked[0] != marked[1]).float().mean() < 1e-4


def test_logits_of_2_gib_are_blended_in_blocks(coarse_bundle):
    model, settings = read_bundle(coarse_bundle), Settings(device="cpu", cache=None)
    prepared = SimpleNamespace(tensor=SimpleNamespace(shape=(1, 1, 1024, 512, 512)), back=(), source_axes=(2, 1, 0))
    for classes, is_large in ((2, False), (3, True)):
        some = replace(model, spec=replace(model.spec, out_channels=classes))
        volume = SimpleNamespace(array=np.zeros((1, 1, 1), np.int16))
        assert Prediction(some, settings, (), prepared, None, volume).is_in_blocks == is_large
