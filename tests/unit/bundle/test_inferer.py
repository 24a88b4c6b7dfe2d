from __future__ import annotations

import pytest

from ctflow.bundle.config import Config
from ctflow.bundle.inferer import Sliding, sliding_from_config
from ctflow.core.errors import BundleInvalid


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("roi_size", "$@patch"),
        ("roi_size", [96, 96]),
        ("roi_size", [96, 96, 0]),
        ("roi_size", [96, 96, 96.0]),
        ("roi_size", [96, 96, True]),
        ("roi_size", -1),
        ("roi_size", None),
        ("roi_size", {"_target_": "os.system"}),
        ("sw_batch_size", 0),
        ("sw_batch_size", 1.5),
        ("overlap", 1),
        ("overlap", -0.1),
        ("overlap", [0.5]),
        ("overlap", [0.5, 0.5, 0.25]),
        ("roi_size", [96]),
        ("sigma_scale", [0.125]),
        ("buffer_dim", 3),
        ("overlap", "half"),
        ("mode", "linear"),
        ("mode", None),
        ("sigma_scale", 0.25),
        ("padding_mode", "reflect"),
        ("cval", -1),
        ("with_coord", True),
        ("unknown", 1),
    ],
)
def test_what_ctflow_does_not_do_is_refused_by_its_key(key, value):
    with pytest.raises(BundleInvalid) as caught:
        sliding(**{"roi_size": 96, key: value})
    assert f"configs/inference.json: inferer#{key} " in str(caught.value)


def test_no_roi_and_another_inferer_are_refused():
    with pytest.raises(BundleInvalid, match="inferer#roi_size is missing"):
        sliding()
    with pytest.raises(BundleInvalid, match="inferer#_target_ is 'SimpleInferer'"):
        sliding("SimpleInferer")
