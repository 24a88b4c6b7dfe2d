from __future__ import annotations

import pytest

from ctflow.bundle.config import MOST_REFERENCES, Component, Config, Place, short
from ctflow.core.errors import BundleInvalid

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
    ("document", "said"),
    [
        ({"x": "@y", "y": "@z", "z": "@y"}, "x is a reference that leads back to itself"),
        ({"x": "@y", "y": "$1 + 1"}, "x is an expression (by '@y'), '$1 + 1'"),
        ({"x": ["@y"], "y": ["@x"]}, "nested too deeply"),
        ({"x": "@y::0", "y": "@z", "z": [1]}, "refers to '@y::0', which is not in the file"),
        ({"x": "@y::7", "y": [1]}, "not in the file"),
        ({"x": "@y::" + "9" * 5000, "y": [1]}, "not in the file"),
        ({"x": "@"}, "is no reference that ctflow follows"),
        ({"x": "@y::²", "y": [1]}, "not in the file"),
        ({"x": "@y-1", "y-1": 1}, "is no reference that ctflow follows"),
        ({"x": "@##y", "y": 1}, "is no reference that ctflow follows"),
        ({"x": "a@#y", "y": 1}, "holds a relative reference"),
        ({"x": {"a#b": 1}}, "x#a#b has a separator in its name"),
        ({"x": {"_target_": "os.system"}}, "x is an object to be made"),
        ({}, "has no key 'x'"),
    ],
)
def test_a_value_that_cannot_be_known_is_refused(document, said):
    with pytest.raises(BundleInvalid) as caught:
        plain(**document)
    assert FILE in str(caught.value)
    assert said in str(caught.value)


def test_a_long_chain_and_references_that_multiply_end():
    chain = {f"r{i}": f"@r{i + 1}" for i in range(MOST_REFERENCES + 1)}
    with pytest.raises(BundleInvalid, match="follows more than 32 references"):
        plain(x="@r0", **chain)
    bomb = {f"b{i}": [f"@b{i + 1}"] * 20 for i in range(15)}
    with pytest.raises(BundleInvalid, match="nested too deeply or too large"):
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
    with pytest.raises(BundleInvalid, match="x must be an object"):
        Component(config, Place("x", []), "monai.inferers")
    with pytest.raises(BundleInvalid, match="x#_target_ is 'os.system'; ctflow takes classes of monai.inferers only"):
        Component(config, Place("x", {"_target_": "os.system"}), "monai.inferers")
