from __future__ import annotations

import pytest

from ctflow.bundle.config import Config
from ctflow.bundle.inferer import Sliding, sliding_from_config
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import WindowPadding
from reasons import raises_reason


def sliding(target="SlidingWindowInferer", **arguments):
    return sliding_from_config(Config({"inferer": {"_target_": target, **arguments}}, "configs/inference.json"))


def test_the_defaults_are_monais():
    assert sliding(roi_size=64) == Sliding((64, 64, 64), 0.25, "constant", 1)


def test_everything_given_is_taken_and_where_it_runs_is_ignored():
    assert sliding(
        "monai.inferers.SlidingWindowInferer",
        roi_size=[96, 64, 32],
        sw_batch_size=4,
        overlap=0.5,
        mode="gaussian",
        sigma_scale=[0.125, 0.125, 0.125],
        padding_mode="constant",
        cval=0.0,
        device="$torch.device('cpu')",
        sw_device="@device",
        progress=True,
        cache_roi_weight_map="$1",
    ) == Sliding((96, 64, 32), 0.5, "gaussian", 4)


def test_what_the_zoo_gives_is_taken():
    given = {"overlap": [0.5, 0.25, 0.25], "mode": "$monai.utils.BlendMode.GAUSSIAN", "sigma_scale": [0.1, 0.2, 0.3]}
    found = sliding(roi_size=[96, -1, 32], padding_mode="replicate", sw_device="cuda", **given)
    assert found == Sliding((96, 0, 32), (0.5, 0.25, 0.25), "gaussian", 1, (0.1, 0.2, 0.3), WindowPadding("replicate"))
    assert sliding("SimpleInferer") == Sliding((0, 0, 0), 0.0, "constant", 1)
    assert sliding("SliceInferer", roi_size=[64, 48], spatial_dim=1) == Sliding(
        (64, 1, 48), 0.25, "constant", 1, slice_axis=1
    )


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("roi_size", "$@patch", "reference"),
        ("roi_size", "$[patch] * 3", "expression"),
        ("roi_size", [96, 96], "value"),
        ("roi_size", [96, 96, -2], "value"),
        ("roi_size", [96, 96, 96.0], "value"),
        ("roi_size", [96, 96, True], "value"),
        ("roi_size", None, "value"),
        ("roi_size", {"_target_": "os.system"}, "value"),
        ("sw_batch_size", 0, "value"),
        ("sw_batch_size", 1.5, "value"),
        ("overlap", 1, "value"),
        ("overlap", -0.1, "value"),
        ("overlap", [0.5], "value"),
        ("overlap", [0.5, 0.5, 1.0], "value"),
        ("roi_size", [96], "value"),
        ("sigma_scale", [0.125], "value"),
        ("buffer_dim", 3, "value"),
        ("overlap", "half", "value"),
        ("mode", "linear", "value"),
        ("mode", None, "value"),
        ("sigma_scale", 0, "value"),
        ("padding_mode", "edge", "value"),
        ("cval", "-1", "value"),
        ("with_coord", True, "value"),
        ("unknown", 1, "argument"),
    ],
)
def test_what_ctflow_does_not_do_is_refused_by_its_key(key, value, reason):
    with raises_reason(BundleInvalid, reason, names=f"configs/inference.json: inferer#{key} "):
        sliding(**{"roi_size": 96, key: value})


def test_no_roi_and_another_inferer_are_refused():
    with raises_reason(BundleInvalid, "argument", names="inferer#roi_size"):
        sliding()
    with raises_reason(BundleInvalid, "target", names=("inferer#_target_", "SaliencyInferer")):
        sliding("SaliencyInferer")
