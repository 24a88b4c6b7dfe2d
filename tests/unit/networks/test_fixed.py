"""Networks that ctflow builds otherwise than MONAI does: the same weights give the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import DiNTS, TopologyInstance, vista3d132

from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.networks.build import network_from_spec
from model_support import SMALL
from reasons import raises_reason

WINDOWS = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(3))


def test_dints_with_listed_paths_is_monais():
    spec = SMALL["DiNTS"]
    ours = network_from_spec(spec).eval()
    topology = {**spec.arguments["dints_space"]}
    del topology["_target_"]
    topology["arch_code"] = [np.array(code) for code in topology["arch_code"]]
    nodes = torch.tensor(spec.arguments["node_a"])
    theirs = DiNTS(**{**spec.arguments, "dints_space": TopologyInstance(**topology), "node_a": nodes}).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(ours(WINDOWS), theirs(WINDOWS))


@pytest.mark.parametrize("classes", [[1, 3, 14], [5]])
@pytest.mark.parametrize("background", [False, True])
def test_vista3d_with_automatic_prompts_is_monais(classes, background):
    arguments = SMALL["VISTA3D"].arguments | {"classes": classes}
    ours = network_from_spec(NetworkSpec("vista3d132", arguments | {"background": background})).eval()
    classes = torch.tensor(arguments.pop("classes"))[:, None]
    theirs = vista3d132(**arguments).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        for window in WINDOWS.split(1):
            found, expected = ours(window), theirs(window, class_vector=classes, transpose=True)
            if len(classes) > 1:
                assert torch.equal(found[:, background:], expected)
            torch.testing.assert_close(
                found[:, background:], expected
            )  # of one class, asked for twice, to the last bit
            assert not background or not found[:, 0].any()


@pytest.mark.parametrize("arguments", [{"classes": []}, {}, {"classes": [1, 2], "depth": 3}])
def test_vista3d_needs_classes_and_known_arguments(arguments):
    with raises_reason(BundleInvalid, "network", names="vista3d132"):
        network_from_spec(NetworkSpec("vista3d132", arguments))
