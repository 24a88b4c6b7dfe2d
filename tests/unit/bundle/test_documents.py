from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctflow.bundle.config.documents import LARGEST_BYTES, document_from_bytes, read_bundle_document
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"x": {"b": 1, "b": 1}}', "'b' occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": 1', "line 1"),
        (b'{\n"a" 1}', "line 2"),
        (b"\xff\xfe", "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "does not contain a JSON object"),
        (b"null", "does not contain a JSON object"),
    ],
)
def test_what_is_not_one_bounded_json_object_is_refused_by_name(raw, said):
    with raises_reason(BundleInvalid, "json", names="configs/x.json") as caught:
        document_from_bytes(raw, "configs/x.json")
    assert said in str(caught.value)


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers(-(10**20), 10**20), st.lists)))
def test_an_ordinary_object_comes_back_as_it_is(value):
    assert document_from_bytes(json.dumps(value).encode(), "x.json") == value


@given(st.binary(max_size=200))
def test_any_bytes_end_as_an_object_or_bundle_invalid(raw):
    try:
        assert isinstance(document_from_bytes(raw, "x.json"), dict)
    except BundleInvalid as error:
        assert "x.json" in str(error)


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metadata.json")
    with raises_reason(BundleInvalid, "unreadable-file", names="metadata.json"):
        read_bundle_document(tmp_path, "metadata.json")


def test_a_missing_an_unreadable_and_an_oversized_file_are_named(tmp_path):
    with raises_reason(BundleInvalid, "missing-file", names="a.json"):
        read_bundle_document(tmp_path, "a.json")
    (tmp_path / "b.json").mkdir()
    with raises_reason(BundleInvalid, "unreadable-file", names="b.json"):
        read_bundle_document(tmp_path, "b.json")
    (tmp_path / "c.json").write_bytes(b" " * (LARGEST_BYTES + 1))
    with raises_reason(BundleInvalid, "unreadable-file", names=("c.json", "4 MB")):
        read_bundle_document(tmp_path, "c.json")
