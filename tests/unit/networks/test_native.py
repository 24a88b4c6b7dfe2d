"""Our modules of MONAI's networks: the same parameters, and bit for bit the same results on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from monai.networks import nets

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import current_arguments, module_of_network, network_from_spec
from ctflow.networks.channels_last.swin_unetr import ChannelsLastSwinUNETR, takes_swin_unetr
from ctflow.networks.native import MODULES, native_class
from ctflow.networks.operations import TorchOperations
from ctflow.networks.swin import rewrite_for_export

ONE = {"in_channels": 1, "out_channels": 2}
SWIN = {**ONE, "feature_size": 12}
CASES = [
    ("SwinUNETR", (64, 32, 32), SWIN),
    ("SwinUNETR", (32, 32, 64), {**SWIN, "feature_size": 24, "in_channels": 2, "out_channels": 3, "drop_rate": 0.2}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "use_v2": True, "attn_drop_rate": 0.1, "dropout_path_rate": 0.1}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "downsample": "mergingv2", "qkv_bias": False, "use_checkpoint": True}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "window_size": [4, 7, 5], "depths": [1, 2, 3, 1], "mlp_ratio": 2.0}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "normalize": False, "patch_norm": True}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "norm_name": ["GROUP", {"num_groups": 4}], "num_heads": [2, 2, 4, 4]}),
    ("SwinUNETR", (64, 32, 32), {**SWIN, "norm_name": "batch", "spatial_dims": 3, "patch_size": 2}),
]
# Whatever is unusual goes to MONAI's class, which computes it or says what is wrong with it.
NOT_TAKEN = [
    ("SwinUNETR", {**SWIN, "spatial_dims": 2}),
    ("SwinUNETR", {**SWIN, "use_hyena": True}),
    ("SwinUNETR", {**SWIN, "use_flash_attention": True}),
    ("SwinUNETR", {**SWIN, "feature_size": 13}),
    ("SwinUNETR", {**SWIN, "feature_size": "24"}),
    ("SwinUNETR", {**SWIN, "depths": [2, 2, 2]}),
    ("SwinUNETR", {**SWIN, "depths": 2}),
    ("SwinUNETR", {**SWIN, "drop_rate": 2}),
    ("SwinUNETR", {**SWIN, "normalize": "yes"}),
    ("SwinUNETR", {**SWIN, "norm_name": "layer"}),
    ("SwinUNETR", {**SWIN, "norm_name": ["group", {}]}),
    ("SwinUNETR", {**SWIN, "norm_name": ["instance", {"track_running_stats": True}]}),
    ("SwinUNETR", {**SWIN, "norm_name": 3}),
    ("SwinUNETR", {**SWIN, "window_size": [7, 7]}),
    ("SwinUNETR", {"in_channels": 1}),
    ("BasicUNet", {}),
    ("SwinUNETRV3", SWIN),
]


@pytest.mark.parametrize(("name", "roi", "arguments"), CASES)
def test_a_native_network_is_monais_bit_for_bit(name, roi, arguments):
    torch.manual_seed(0)
    monai = getattr(nets, name)(**arguments).eval()
    for parameter in monai.parameters():  # MONAI sets biases to 0 and scales to 1, which would hide a wrong one
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    native = network_from_spec(NetworkSpec(name, arguments)).eval()
    assert type(native).__module__.startswith("ctflow.networks.native")
    assert list(native.state_dict()) == list(monai.state_dict())
    native.load_state_dict(monai.state_dict(), strict=True)
    windows = torch.rand(1, arguments["in_channels"], *roi)
    with torch.inference_mode():
        assert torch.equal(native(windows), monai(windows))


@pytest.mark.parametrize(("name", "arguments"), NOT_TAKEN)
def test_unusual_arguments_are_left_to_monai(name, arguments):
    assert native_class(name, arguments) is None


def test_a_window_that_does_not_fit_is_an_error():
    network = network_from_spec(NetworkSpec("SwinUNETR", SWIN)).eval()
    with pytest.raises(ValueError, match="divisible"):
        network(torch.zeros(1, 1, 48, 64, 64))


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_are_monais_and_its_removed_arguments_are_dropped(name):
    assert getattr(nets, name).__module__ == module_of_network(name)


def test_arguments_are_read_without_monai():
    program = (
        "import sys; from ctflow.core.model import NetworkSpec; from ctflow.networks import build\n"
        f"arguments, notes = build.current_arguments('SwinUNETR', {{**{SWIN}, 'img_size': 96}})\n"
        "build.network_from_spec(NetworkSpec('SwinUNETR', arguments))\n"
        "window = build.argument_value(NetworkSpec('SwinUNETR', arguments), 'window_size')\n"
        "print(len(notes), window, 'monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "7", "False"], done.stderr
    with pytest.raises(BundleInvalid, match="colour"):
        current_arguments("SwinUNETR", {**SWIN, "colour": 1})


@pytest.mark.parametrize("more", [{}, {"use_v2": True, "downsample": "mergingv2"}])
def test_the_rewrites_take_a_native_network_as_they_take_monais(more):
    roi, arguments = (64, 32, 32), {**SWIN, **more}
    monai = nets.SwinUNETR(**arguments).eval().requires_grad_(False)
    native = network_from_spec(NetworkSpec("SwinUNETR", arguments)).eval().requires_grad_(False)
    native.load_state_dict(monai.state_dict())
    windows = torch.rand(1, 1, *roi)
    assert takes_swin_unetr(native, roi) is takes_swin_unetr(monai, roi) is not more.get("use_v2", False)
    with torch.inference_mode():
        assert torch.equal(rewrite_for_export(native, roi)(windows), rewrite_for_export(monai, roi)(windows))
        if not more:
            operations = TorchOperations(torch.float32, "cpu")
            ours, theirs = (ChannelsLastSwinUNETR(each, roi, operations)(windows) for each in (native, monai))
            assert torch.equal(ours, theirs)
