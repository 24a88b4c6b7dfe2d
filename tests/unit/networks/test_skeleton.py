"""A network's names and shapes without its data; and configurations that ask for gigabytes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import check_fit, network_from_model, network_from_spec
from model_support import SMALL, small_model
from reasons import raises_reason

SWIN = {"in_channels": 1, "out_channels": 2, "feature_size": 12}
UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2], "norm": "BATCH"}
MORE = {
    "SwinUNETR": SWIN,
    "UNet": UNET,
    "UNETR": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": [32] * 3,
        "hidden_size": 24,
        "mlp_dim": 24,
        "num_heads": 2,
    },
    "SegResNetDS": {"init_filters": 8},
    "BasicUNetPlusPlus": {"features": [2] * 6},
    "FlexibleUNet": {"in_channels": 1, "out_channels": 2, "backbone": "efficientnet-b0", "spatial_dims": 3},
    "MedNeXt": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 4},
}
NETWORKS = {**SMALL, **{name: NetworkSpec(name, arguments) for name, arguments in MORE.items()}}


def model_of(network: NetworkSpec, weights: dict[str, torch.Tensor] | None = None):
    made = small_model("SegResNet", (16, 16, 16))
    if weights is None:
        torch.manual_seed(7)
        weights = network_from_spec(network).state_dict()
    return dataclasses.replace(made, spec=dataclasses.replace(made.spec, network=network), weights=weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sound_networks_weights_fit_and_all_its_tensors_are_real(name):
    model = model_of(NETWORKS[name])
    torch.manual_seed(3)
    check_fit(model)
    made = network_from_model(model)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))  # the caller's seed is left alone
    torch.manual_seed(1)
    plain = network_from_spec(model.spec.network)
    plain.load_state_dict(model.weights)
    for ours, theirs in (
        (made.named_parameters(), plain.named_parameters()),
        (made.named_buffers(), plain.named_buffers()),
    ):
        for (key, one), (other_key, other) in zip(ours, theirs, strict=True):
            assert (key, one.dtype, one.device.type) == (other_key, other.dtype, "cpu")
            assert torch.equal(one, other), key


def test_half_precision_weights_become_the_networks_own_precision():
    spec = SMALL["SegResNet"]
    weights = {key: value.half() for key, value in model_of(spec).weights.items()}
    made = network_from_model(model_of(spec, weights))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


# What a small file can say, and a part of what ctflow says of it.
HOSTILE = {
    "wide": ("UNet", {"channels": [60_000, 60_000]}, "weights-mismatch", "model.0.conv"),
    "large kernel": ("UNet", {"kernel_size": 1001}, "weights-mismatch", "model.0.conv"),
    "wide transformer": ("SwinUNETR", {"feature_size": 12_288}, "weights-mismatch", "swinViT.patch_embed.proj.weight"),
    "large window": ("SwinUNETR", {"window_size": 40}, "network", "table"),
    "huge window": ("SwinUNETR", {"window_size": 60_000}, "network", "SwinUNETR"),
    "many blocks": ("SwinUNETR", {"depths": [4_000] * 4}, "weights-mismatch", "many more parts"),
    "too many blocks": ("SwinUNETR", {"depths": [60_000] * 4, "use_flash_attention": True}, "network", "table"),
    "large image": ("UNETR", {"img_size": [32_000] * 3}, "weights-mismatch", "position_embeddings"),
    "wide DynUNet": ("DynUNet", {"filters": [50_000] * 3}, "weights-mismatch", "input_block"),
    "wide nnU-Net": ("PlainConvUNet", {"features_per_stage": [60_000] * 3}, "weights-mismatch", "encoder.stages.0"),
    "many stages": ("PlainConvUNet", {"n_conv_per_stage": [60_000] * 3}, "weights-mismatch", "many more parts"),
}


def hostile(name: str):
    """A hostile model, with the weights of the ordinary network."""
    base, more, *_ = HOSTILE[name]
    network = NETWORKS[base]
    return model_of(dataclasses.replace(network, arguments={**network.arguments, **more}), model_of(network).weights)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_network_of_gigabytes_is_compared_before_it_is_made(name):
    *_, reason, said = HOSTILE[name]
    model = hostile(name)
    began = time.process_time()
    with raises_reason(BundleInvalid, reason, names=said):
        network_from_model(model)
    assert time.process_time() - began < 20


def test_each_of_several_folds_needs_its_weights():
    model = model_of(SMALL["PlainConvUNet"])
    network = dataclasses.replace(model.spec.network, members=20)
    with raises_reason(BundleInvalid, "weights-mismatch", names="missing: 0."):
        network_from_model(dataclasses.replace(model, spec=dataclasses.replace(model.spec, network=network)))


def test_it_takes_little_memory_and_not_torchs_compiler():
    code = (
        "import resource, sys\n"
        "from test_skeleton import HOSTILE, NETWORKS, hostile, model_of\n"
        "from ctflow.networks.build import check_fit, network_from_model\n"
        "for name in ('SwinUNETR', 'VISTA3D', 'DynUNet'): check_fit(model_of(NETWORKS[name]))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('wide', 'wide transformer', 'large window'):\n"
        "    try: network_from_model(hostile(name))\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parents[1])))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *kinds, kilobytes = done.stdout.split("\n")[-5:-1]
    assert kinds == ["BundleInvalid"] * 3
    assert int(kilobytes) < 500_000
