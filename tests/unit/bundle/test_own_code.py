"""A bundle's own code: refused with what to say, executed from its folder only, part of the identity."""

from __future__ import annotations

import json
import py_compile
import sys
import warnings

import numpy as np
import pytest
import torch

from ctflow.bundle import read_bundle
from ctflow.core.errors import BundleInvalid, NetworkNotTaken
from ctflow.core.model import OwnCode
from ctflow.core.volume import Geometry, Volume
from ctflow.networks.build import network_from_model
from ctflow.networks.own_code import code_of_folder, own_class
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from reasons import raises_reason

NETWORK = """
from torch import nn
from .parts import layer


class Net(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layer = layer(in_channels, out_channels)

    def forward(self, x):
        return self.layer(x)
"""
PARTS = "from torch import nn\n\n\ndef layer(a, b):\n    return nn.Conv3d(a, b, 1)\n"


@pytest.fixture
def own(bundle, inference):
    """A bundle whose network is its own code."""
    inference["network_def"] = {"_target_": "scripts.networks.net.Net", "in_channels": 1, "out_channels": 2}
    inference["inferer"]["roi_size"] = [32, 32, 32]
    (bundle / "configs" / "inference.json").write_text(json.dumps(inference))
    folder = bundle / "scripts" / "networks"
    folder.mkdir(parents=True)
    (bundle / "scripts" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "net.py").write_text(NETWORK)
    (folder / "parts.py").write_text(PARTS)
    weights = {"layer.weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1), "layer.bias": torch.tensor([0.5, 0.0])}
    torch.save(weights, bundle / "models" / "model.pt")
    return bundle


def test_it_is_refused_by_default_with_what_to_say(own):
    with raises_reason(
        BundleInvalid, "target", names=("network_def#_target_", "scripts.networks.net.Net", "--allow-code")
    ):
        read_bundle(own)


def test_it_is_imported_from_the_bundle_only_said_and_part_of_the_identity(own):
    before = set(sys.modules)
    model = read_bundle(own, allow_code=True)
    assert not {name for name in set(sys.modules) - before if name.startswith("scripts")}
    assert "scripts.networks.net.Net" in model.spec.notes[0]
    assert model.spec.network.code.digest[:12] in model.spec.notes[0]
    window = torch.full((1, 1, 4, 4, 4), 0.75)
    assert network_from_model(model)(window).flatten()[[0, 64]].tolist() == [0.5, 0.75]
    (own / "scripts" / "networks" / "parts.py").write_text(PARTS + "\n# another\n")
    assert read_bundle(own, allow_code=True).weights_digest != model.weights_digest


def test_it_segments_as_any_network_does(own):
    model = read_bundle(own, allow_code=True)
    array = np.full((20, 24, 24), -1000, np.int16)
    array[5:15, 6:18, 6:18] = 300
    affine = np.diag([1.5, 1.5, 1.5, 1.0])[:, [2, 1, 0, 3]]
    settings = Settings(engine="eager", device="cpu", cache=None)
    with Segmenter(model, settings) as segmenter:
        found, _ = segmenter.segment(Volume(array, Geometry(array.shape, affine)))
    assert np.array_equal(found.labels, array > -300)


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("scripts.networks.net.Nothing", NETWORK, "Nothing"),
        ("scripts.networks.net.layer", NETWORK, "layer"),
        ("os.system", NETWORK, "os.system"),
        ("scripts.networks.net.Net", "import no_such_package", "ModuleNotFoundError"),
        ("scripts.networks.net.Net", "raise SystemError('x')", "SystemError"),
    ],
)
def test_code_that_is_not_there_or_fails_is_named(own, inference, target, code, said):
    inference["network_def"]["_target_"] = target
    (own / "configs" / "inference.json").write_text(json.dumps(inference))
    (own / "scripts" / "networks" / "net.py").write_text(code)
    with raises_reason(BundleInvalid, "own-code", names=said):
        read_bundle(own, allow_code=True)


def test_two_bundles_with_files_of_the_same_names_keep_their_own(tmp_path):
    found = []
    for folder, number in ((tmp_path / "a", 1), (tmp_path / "b", 2)):
        (folder / "scripts").mkdir(parents=True)
        (folder / "layers.py").write_text(f"NUMBER = {number}")
        text = "from torch import nn\nimport layers\n\n\nclass Net(nn.Module):\n    number = layers.NUMBER\n"
        (folder / "scripts" / "net.py").write_text(text)  # without __init__.py: found nevertheless, and only here
        found.append(own_class("scripts.net.Net", code_of_folder(folder)).number)
    assert found == [1, 2]
    assert "layers" not in sys.modules


def test_nothing_outside_the_folder_is_executed(tmp_path, capsys):
    outside, folder = tmp_path / "outside", tmp_path / "bundle"
    for path in (outside, folder / "this"):
        path.mkdir(parents=True)
    (outside / "net.py").write_text("print('executed')")
    with raises_reason(BundleInvalid, "own-code", names="this.net"):
        own_class("this.net.Net", code_of_folder(folder))  # not the library's own `this`, which prints a poem
    (folder / "scripts").symlink_to(outside)
    with raises_reason(BundleInvalid, "own-code", names="scripts"):
        code_of_folder(folder)
    with raises_reason(BundleInvalid, "own-code", names="scripts"):
        own_class("scripts.net.Net", OwnCode(str(folder), "0" * 64))
    assert capsys.readouterr().out == ""


def test_byte_code_that_lies_beside_is_not_read_and_other_files_of_code_count(own):
    model = read_bundle(own, allow_code=True)
    py_compile.compile(str(own / "scripts" / "networks" / "net.py"))
    assert read_bundle(own, allow_code=True).weights_digest == model.weights_digest
    (own / "scripts" / "more.so").write_bytes(b"x")
    assert read_bundle(own, allow_code=True).weights_digest != model.weights_digest


def test_torchscript_runs_only_if_code_is_allowed(bundle):
    model = read_bundle(bundle)
    window = torch.rand(1, 1, 32, 32, 32)
    expected = network_from_model(model)(window)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network_from_model(model), window), bundle / "models" / "model.ts")
    (bundle / "models" / "model.pt").unlink()
    with raises_reason(BundleInvalid, "torchscript", names=("models/model.ts", "--allow-code")):
        read_bundle(bundle)
    scripted = read_bundle(bundle, allow_code=True)
    assert scripted.weights_digest != model.weights_digest
    assert "model.ts" in " ".join(scripted.spec.notes)
    torch.testing.assert_close(network_from_model(scripted)(window), expected)


@pytest.mark.parametrize(
    ("key", "value", "reason", "said"),
    [
        ("network_def", {"_target_": "SegResNet", "in_channels": 3, "out_channels": 6}, "inputs", "3 images"),
        ("network_def", {"_target_": "monai.apps.detection.networks.RetinaNet"}, "target", "boxes"),
        (
            "network_def",  # as lung_nodule_ct_detection of the zoo makes it, beside its RetinaNetDetector
            {"_target_": "RetinaNet", "feature_extractor": "$monai.networks.nets.resnet.resnet50(spatial_dims=3)"},
            "target",
            "boxes",
        ),
        (
            "preprocessing",
            {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "LoadImaged", "keys": ["arterial", "venous"]},
                    {"_target_": "ConcatItemsd", "keys": ["arterial", "venous"], "name": "image"},
                ],
            },
            "inputs",
            "ConcatItemsd of ['arterial', 'venous']",
        ),
        ("modality", "MR", "inputs", "reads CT"),
    ],
)
def test_what_is_for_other_inputs_says_what_would_run_it(bundle, inference, metadata, key, value, reason, said):
    if key == "modality":
        metadata["network_data_format"]["inputs"] = {"image": {"modality": value}}
        (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    else:
        (bundle / "configs" / "inference.json").write_text(json.dumps({**inference, key: value}))
    with raises_reason(BundleInvalid, reason, names=(said, "monai.bundle run")):
        read_bundle(bundle)


@pytest.mark.parametrize("key", ["modality", "in_channels"])
def test_allow_code_is_not_advised_where_it_would_not_help(bundle, inference, metadata, key):
    inference["preprocessing"]["transforms"].append({"_target_": "scripts.mine.Step", "keys": "image"})
    if key == "modality":
        inference["network_def"] = {"_target_": "scripts.mine.Net"}
        metadata["network_data_format"]["inputs"] = {"image": {"modality": "MR"}}
    else:
        inference["network_def"] = {"_target_": "SegResNet", "in_channels": 4, "out_channels": 2}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (bundle / "configs" / "inference.json").write_text(json.dumps(inference))
    with raises_reason(BundleInvalid, "inputs", names=(key,)) as caught:
        read_bundle(bundle)
    assert "--allow-code" not in str(caught.value)


def test_a_simple_inferer_takes_the_whole_volume_as_one_window(own, inference):
    inference["network_def"]["_target_"] = "scripts.networks.net.Net"
    inference["inferer"] = {"_target_": "SimpleInferer"}
    (own / "configs" / "inference.json").write_text(json.dumps(inference))
    model = read_bundle(own, allow_code=True)
    array = np.full((17, 24, 21), -1000, np.int16)
    array[5:15, 6:18, 6:18] = 300
    affine = np.diag([1.5, 1.5, 1.5, 1.0])[:, [2, 1, 0, 3]]
    with Segmenter(model, Settings(device="cpu", cache=None)) as segmenter:
        found, _ = segmenter.segment(Volume(array, Geometry(array.shape, affine)))
    assert found.window["roi"] == [21, 24, 17]
    assert np.array_equal(found.labels, array > -300)
    with (
        raises_reason(NetworkNotTaken, "network-not-taken"),
        Segmenter(model, Settings(engine="openvino", device="cpu", cache=None)),
    ):
        pass
