from __future__ import annotations

import pytest

from ctflow.bundle.config import MOST_REFERENCES, Component, Config, ConfigValue, short
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

FILE = "configs/inference.json"


def plain(**document):
    config = Config(document, FILE)
    return config.plain(config.top("x"))


def test_references_lead_through_keys_and_lists_with_both_separators():
    assert plain(x=["@a::b::1", "@a#b#0"], a={"b": ["@c", 7]}, c=5) == [7, 5]


def test_a_number_sign_in_a_text_is_what_monai_makes_of_it():
    assert plain(x="a#b") == "a::b"


def test_words_that_only_contain_the_signs_are_words():
    assert plain(x=["a@b", "1$", ""]) == ["a@b", "1$", ""]


@pytest.mark.parametrize(
    ("document", "said", "reason"),
    [
        ({"x": "@y", "y": "@z", "z": "@y"}, "x ", "reference"),
        ({"x": "@y", "y": "$make(1)"}, "'$make(1)'", "expression"),
        ({"x": ["@y"], "y": ["@x"]}, "x#0", "value"),
        ({"x": "@y::0", "y": "@z", "z": [1]}, "'@y::0'", "reference"),
        ({"x": "@y::7", "y": [1]}, "x ", "reference"),
        ({"x": "@y::" + "9" * 5000, "y": [1]}, "x ", "reference"),
        ({"x": "@"}, "x ", "reference"),
        ({"x": "@y::²", "y": [1]}, "x ", "reference"),
        ({"x": "@y-1", "y-1": 1}, "x ", "reference"),
        ({"x": "@##y", "y": 1}, "x ", "reference"),
        ({"x": "a@##y", "y": 1}, "x ", "reference"),
        ({"x": {"a#b": 1}}, "x#a#b ", "override"),
        ({"x": {"_target_": "os.system"}}, "x ", "value"),
        ({}, "'x'", "argument"),
    ],
)
def test_a_value_that_cannot_be_known_is_refused(document, said, reason):
    with raises_reason(BundleInvalid, reason, names=(FILE, said)):
        plain(**document)


def test_a_long_chain_and_references_that_multiply_end():
    chain = {f"r{i}": f"@r{i + 1}" for i in range(MOST_REFERENCES + 1)}
    with raises_reason(BundleInvalid, "reference", names="x follows"):
        plain(x="@r0", **chain)
    bomb = {f"b{i}": [f"@b{i + 1}"] * 20 for i in range(15)}
    with raises_reason(BundleInvalid, "value", names="x#0"):
        plain(x="@b0", b15=1, **bomb)


def test_deep_and_long_values_are_short_in_messages():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert len(short(deep)) <= 80
    assert len(short("x" * 10_000)) <= 80
    assert short(10**5000) == "a huge number"
    assert len(short(list(range(1000)) * 10)) <= 80


def test_a_component_needs_a_target_of_its_package():
    config = Config({}, FILE)
    with raises_reason(BundleInvalid, "target", names="x "):
        Component(config, ConfigValue("x", []), "monai.inferers")
    with raises_reason(BundleInvalid, "target", names=("x#_target_", "os.system", "monai.inferers")):
        Component(config, ConfigValue("x", {"_target_": "os.system"}), "monai.inferers")
