from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctflow.bundle import demonstration_bundle, read_bundle, spec_from_documents
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Code, ModelSpec, Segment
from ctflow.core.steps import Orient, Resample, ScaleRange
from ctflow.networks.build import network_from_model
from reasons import raises_reason


def test_the_demonstration_bundle_says_what_it_is():
    model = read_bundle(demonstration_bundle())
    spec = model.spec
    assert spec.demonstration is True
    assert "Not a medical device" in spec.intended_use
    assert (spec.network.name, spec.network.arguments["feature_size"]) == ("SwinUNETR", 12)
    assert (spec.in_channels, spec.out_channels) == (1, 2)
    assert spec.preprocessing == (
        Orient("RAS"),
        Resample((1.5, 1.5, 1.5)),
        ScaleRange(-1000.0, 400.0, 0.0, 1.0, clip=True),
    )
    assert (spec.roi, spec.overlap, spec.blend, spec.batch_size) == ((96, 96, 96), 0.25, "gaussian", 1)
    assert (spec.activation, spec.threshold) == ("softmax", None)
    assert spec.segments == (
        Segment(
            1,
            "Tumour",
            Code("49755003", "SCT", "Morphologically Abnormal Structure"),
            Code("108369006", "SCT", "Neoplasm"),
            (Code("39607008", "SCT", "Lung"),),
            hu_range=(-700.0, 300.0),
        ),
    )
    assert {"CHEST", "LUNG", "CHESTABDOMEN"} <= set(spec.body_parts)
    assert spec.notes == ()
    assert len(model.weights_digest) == 64
    assert not network_from_model(model).training


def test_the_meanings_are_those_of_pydicoms_dictionary():
    from pydicom.sr.codedict import codes  # noqa: PLC0415

    (segment,) = read_bundle(demonstration_bundle()).spec.segments
    for ours, theirs in (
        (segment.category, codes.cid7150.MorphologicallyAbnormalStructure),
        (segment.type, codes.cid7151.Neoplasm),
        (segment.anatomy[0], codes.cid4.Lung),
    ):
        assert (ours.value, ours.scheme, ours.meaning) == (theirs.value, theirs.scheme_designator, theirs.meaning)


def test_a_small_bundle_is_read_and_its_digest_follows_the_weights(bundle):
    first = read_bundle(bundle)
    assert first.spec.name == "ctflow demonstration"
    path = bundle / "models" / "model.pt"
    weights = torch.load(path, weights_only=True)
    next(iter(weights.values())).add_(1)
    torch.save(weights, path)
    assert read_bundle(bundle).weights_digest != first.weights_digest


@pytest.mark.parametrize("key", ["network_def", "preprocessing", "inferer", "postprocessing"])
def test_a_missing_key_is_named_with_its_file(bundle, inference, key):
    del inference[key]
    (bundle / "configs" / "inference.json").write_text(json.dumps(inference))
    with raises_reason(BundleInvalid, "argument", names=("configs/inference.json", f"'{key}'")):
        read_bundle(bundle)


def test_expressions_that_ctflow_does_not_need_are_never_looked_at(inference, metadata):
    needed = {"network_def", "preprocessing", "inferer", "postprocessing", "image_loader", "image_key"}
    for key in set(inference) - {*needed, "network", "evaluator"}:  # these two tell who uses what
        inference[key] = "$open('/tmp/executed', 'w')"
    assert spec_from_documents(inference, metadata, folder_name="x").out_channels == 2


@pytest.mark.parametrize(
    ("network", "said", "reason"),
    [
        (
            {"_target_": "SwinUNETR", "in_channels": 1, "out_channels": "$two()"},
            "network_def#out_channels ",
            "expression",
        ),
        ({"_target_": "SwinUNETR", "in_channels": 2, "out_channels": 2}, "network_def#in_channels ", "inputs"),
        ({"_target_": "SwinUNETR", "in_channels": 1}, "network_def#out_channels ", "value"),
        (
            {"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 2, "spatial_dims": 2},
            "network_def#spatial_dims",
            "value",
        ),
        ({"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 2, "colour": 2}, "network_def#colour", "argument"),
        ({"_target_": "scripts.net.Net"}, "network_def#_target_", "target"),
        ({"_target_": "NoSuchNet"}, "network_def#_target_", "target"),
        ({"_target_": "BasicUNet", "out_channels": 1}, "2 channels", "value"),
        ("$Net()", "network_def ", "expression"),
    ],
)
def test_a_network_that_cannot_be_known_is_refused(inference, metadata, network, said, reason):
    inference["network_def"] = network
    with raises_reason(BundleInvalid, reason, names=("configs/inference.json", said)):
        spec_from_documents(inference, metadata, folder_name="x")


def test_each_channel_of_a_sigmoid_is_a_segment(inference, metadata):
    transforms = inference["postprocessing"]["transforms"]
    transforms[0] = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
    transforms[2] = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.4}
    spec = spec_from_documents(inference, metadata, folder_name="x")
    assert (spec.painted, [s.number for s in spec.segments]) == ((1, 2), [1, 2])
    assert "overlap" in " ".join(spec.notes)
    inference["network_def"] = {"_target_": "BasicUNet", "out_channels": 1}
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "tumour"}
    metadata["segments"][0]["channel"] = 0
    spec = spec_from_documents(inference, metadata, folder_name="x")
    assert spec.painted == ()
    assert (spec.activation, spec.threshold, [s.number for s in spec.segments]) == ("sigmoid", 0.4, [1])


INFERENCE = json.loads((demonstration_bundle() / "configs" / "inference.json").read_text())
METADATA = json.loads((demonstration_bundle() / "configs" / "metadata.json").read_text())
NEEDED = ("network_def", "preprocessing", "inferer", "postprocessing")


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


PLACES = [("inference", (key, *path)) for key in NEEDED for path in places(INFERENCE[key])]
PLACES += [("metadata", path) for path in places(METADATA) if path]
WORDS = ["@network_def", "@inferer::roi_size", "@preprocessing#transforms", "$1", "%x", "_target_", "Spacingd", "RAS"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
KEYS = st.text(max_size=5) | st.sampled_from(
    ["_target_", "_disabled_", "_mode_", "keys", "0", "1", "transforms", "roi_size"]
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_json_in_any_needed_place_ends_as_a_spec_or_bundle_invalid(place, value):
    file, path = place
    documents = {"inference": copy.deepcopy(INFERENCE), "metadata": copy.deepcopy(METADATA)}
    holder = documents[file]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    try:
        spec = spec_from_documents(**documents, folder_name="x")
    except BundleInvalid as error:
        assert len(str(error)) < 1000
        assert "configs/" in str(error)
    else:
        assert isinstance(spec, ModelSpec)
