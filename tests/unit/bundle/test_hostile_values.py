"""Values that a configuration may have and no honest one has: each ends in a named error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ctflow.bundle.config import Config, ConfigValue, short
from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.expressions.lambdas import line_of_lambda, threshold_of_lambda
from ctflow.bundle.expressions.values import NotUnderstood
from ctflow.bundle.inferer import sliding_from_config
from ctflow.bundle.read import read_bundle, spec_from_documents
from ctflow.bundle.workflow import read_workflow
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": [96, 96, 96]}


@pytest.fixture
def files(tmp_path):
    torch.save(torch.tensor([1, 2]), tmp_path / "t.pt")
    torch.save(torch.zeros(1).expand(40_000_000), tmp_path / "wide.pt")
    return BundleFiles(tmp_path)


@pytest.mark.parametrize(
    "name", ["mode", "padding_mode", "_requires_", "_mode_", "_disabled_", "overlap", "cval", "_target_"]
)
def test_an_array_is_a_list_of_numbers_wherever_it_is_given(files, name):
    config = Config({"inferer": {**WINDOWS, name: "$torch.load('t.pt')"}}, "f.json", files)
    with raises_reason(BundleInvalid, "target" if name == "_target_" else "value", names=f"inferer#{name}"):
        sliding_from_config(config)


def test_an_array_of_any_size_is_one_for_other_expressions_and_no_list(files):
    document = {
        "a": "$torch.load('wide.pt')",
        "b": "$@a[3]",
        "c": "$[@a, torch.load('t.pt')]",
        "d": "$torch.load('t.pt')",
    }
    config = Config(document, "f.json", files)
    assert config.plain(config.raw("d")) == [1, 2]
    assert config.plain(ConfigValue("b", "$@d[1]")) == 2
    for key in ("a", "c"):
        with raises_reason(BundleInvalid, "expression", names=key):
            config.plain(config.raw(key))


@pytest.mark.parametrize("value", ["${1: 2}", "${True: 2}", "$[{'a': {1: 2}}]"])
def test_a_key_that_is_no_word_is_named(value):
    config = Config({"a": value}, "f.json")
    with raises_reason(BundleInvalid, "value", names="is no word"):
        config.plain(config.raw("a"))


def test_an_objects_key_that_is_no_word_is_named(inference, metadata):
    with raises_reason(BundleInvalid, "value", names=("network_def", "1")):
        spec_from_documents({**inference, "network_def": "${'_target_': 'UNet', 1: 2}"}, metadata, folder_name="x")


@pytest.mark.parametrize("text", ["$(-8) ** 0.5", "$(-1) ** 0.1 + 1"])
def test_a_complex_number_is_no_value(text):
    config = Config({"a": text}, "f.json")
    with raises_reason(BundleInvalid, "expression", names="**"):
        config.plain(config.raw("a"))


@pytest.mark.parametrize("function", [line_of_lambda, threshold_of_lambda])
@pytest.mark.parametrize(
    "text",
    [
        "lambda x: " + "+".join(["x"] * 1900),
        "lambda x: f(" + "+".join(["x"] * 1900) + ")",
        "lambda x: x > " + "-" * 1900 + "1",
        "lambda x=" + "+".join(["1"] * 1900) + ": x",
    ],
)
def test_a_function_of_many_terms_is_not_understood(function, text):
    with pytest.raises(NotUnderstood):
        function(text)


def test_a_value_in_few_characters_for_any_number():
    assert short([16**6000, {"a": -(10**5000)}]) == "[a huge number, {'a': a huge number}]"
    assert short(16**6000) == "a huge number"


@pytest.mark.parametrize("path", [["models/low.pt"], 3, True, {"a": 1}, "$torch.load('t.pt')"])
def test_a_checkpoint_whose_path_is_no_text_is_not_another_one(files, path):
    loader = {"_target_": "CheckpointLoader", "load_path": path}
    with raises_reason(BundleInvalid, "workflow", names=("load_path", "names no file")):
        read_workflow(Config({"handlers": [loader]}, "f.json", files))


def test_a_switch_that_is_an_array_is_one(files):
    loader = {"_target_": "CheckpointLoader", "load_path": "models/low.pt", "_disabled_": "$torch.load('t.pt')"}
    (checkpoint,) = read_workflow(Config({"handlers": [loader]}, "f.json", files))
    assert checkpoint.file == "models/model.pt"


@pytest.mark.parametrize("indices", [[0, "1", "2", "3"], [0, 1, 2], [0, True, 2, 3], ["0", 1, 2, 3], [0, [1], 2, 3]])
def test_an_order_of_axes_is_of_whole_numbers(inference, metadata, indices):
    inference["preprocessing"]["transforms"].append({"_target_": "Transposed", "keys": "image", "indices": indices})
    with raises_reason(BundleInvalid, "value", names="indices"):
        spec_from_documents(inference, metadata, folder_name="x")


def test_chains_of_deep_expressions_are_named(bundle):
    path = bundle / "configs" / "inference.json"
    document = json.loads(path.read_text())
    chain = {f"a{n}": "$" + "0+(" * 36 + f"@a{n + 1}" + ")" * 36 for n in range(30)}
    document["inferer"]["overlap"] = "@a0"
    path.write_text(json.dumps({**document, **chain, "a30": 0.5}))
    with raises_reason(BundleInvalid, "expression", names="inferer#overlap"):
        read_bundle(bundle)


def test_arrays_of_the_bundles_own_files_are_still_what_expressions_index(tmp_path):
    torch.save({"code": np.eye(2)}, tmp_path / "a.pt")
    config = Config({"a": "$torch.load('a.pt')", "b": "$@a['code'][1]"}, "f.json", BundleFiles(tmp_path))
    assert config.plain(config.raw("b")) == [0, 1]
    assert config.plain(config.raw("a")) == {"code": [[1, 0], [0, 1]]}
