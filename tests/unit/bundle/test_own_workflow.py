"""Transforms, inferers and evaluators of a bundle's own code; agreement with MONAI is in tests/e2e/test_zoo.py."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from ctflow.bundle import read_bundle, read_spec
from ctflow.core.errors import BundleInvalid, NetworkNotTaken
from ctflow.core.volume import Geometry, Volume
from ctflow.networks.build import network_from_spec
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from reasons import raises_reason
from zoo_bundles import OWN_CODE, metadata_of, written_bundle

TRANSFORMS = next(each for each in OWN_CODE if each.folder == "own_transforms")
MARKED = {"_target_": "scripts.transforms.Marked", "keys": "pred"}


@pytest.fixture
def own(tmp_path):
    """A bundle whose own transform scales the CT, with weights."""
    folder = written_bundle(tmp_path / "own", TRANSFORMS)
    _saved(folder)
    return folder


def _saved(folder):
    network = json.loads((folder / "configs" / "inference.json").read_text())["network_def"]
    network = {key: value for key, value in network.items() if key != "_target_"}
    from ctflow.core.model import NetworkSpec  # noqa: PLC0415

    torch.save(network_from_spec(NetworkSpec("UNet", network)).state_dict(), folder / "models" / "model.pt")


def changed(folder, change):
    path = folder / "configs" / "inference.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def scan(shape=(12, 20, 22)):
    rng = np.random.default_rng(2)
    affine = np.diag([2.0, 1.5, 1.5, 1.0])[:, [2, 1, 0, 3]]
    return Volume(rng.integers(-1000, 400, shape).astype(np.int16), Geometry(shape, affine))


def segmented(folder, engine="auto"):
    with Segmenter(
        read_bundle(folder, allow_code=True), Settings(engine=engine, device="cpu", cache=None)
    ) as segmenter:
        return segmenter.segment(scan())[0]


def test_it_is_refused_by_default_with_what_to_say(own):
    with raises_reason(
        BundleInvalid, "target", names=("preprocessing#transforms#3#_target_", "Squashed", "--allow-code")
    ):
        read_bundle(own)


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        ({"_target_": "GaussianSmoothd", "keys": "image"}, "target"),
        ({"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x ** 2"}, "expression"),
        ({"_target_": "Flipd", "keys": "image", "another": 1}, "argument"),
    ],
)
def test_what_monai_knows_and_ctflow_does_not_is_refused_with_what_to_say(own, transform, reason):
    changed(own, lambda document: document["preprocessing"]["transforms"].__setitem__(3, transform))
    with raises_reason(BundleInvalid, reason, names=("preprocessing#transforms#3", "--allow-code")):
        read_bundle(own)


def test_it_is_said_and_part_of_the_identity(own):
    model = read_bundle(own, allow_code=True)
    workflow = model.spec.workflow
    assert (workflow.infers, workflow.evaluates, model.spec.roi) == (False, False, (32, 32, 32))
    assert model.spec.own_code is workflow.code
    said = " ".join(model.spec.notes)
    assert workflow.code.digest[:12] in said
    assert "Squashed" in said
    assert "scripts" not in sys.modules
    digests = {model.weights_digest}
    shared = own / "scripts" / "shared.py"
    shared.write_text("LIMIT = 0.3\n")
    digests.add(read_bundle(own, allow_code=True).weights_digest)
    changed(own, lambda document: document["preprocessing"]["transforms"][3].update(width=100.0))
    digests.add(read_bundle(own, allow_code=True).weights_digest)
    assert len(digests) == 3


def test_nothing_is_imported_when_it_is_only_read(own):
    (own / "scripts" / "transforms.py").write_text("raise SystemError('executed')")
    assert read_spec(own, allow_code=True).workflow is not None
    with raises_reason(BundleInvalid, "own-code", names=("preprocessing", "SystemError")):
        segmented(own)


def test_code_from_elsewhere_is_not_taken(own):
    changed(own, lambda document: document["preprocessing"]["transforms"][3].update(_target_="torchio.Blur"))
    with raises_reason(BundleInvalid, "own-code", names="torchio.Blur"):
        read_bundle(own, allow_code=True)


def test_what_ctflow_understands_is_not_run_by_monai(own):
    changed(own, lambda document: document["preprocessing"]["transforms"].__delitem__(slice(3, None)))
    model = read_bundle(own, allow_code=True)
    assert model.spec.workflow is None
    assert model.weights_digest == read_bundle(own).weights_digest


def test_nothing_is_saved_and_the_settings_say_that_all_windows_are_computed(own, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*"))
    found = segmented(own)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert found.labels.shape == (12, 20, 22)
    assert found.window["constant_windows"] == "compute"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return data['nothing']", "KeyError"),
        ("return {**data, 'image': data['image'][0]}", "not an image of 1 channel"),
        ("return {**data, 'image': data['image'] / 0}", "not finite"),
        ("return {}", "not an image"),
    ],
)
def test_a_failure_of_the_code_is_named(own, code, said):
    text = f"from monai.transforms import MapTransform\n\n\nclass Squashed(MapTransform):\n    def __init__(self, keys, width):\n        super().__init__(keys)\n\n    def __call__(self, data):\n        {code}\n"  # noqa: E501
    (own / "scripts" / "transforms.py").write_text(text)
    changed(own, lambda document: document["preprocessing"]["transforms"].__delitem__(slice(4, None)))
    with raises_reason(BundleInvalid, "own-code", names=("preprocessing", said)):
        segmented(own)


MASKS = """
import torch
from monai.transforms import MapTransform


class Marked(MapTransform):
    def __call__(self, data):
        pred = data['pred']
        x = pred * 0
        {code}
        return {{**data, 'pred': x}}
"""


def _marked(own, code):
    (own / "scripts" / "transforms.py").write_text(
        (own / "scripts" / "transforms.py").read_text() + MASKS.format(code=code)
    )
    invert = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
    changed(own, lambda document: document["postprocessing"].update(transforms=[invert, MARKED]))
    return own


def test_masks_of_several_channels_become_labels_in_their_order(own):
    _marked(own, "x[0] = 1; x[1, 3:9] = 1")
    assert segmented(own).labels[:, :, 3:9].all()
    names = metadata_of(2)
    names["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "liver", "1": "tumour"}
    (own / "configs" / "metadata.json").write_text(json.dumps(names))
    labels = segmented(own).labels
    assert set(np.unique(labels[:, :, 3:9])) == {2}
    assert set(np.unique(np.delete(labels, range(3, 9), axis=2))) == {1}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = x[:1] + 7", "not labels of its channels"),
        ("x = x[:1] + 0.5", "not labels of its channels"),
        ("x = x + 2", "not a mask of 0 and 1"),
        ("x = x[:, 1:]", "not labels on the CT's grid"),
        ("x.affine[0, 3] += 4", "lie elsewhere"),
    ],
)
def test_what_is_no_result_on_the_grid_of_the_ct_is_named(own, code, said):
    with raises_reason(BundleInvalid, "own-code", names=said):
        segmented(_marked(own, code))


def test_an_own_inferer_needs_pytorch_and_is_said(tmp_path):
    bundle = next(each for each in OWN_CODE if each.folder == "own_inferer")
    folder = written_bundle(tmp_path / "own", bundle)
    _saved(folder)
    found = segmented(folder)
    assert (found.engine.backend, found.window["inferer"]) == ("eager", "own")
    with raises_reason(NetworkNotTaken, "network-not-taken"):
        segmented(folder, "openvino")
