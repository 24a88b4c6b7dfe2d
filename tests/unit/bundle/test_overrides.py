"""Overrides, against MONAI's own `read_config`."""

from __future__ import annotations

import copy
import itertools
import json
import time

import pytest

from ctflow.bundle.config.documents import merged_document
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

pytestmark = pytest.mark.filterwarnings("ignore:Can't merge entry:UserWarning")  # MONAI's, where it copies instead

BASE = {"a": {"b": [1, {"c": 2}, [3]], "d": {"e": 5}}, "word": "@a", "n": 1}


@pytest.mark.parametrize(
    "overrides",
    [
        {"a#b#0": 7},
        {"a::b::1::c": 7, "a#b#-1#0": 8},
        {"a#new": {"x": 1}, "a#new#x": 2},
        {"+a": {"d": 1, "f": 2}},
        {"+a#b": [4, 5], "a::b::4": 6},
        {"+a#b": [], "+a#d": {}},
        {"+nowhere": [1], "+nowhere2": 3, "++twice": 1},
        {"+a#nowhere": {"x": 1}},
        {"word": {"x": 1}, "word#x": 2},
        {"a#d": None},
    ],
)
def test_overrides_are_applied_as_monai_applies_them(tmp_path, overrides):
    from monai.bundle import ConfigParser  # noqa: PLC0415

    document = {**BASE, **overrides}
    before = copy.deepcopy(document)
    (tmp_path / "x.json").write_text(json.dumps(document))
    expected = ConfigParser.load_config_files(tmp_path / "x.json")
    assert merged_document(document, "x.json") == expected
    assert document == before


@pytest.mark.parametrize(
    "overrides",
    [
        {"nowhere#b": 1},
        {"a#nowhere#b": 1},
        {"a#b#3": 1},
        {"a#b#-4": 1},
        {"a#b#one": 1},
        {"a#b#1#c#x": 1},
        {"word#b": 1},
        {"+a": [1]},
        {"+a#b": {}},
        {"+n": 1},
        {"+nowhere#x": {}},
        {"+a#b#7": 1},
    ],
)
def test_what_monai_cannot_apply_is_rejected_by_its_key(tmp_path, overrides):
    from monai.bundle import ConfigParser  # noqa: PLC0415

    document = {**BASE, **overrides}
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises((KeyError, ValueError, IndexError, TypeError, AttributeError)):
        ConfigParser.load_config_files(tmp_path / "x.json")
    (key,) = overrides
    with raises_reason(BundleInvalid, "override") as caught:
        merged_document(document, "configs/x.json")
    assert caught.value.reason == "override"
    assert str(caught.value).startswith(f"configs/x.json: {key} is an override that MONAI cannot apply")


@pytest.mark.parametrize("key", ["", "+", "a#", "#a", "a##b", "a# d", " a"])
def test_keys_that_mean_another_place_to_monai_than_they_seem_to_are_rejected(key):
    with raises_reason(BundleInvalid, "override", names="x.json") as caught:
        merged_document({**BASE, key: {}}, "x.json")
    assert caught.value.reason == "override"


def test_an_override_comes_after_what_it_changes():
    with raises_reason(BundleInvalid, "override", names=("a#n", "'a'")):
        merged_document({"a#n": 1, **BASE}, "x.json")


def test_many_overrides_of_a_long_list_copy_it_once():
    document = {"a": [0] * 500_000, **{f"a#{n}": 1 for n in range(20_000)}}
    began = time.process_time()
    assert sum(merged_document(document, "configs/inference.json")["a"]) == 20_000
    assert time.process_time() - began < 5  # 40 s, if each override copies the list
    assert sum(document["a"]) == 0


def test_many_ways_to_write_one_addition_copy_the_list_once():
    paths = ["+" + "a" + "".join(f"{by}b" for by in way) for way in itertools.product(("#", "::"), repeat=12)]
    holder = [0] * 500_000
    for _ in range(12):
        holder = {"b": holder}
    document = {"a": holder, **{path: [1] for path in paths}}
    began = time.process_time()
    found = merged_document(document, "configs/inference.json")["a"]
    assert time.process_time() - began < 2  # 4096 copies of the list otherwise
    for _ in range(12):
        found = found["b"]
    assert sum(found) == len(paths)
