from __future__ import annotations

import json

import pytest
import yaml

from ctflow.bundle import read_bundle
from ctflow.bundle.config.documents import document_from_yaml
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

BOMB = "a: &a [0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_yaml_is_read_as_the_json_that_it_stands_for():
    text = b'a: &x [1, 2.5, true, null, text]\nb: {c: *x}\nd: "$@a"\n'
    found = document_from_yaml(text, "configs/inference.yaml")
    assert found == {"a": [1, 2.5, True, None, "text"], "b": {"c": [1, 2.5, True, None, "text"]}, "d": "$@a"}


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
