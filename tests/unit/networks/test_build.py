from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from ctflow.bundle import demonstration_bundle, read_bundle
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import (
    argument_value,
    current_arguments,
    network_class,
    network_from_model,
    network_from_spec,
)
from reasons import raises_reason

SMALL = {"out_channels": 2, "features": [2, 2, 2, 2, 2, 2]}


@pytest.fixture(scope="module")
def demonstration():
    return read_bundle(demonstration_bundle())


@pytest.mark.parametrize(
    "name",
    ["", "os.system", "swin_unetr", "monai.networks.nets.SwinUNETR", "_Net", "__name__", "NoSuchNet", "Sequence", "x y"]
    + ["densenet", "Conv", "$SwinUNETR"],
)
def test_only_networks_of_monai_by_plain_name(name):
    with raises_reason(BundleInvalid, "target", names="network_def#_target_"):
        network_class(name)


def run_afresh(code: str, *options: str) -> None:
    """Run code in a process that has imported nothing; what it asserts has to hold."""
    done = subprocess.run([sys.executable, *options, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_may_import_a_network_at_the_same_time_and_leave_holoscan_alone():
    """MONAI's packages need each other: a thread that finds one half imported gets an ImportError."""
    code = (
        "import pkgutil, sys; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "from ctflow.networks.build import network_class\n"
        "walk = pkgutil.walk_packages\n"
        "with Pool(4) as pool: found = set(pool.map(network_class, ['SwinUNETR'] * 4))\n"
        "assert 'holoscan' not in sys.modules; assert 'monai.deploy' not in sys.modules\n"
        "import monai.utils.module\n"
        "assert len(found) == 1 and pkgutil.walk_packages is monai.utils.module.walk_packages is walk"
    )
    run_afresh(code, "-W", "error")


def test_monai_finds_components_by_name_after_ctflow_has_imported_it():
    """A bundle's configuration names classes without their modules, and MONAI looks among those that are loaded."""
    code = (
        "from ctflow.networks.build import network_class; network_class('SwinUNETR')\n"
        "from monai.bundle.config_item import ComponentLocator\n"
        "found = ComponentLocator().get_component_module_name\n"
        "assert found('SlidingWindowInferer') == 'monai.inferers.inferer'\n"
        "assert found('DiceCELoss') == 'monai.losses.dice'"
    )
    run_afresh(code)


def test_removed_arguments_are_dropped_and_renamed_ones_renamed_with_a_note():
    arguments, notes = current_arguments("SwinUNETR", {"img_size": 96, "in_channels": 1, "out_channels": 2})
    assert arguments == {"in_channels": 1, "out_channels": 2}
    assert "img_size dropped" in notes[0]
    arguments, notes = current_arguments("UNETR", {"img_size": 96, "pos_embed": "conv"})
    assert arguments == {"img_size": 96, "proj_type": "conv"}
    assert "pos_embed read as proj_type" in notes[0]
    with raises_reason(BundleInvalid, "argument", names=("network_def#pos_embed", "proj_type")):
        current_arguments("UNETR", {"pos_embed": "conv", "proj_type": "conv"})


@pytest.mark.parametrize(
    ("name", "arguments", "said", "reason"),
    [
        ("SwinUNETR", {"colour": 1}, "network_def#colour", "argument"),
        ("UNETR", {"out_chanels": 1}, "network_def#out_chanels", "argument"),
        ("SwinUNETR", {"feature_size": 10**9}, "network_def#feature_size", "value"),
        ("BasicUNet", {"features": [2, [10**400]]}, "network_def#features", "value"),
        ("BasicUNet", {"act": ["relu", {"x": float("nan")}]}, "network_def#act", "value"),
        ("FlexibleUNet", {"pretrained": True}, "network_def#pretrained", "value"),
        ("EfficientNetBN", {"model_name": "efficientnet-b0"}, "network_def#pretrained", "value"),
        ("DenseNet121", {"pretrained": 1}, "network_def#pretrained", "value"),
    ],
)
def test_arguments_that_the_network_cannot_take_are_named(name, arguments, said, reason):
    with raises_reason(BundleInvalid, reason, names=said):
        current_arguments(name, arguments)


def test_an_argument_is_the_given_one_or_the_default_or_none():
    assert argument_value(NetworkSpec("BasicUNet", {"out_channels": 5}), "out_channels") == 5
    assert argument_value(NetworkSpec("BasicUNet", {}), "out_channels") == 2
    assert argument_value(NetworkSpec("SwinUNETR", {}), "out_channels") is None
    assert argument_value(NetworkSpec("BasicUNet", {}), "colour") is None


def test_arguments_that_do_not_fit_each_other_are_bundle_invalid():
    with raises_reason(BundleInvalid, "network", names="SwinUNETR"):
        network_from_spec(NetworkSpec("SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 13}))
    with raises_reason(BundleInvalid, "network", names="BasicUNet"):
        network_from_spec(NetworkSpec("BasicUNet", {"features": "wide"}))
    with raises_reason(BundleInvalid, "network", names="SwinUNETR"):
        network_from_spec(NetworkSpec("SwinUNETR", {}))


def test_making_a_network_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    network_from_spec(NetworkSpec("BasicUNet", SMALL))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_models_network_has_its_weights_and_no_gradients(demonstration):
    network = network_from_model(demonstration)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, demonstration.weights[key], rtol=0, atol=0)


def test_weights_that_do_not_fit_are_named(demonstration):
    weights = dict(demonstration.weights)
    first, second, third = list(weights)[:3]
    wrong = {key: value for key, value in weights.items() if key != first}
    wrong |= {
        "extra.1": weights[first],
        "extra.2": weights[first],
        "extra.3": weights[first],
        "extra.4": weights[first],
    }
    wrong[third] = torch.zeros(3)
    with raises_reason(BundleInvalid, "weights-mismatch") as caught:
        network_from_model(dataclasses.replace(demonstration, weights=wrong))
    said = str(caught.value)
    assert f"missing: {first}" in said
    assert "unexpected: extra.1, extra.2, extra.3 and 1 more" in said
    assert f"of another shape: {third} (3,) instead of" in said
    assert second not in said
