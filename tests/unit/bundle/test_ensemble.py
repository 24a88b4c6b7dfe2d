"""Reading bundles of several networks; agreement with MONAI is in tests/e2e/test_ensemble.py."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ctflow.bundle import read_bundle, read_spec
from ctflow.bundle.config import Config
from ctflow.bundle.config.ensemble import ensemble_from_config
from ctflow.bundle.workflow import Checkpoint, read_workflow
from ctflow.cli.inspect_model import inspect_model
from ctflow.core.errors import BundleInvalid
from ctflow.networks.build import network_from_model
from ensemble_bundles import ENSEMBLES, ensemble, mean_of_logits, vote_of_labels, written_ensemble
from reasons import raises_reason

BY_NAME = {bundle.name: bundle for bundle in ENSEMBLES}
MEAN = BY_NAME["mean_of_probabilities"]


def config_of(document):
    return Config(document, "configs/inference.json")


def changed(folder, change):
    path = folder / "configs" / "inference.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


@pytest.fixture
def folder(tmp_path):
    return written_ensemble(tmp_path / "bundle", MEAN)


def items(document):
    return {item["_target_"]: item for item in document["postprocessing"]["transforms"]}


@pytest.mark.parametrize(
    ("name", "members", "combined", "channels"),
    [
        ("mean_of_logits", 3, "logits", 4),
        ("weighted_mean_of_logits", 3, "logits", 1),
        ("mean_of_probabilities", 3, "probabilities", 12),
        ("vote_of_labels", 3, "votes", 12),
        ("vote_of_masks", 4, "votes", 4),
    ],
)
def test_members_and_what_is_combined_of_them(tmp_path, name, members, combined, channels):
    model = read_bundle(written_ensemble(tmp_path / name, BY_NAME[name]))
    network = model.spec.network
    assert (network.members, network.combined, model.spec.out_channels) == (members, combined, channels)
    assert {key.split(".")[0] for key in model.weights} == {str(number) for number in range(members)}
    with torch.inference_mode():
        logits = network_from_model(model)(torch.zeros(1, 1, 32, 32, 32))
    assert logits.shape == (1, channels, 32, 32, 32)
    assert any(f"an ensemble of {members} networks" in note for note in model.spec.notes)


def test_weights_of_the_mean_belong_to_networks_and_not_to_the_order_of_keys(tmp_path):
    spec = read_spec(written_ensemble(tmp_path / "b", BY_NAME["weighted_mean_of_logits"]))
    assert spec.network.shares == pytest.approx((0.1 / 1.65, 0.6 / 1.65, 0.95 / 1.65))


def test_the_identity_covers_every_checkpoint_and_how_they_are_combined(folder):
    digests = {read_bundle(folder).weights_digest}
    for number in range(3):
        path = folder / "models" / f"fold{number}.pt"
        saved = torch.load(path, weights_only=True)
        saved["model"]["model.0.conv.unit0.conv.bias"] += 1e-3
        torch.save(saved, path)
        digests.add(read_bundle(folder).weights_digest)
    changed(folder, lambda document: items(document)["MeanEnsembled"].update(weights=[3, 1, 3]))
    digests.add(read_bundle(folder).weights_digest)
    changed(folder, lambda document: document["postprocessing"]["transforms"].reverse())
    changed(folder, lambda document: document["postprocessing"].update(transforms=mean_of_logits_after()))
    digests.add(read_bundle(folder).weights_digest)
    assert len(digests) == 6


def mean_of_logits_after():
    return mean_of_logits()["postprocessing"]["transforms"]


def test_one_network_is_a_model_like_any_other(tmp_path):
    folder = written_ensemble(tmp_path / "b", BY_NAME["vote_of_labels"])

    def one(document):
        document["networks"] = ["@network_1"]
        document["handlers"] = document["handlers"][1:2]
        document["evaluator"]["pred_keys"] = "pred"
        kept = [item | {"keys": "pred"} for item in document["postprocessing"]["transforms"]]
        document["postprocessing"]["transforms"] = [each for each in kept if each["_target_"] != "VoteEnsembled"]

    model = read_bundle(changed(folder, one))
    assert (model.spec.network.members, model.spec.out_channels) == (1, 4)
    assert not [note for note in model.spec.notes if "ensemble" in note]
    assert "model.0.conv.unit0.conv.bias" in model.weights


def test_inspect_model_shows_the_members(folder):
    found = inspect_model(folder)
    assert found["runs"]
    parts = {part["part"]: part["what"] for part in found["parts"]}
    assert parts["network_def"].startswith("3 x UNet (")
    for number in range(3):
        assert f"file models/fold{number}.pt, key model" in parts["evaluator, dataset, checkpoint"]
    assert "combined probabilities" in parts["postprocessing"]
    assert any("shares 0.5, 0.167, 0.333" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("networks", "made_at"),
    [
        (["@network_0", "$@network_1.to(@device).eval()"], ("network_0", "network_1")),
        ("@networks", ("networks#0", "network_1")),
        ("$[@network_0, torch.compile(@network_1)]", ("network_0", "network_1")),
        (["$copy.deepcopy(@network_def)", "@network_def"], ("evaluator#networks#0", "network_def")),
        (["$@networks[0]", "@networks#1"], ("networks#0", "network_1")),
    ],
)
def test_networks_are_found_where_monai_makes_them(networks, made_at):
    document = ensemble([], channels=2, count=2)
    document["networks"] = ["$copy.deepcopy(@network_def)", "@network_1"]
    document["evaluator"]["networks"] = networks
    found = ensemble_from_config(config_of(document))
    assert tuple(member.made_at for member in found.members) == made_at
    assert found.keys == ("pred_0", "pred_1")
    assert all(member.definition.value["_target_"] == "UNet" for member in found.members)


def test_every_network_has_its_own_checkpoint():
    document = vote_of_labels()
    document["handlers"].reverse()
    expected = tuple(Checkpoint(f"models/fold{number}.pt", "model") for number in range(3))
    assert read_workflow(config_of(document)) == expected


EVALUATOR_FAULTS = [
    ({"networks": []}, "evaluator#networks", "value"),
    ({"networks": [f"@network_{number % 3}" for number in range(60)]}, "evaluator#networks", "value"),
    ({"networks": ["@network_0", "@network_1", "$@network_0.to('cpu')"]}, "evaluator#networks#2", "workflow"),
    ({"networks": "$[copy.deepcopy(@network_def) for _ in range(3)]"}, "evaluator#networks", "expression"),
    ({"networks": "@network_0"}, "evaluator#networks", "expression"),
    ({"networks": ["@network_0", "@network_1", "$load(@network_2)"]}, "evaluator#networks#2", "expression"),
    ({"networks": ["@network_0", "@network_1", "@nowhere"]}, "evaluator#networks#2", "reference"),
    ({"networks": ["@network_0", "@network_1", 3]}, "evaluator#networks#2", "expression"),
    ({"networks": ["@network_0", "@network_1"]}, "evaluator#pred_keys", "keys"),
    ({"pred_keys": ["a", "b"]}, "evaluator#pred_keys", "keys"),
    ({"pred_keys": ["a", "b", "a"]}, "evaluator#pred_keys", "keys"),
    ({"pred_keys": ["a", "b", "image"]}, "evaluator#pred_keys", "keys"),
    ({"pred_keys": ["a", "b", 3]}, "evaluator#pred_keys", "keys"),
    ({"colour": 1}, "evaluator#colour", "argument"),
    ({"mode": "train"}, "evaluator#mode", "value"),
    ({"inferer": "@postprocessing"}, "evaluator#inferer", "workflow"),
]


@pytest.mark.parametrize(("arguments", "key", "reason"), EVALUATOR_FAULTS)
def test_an_evaluator_that_is_not_understood_is_refused_by_key(folder, arguments, key, reason):
    changed(folder, lambda document: document["evaluator"].update(arguments))
    for allow_code in (False, True):
        with raises_reason(BundleInvalid, reason, names=key) as caught:
            read_bundle(folder, allow_code=allow_code)
        assert "--allow-code lets" not in str(caught.value)


POST_FAULTS = [
    ("MeanEnsembled", {"keys": "pred_0"}, "#keys", "keys"),
    ("MeanEnsembled", {"keys": ["pred_0", "pred_1"]}, "#keys", "keys"),
    ("MeanEnsembled", {"keys": ["pred_0", "pred_1", "image"]}, "#keys", "keys"),
    ("MeanEnsembled", {"output_key": None}, "#output_key", "keys"),
    ("MeanEnsembled", {"output_key": "image"}, "#output_key", "keys"),
    ("MeanEnsembled", {"weights": [1, 2]}, "#weights", "value"),
    ("MeanEnsembled", {"weights": 2}, "#weights", "value"),
    ("MeanEnsembled", {"weights": [[1] * 4] * 3}, "#weights", "value"),
    ("MeanEnsembled", {"weights": [1, -2, 1]}, "#weights", "value"),
    ("MeanEnsembled", {"weights": [0, 0, 0]}, "#weights", "value"),
    ("MeanEnsembled", {"weights": [1, 1, True]}, "#weights", "value"),
    ("MeanEnsembled", {"weights": [1e300, 1, 1]}, "#weights", "value"),
    ("MeanEnsembled", {"_target_": "VoteEnsembled", "weights": 1}, "#weights", "argument"),
    ("MeanEnsembled", {"allow_missing_keys": True}, "#allow_missing_keys", "argument"),
    ("Activationsd", {"keys": ["pred_0", "pred_1"]}, "#keys", "keys"),
    ("Activationsd", {"sigmoid": [True, False, False], "softmax": False}, "#sigmoid", "value"),
]


@pytest.mark.parametrize(("target", "arguments", "key", "reason"), POST_FAULTS)
def test_postprocessing_of_an_ensemble_that_is_not_understood_is_refused_by_key(folder, target, arguments, key, reason):
    changed(folder, lambda document: items(document)[target].update(arguments))
    with raises_reason(BundleInvalid, reason, names=("postprocessing#transforms#", key)):
        read_bundle(folder)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(folder, weight):
    changed(folder, lambda document: items(document)["MeanEnsembled"].update(weights=[1, weight, 1]))
    with raises_reason(BundleInvalid, "json"):
        read_bundle(folder)
    (folder / "configs" / "inference.json").rename(folder / "configs" / "inference.yaml")
    with pytest.raises(BundleInvalid):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("name", "order", "said"),
    [
        ("vote_of_labels", [0, 2, 1, 4], "VoteEnsembled, but comes before AsDiscreted"),
        ("vote_of_labels", [0, 1, 3, 2, 4], "but comes before VoteEnsembled"),
        ("mean_of_probabilities", [0, 2, 3], "keys"),
    ],
)
def test_an_order_without_a_meaning_is_refused(tmp_path, name, order, said):
    folder = written_ensemble(tmp_path / "b", BY_NAME[name])

    def reorder(document):
        given = document["postprocessing"]["transforms"]
        document["postprocessing"]["transforms"] = [given[number] for number in order]
        for item in document["postprocessing"]["transforms"]:
            if said == "keys" or "Keep" in item["_target_"]:
                item["keys"] = ["pred_0", "pred_1", "pred_2"]

    with pytest.raises(BundleInvalid, match="Ensembled"):
        read_bundle(changed(folder, reorder))


@pytest.mark.parametrize(
    ("name", "given", "fits"),
    [
        ("vote_of_labels", 4, True), ("vote_of_labels", 5, True), ("vote_of_labels", 3, False),
        ("vote_of_labels", None, False), ("vote_of_masks", 2, True), ("vote_of_masks", 1, False),
    ],
)  # fmt: skip
def test_votes_are_counted_only_with_the_number_of_classes(tmp_path, name, given, fits):
    folder = written_ensemble(tmp_path / "b", BY_NAME[name])
    changed(folder, lambda document: items(document)["VoteEnsembled"].update(num_classes=given))
    if fits:
        assert read_spec(folder).network.combined == "votes"
    else:
        with raises_reason(BundleInvalid, "value", names="VoteEnsembled with num_classes"):
            read_spec(folder)


LOADER = {"_target_": "CheckpointLoader", "load_path": "models/fold0.pt", "load_dict": {"model": "@network_0"}}
LOADER_FAULTS = [
    (lambda given: given[:2], "evaluator#networks#2 has no weights"),
    (lambda _: [], "evaluator#networks#0 has no weights"),
    (lambda given: [*given, LOADER], "has weights of another loader"),
    (lambda given: [*given[:2], LOADER | {"load_dict": {"model": "@network_def_2"}}], None),
    (lambda given: [*given[:2], LOADER | {"load_dict": {"model": "@network_def"}}], "refers to '@network_def'"),
    (lambda given: [*given[:2], LOADER | {"load_dict": {"model": "@other"}}], "is not in evaluator#networks"),
    (lambda given: [*given[:2], LOADER | {"load_dict": {}}], "load_dict names no network"),
    (lambda given: [*given[:2], LOADER | {"load_dict": "$make()"}], "expression"),
    (lambda given: [*given[:2], LOADER | {"load_path": "$find('model.pt')"}], "load_path names no file"),
]


@pytest.mark.parametrize(("change", "said"), LOADER_FAULTS)
def test_loaders_that_do_not_fit_the_networks_are_refused(folder, change, said):
    def load(document):
        document["handlers"] = change(document["handlers"])
        document["other"] = document["network_def_0"]

    changed(folder, load)
    if said is None:  # the object of a network's own definition is the network
        assert read_bundle(folder).spec.network.members == 3
    else:
        with pytest.raises(BundleInvalid, match=said):
            read_bundle(folder)


def test_a_checkpoint_that_is_missing_is_named(folder):
    (folder / "models" / "fold1.pt").unlink()
    with raises_reason(BundleInvalid, "missing-file", names="models/fold1.pt"):
        read_bundle(folder)


def test_a_file_of_several_networks_must_have_the_key_of_each(tmp_path):
    folder = written_ensemble(tmp_path / "b", BY_NAME["vote_of_masks"])
    saved = torch.load(folder / "models" / "all.pt", weights_only=True)
    torch.save({**saved, "net2": 1, "model": saved["net2"]}, folder / "models" / "all.pt")
    with raises_reason(BundleInvalid, "weights", names=("models/all.pt", "'net2'")):
        read_bundle(folder)


def test_weights_of_another_network_are_named(folder):
    path = folder / "models" / "fold2.pt"
    saved = torch.load(path, weights_only=True)
    del saved["model"]["model.0.conv.unit0.conv.bias"]
    torch.save(saved, path)
    with raises_reason(BundleInvalid, "weights-mismatch", names=("ensemble", "2.model.0.conv.unit0.conv.bias")):
        network_from_model(read_bundle(folder))


def test_networks_that_differ_in_more_than_weights_are_refused(folder):
    changed(folder, lambda document: document["network_def_1"].update(num_res_units=1))
    with raises_reason(BundleInvalid, "value", names=("evaluator#networks#1", "monai.bundle run")):
        read_bundle(folder)


def test_networks_of_own_code_are_refused(folder):
    (folder / "scripts").mkdir()
    (folder / "scripts" / "__init__.py").write_text("class Net:\n    def __init__(self, in_channels): ...\n")

    def change(document):
        for number in range(3):
            document[f"network_def_{number}"] = {"_target_": "scripts.Net", "in_channels": 1}

    changed(folder, change)
    for allow_code in (False, True):
        with raises_reason(BundleInvalid, "target", names=("evaluator#networks#1", "monai.bundle run")):
            read_bundle(folder, allow_code=allow_code)


def test_torchscript_is_refused(folder):
    (folder / "models" / "fold1.pt").rename(folder / "models" / "fold1.ts")
    for allow_code in (False, True):
        with raises_reason(BundleInvalid, "torchscript", names="models/fold1.ts"):
            read_bundle(folder, allow_code=allow_code)


@pytest.mark.parametrize("allow_code", [False, True])
def test_what_only_monai_can_do_with_an_ensemble_says_what_runs_it(folder, allow_code):
    smooth = {"_target_": "GaussianSmoothd", "keys": "image"}
    changed(folder, lambda document: document["preprocessing"]["transforms"].append(smooth))
    with raises_reason(
        BundleInvalid, "target", names=("GaussianSmoothd", "--allow-code does not change that", "monai.bundle run")
    ):
        read_bundle(folder, allow_code=allow_code)
