from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ctflow.bundle import read_bundle
from ctflow.bundle.config.documents import document_from_yaml
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

BOMB = "a: &a [0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

DOUBLED = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
PAIRS = "a: !!pairs [k: " + "[" * 9 + "1" + "".join(f", &r{n} [1]" + f", *r{n}" * 9 + "]" for n in range(9)) + "]\n"
MERGED = b"""
one: &one {x: 1, y: [2, 3]}
two: &two {x: 4, z: 5}
both: {<<: [*one, *two], y: 6}
first: {<<: *one, <<: *two}
numbers: [0x1F, 0b101, 017, 1:30, 1_000, 1.5e+3, 1:30.5, -3, +2, .5]
words: [yes, Off, ~, null, !!str 3, ! 4, "on", !!int "7", 1e3]
"""


def test_yaml_is_read_as_the_json_that_it_stands_for():
    text = b'a: &x [1, 2.5, true, null, text]\nb: {c: *x}\nd: "$@a"\n'
    found = document_from_yaml(text, "configs/inference.yaml")
    assert found == {"a": [1, 2.5, True, None, "text"], "b": {"c": [1, 2.5, True, None, "text"]}, "d": "$@a"}


def test_merged_keys_and_odd_numbers_are_what_monais_loader_makes_of_them():
    assert document_from_yaml(MERGED, "a.yaml") == yaml.safe_load(MERGED)


PARTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=5), PARTS, max_size=4), st.booleans())
def test_any_document_is_what_monais_loader_makes_of_it(document, is_flow):
    shared = {"a": document, "b": [document, document]}  # as an anchor and its aliases
    text = yaml.safe_dump(shared, default_flow_style=is_flow, allow_unicode=True)
    assert document_from_yaml(text.encode("utf-8", "surrogatepass"), "a.yaml") == yaml.safe_load(text)


@given(st.text("ab01:-?[]{}&*!<>|%\"'\\Ux#,. \n=~_", max_size=60))
def test_any_text_is_an_object_or_named(text):
    try:
        assert isinstance(document_from_yaml(text.encode(), "a.yaml"), dict)
    except BundleInvalid as error:
        assert error.reason == "json"


@pytest.mark.parametrize(
    "text",
    [
        b"a: 1\na: 2",
        b"1: a",
        b"a: !!python/object/apply:os.system [x]",
        b"a: 2020-01-01",
        b"a: .inf",
        b"a: .nan",
        b"- 1",
        b"a: [",
        b"\xff",
        b"a: \x01",
        b"a: &a [*a]",
        BOMB.encode(),
        b"a: " + b"[" * 3000 + b"]" * 3000,
        b'a: !!int ""',
        b"a: !!float '-'",
        b"a: !!bool maybe",
        b"a: !!null [1]",
        b"a: !!timestamp 1",
        b"a: !!set {b}",
        b"a: !!omap [b: 1]",
        b"a: !!pairs [b: 1]",
        b"a: !!binary a",
        b"a: =",
        b"? [a]\n: 1",
        b"a: {<<: 3}",
        b"a: &a {<<: *a}",
        b"a: 1" + b":1" * 80_000,
        b"a: 0x" + b"f" * 6000,
        b"a: [1" + b"0" * 30 + b"]",
        b'a: "\\UFFFFFFFF"',
        b"a: {" + b"k: 1, " * 50_000 + b"}",
        DOUBLED.encode(),
        PAIRS.encode(),
    ],
)
def test_what_json_could_not_hold_is_rejected(text):
    with raises_reason(BundleInvalid, "json", names="configs/inference.yaml"):
        document_from_yaml(text, "configs/inference.yaml")


def test_configurations_are_chosen_by_name_and_merged_in_order(bundle, inference):
    configs = bundle / "configs"
    expected = read_bundle(bundle)
    (configs / "inference.json").unlink()
    (configs / "inference.yaml").write_text(yaml.safe_dump(inference, sort_keys=False))
    assert read_bundle(bundle).spec == expected.spec
    (configs / "small.json").write_text(json.dumps({"inferer#roi_size": [32, 32, 64], "+inferer": {"overlap": 0.5}}))
    spec = read_bundle(bundle, "inference.yaml,small.json").spec
    assert (spec.roi, spec.overlap) == ((32, 32, 64), 0.5)
    with raises_reason(BundleInvalid, "missing-file", names=("other.yaml", "small.json")):
        read_bundle(bundle, "other.yaml")
    with raises_reason(BundleInvalid, "missing-file"):
        read_bundle(bundle, "../../etc/passwd.json")
