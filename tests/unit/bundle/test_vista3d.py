"""The bundle vista3d: its class prompts, without its own code; agreement with MONAI is in tests/e2e/test_zoo.py."""

from __future__ import annotations

import pytest

from ctflow.bundle import spec_from_documents
from ctflow.bundle.expressions.calls import component_of_call
from ctflow.core.errors import BundleInvalid
from ctflow.core.steps import MapLabels
from reasons import raises_reason
from zoo_bundles import metadata_of, vista3d

CLASSES = [5, 3, 12]


@pytest.fixture
def document():
    found = vista3d() | {"everything_labels": CLASSES, "names": {"2": "kidney"}}
    return {key: value for key, value in found.items() if value is not None}


def spec_of(document):
    return spec_from_documents(document, metadata_of(14), folder_name="vista3d")


def test_its_classes_are_segments_by_their_numbers_and_names(document):
    spec = spec_of(document)
    assert spec.network.name == "vista3d132"
    assert spec.network.arguments == {
        "classes": CLASSES, "background": True, "in_channels": 1, "encoder_embed_dim": 8
    }  # fmt: skip
    assert (spec.in_channels, spec.out_channels, spec.activation, spec.restored) == (1, 4, "none", "labels")
    assert (spec.overlap, spec.blend, spec.batch_size) == (0.25, "constant", 1)
    assert spec.network_label_steps == (MapLabels(((1, 5), (2, 3), (3, 12))),)
    assert [(each.number, each.label) for each in spec.segments] == [
        (3, "structure 3"), (5, "structure 5"), (12, "structure 12")
    ]  # fmt: skip
    assert "not executed" in spec.notes[0]


def test_another_file_chooses_other_classes(document):
    assert [each.number for each in spec_of(document | {"everything_labels": [3]}).segments] == [3]


def test_a_network_as_an_object_is_the_same(document):
    document["network_def"] = {
        "_target_": "monai.networks.nets.vista3d132", "in_channels": "@input_channels", "encoder_embed_dim": 8
    }  # fmt: skip
    assert spec_of(document).network.arguments["classes"] == CLASSES


@pytest.mark.parametrize("labels", [[], 3, [3, 3], [0, 1], [133], [True, 2], ["liver"], None])
def test_classes_that_it_does_not_know_are_refused(document, labels):
    with raises_reason(BundleInvalid, "value", names="everything_labels"):
        spec_of(document | {"everything_labels": labels})


@pytest.mark.parametrize(
    ("path", "value", "reason", "said"),
    [
        (("evaluator", "hyper_kwargs"), {"user_prompt": True}, "argument", "everything_labels"),
        (("evaluator", "hyper_kwargs", "user_prompt"), False, "value", "user_prompt"),
        (("evaluator", "mode"), "train", "value", "evaluator#mode"),
        (("evaluator", "other"), 1, "argument", "evaluator#other"),
        (("inferer", "other"), 1, "argument", "inferer#other"),
        (("inferer", "roi_size"), [8, 8], "value", "inferer#roi_size"),
        (("inferer", "_target_"), "scripts.inferer.Other", "target", "inferer#_target_"),
        (("network_def",), "$monai.networks.nets.vista3d132(depth=3)", "argument", "network_def#depth"),
        (("network_def",), "$monai.networks.nets.vista3d132(in_channels=2)", "value", "network_def#in_channels"),
        (("network_def",), "$monai.networks.nets.vista3d132(48, 1)", "expression", "network_def"),
        (("postprocessing", "transforms", 2, "func"), "$lambda x: torch.flip(x)", "expression", "2#func"),
        (("postprocessing", "transforms", 0, "keys"), "image", "keys", "0#keys"),
        (("network_def",), {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
         "channels": [4, 8], "strides": [2]}, "target", "inferer#_target_"),
    ],
)  # fmt: skip
def test_what_it_does_otherwise_is_refused_by_key(document, path, value, reason, said):
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with raises_reason(BundleInvalid, reason, names=said):
        spec_of(document)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$nets.UNet(a=@x#y, b=[1, 2])", {"_target_": "nets.UNet", "a": "$@x::y", "b": "$[1, 2]"}),
        ("$nets.Net()", {"_target_": "nets.Net"}),
        ("$Net()", None),
        ("$Net(1)", None),
        ("$Net(**{})", None),
        ("$make()(a=1)", None),
        ("$@x.y(a=1)", None),
        ("$Net(a=1).to(b=2)", None),
        ("$Net(a=", None),
        ("$" + "(" * 500, None),
    ],
)
def test_a_call_is_taken_for_the_object_that_it_makes(text, expected):
    assert component_of_call(text) == expected
