"""Relative references, against MONAI's parser."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from ctflow.bundle.config import Config
from ctflow.bundle.config.relative import with_whole_references
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

REFERENCE = st.builds(
    lambda sign, levels, mark, name: f"{sign}{mark * levels}{name}",
    st.sampled_from("@%"),
    st.integers(1, 3),
    st.sampled_from(["#", "::"]),
    st.sampled_from(["a", "b#0", "a::b"]),
)
LEAF = REFERENCE | st.builds("$({} + {}) % 3".format, REFERENCE, REFERENCE) | st.just("100% of @a") | st.integers(0, 9)
DOCUMENT = st.dictionaries(
    st.sampled_from("ab"),
    st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner)),
    max_size=2,
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENT)
def test_they_become_the_paths_that_monai_makes_of_them(document):
    given_document = copy.deepcopy(document)

    def expected(value, path):
        if isinstance(value, dict):
            return {key: expected(item, [*path, key]) for key, item in value.items()}
        if isinstance(value, list):
            return [expected(item, [*path, str(number)]) for number, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        try:
            found = ConfigParser.resolve_relative_ids("::".join(path), value)
        except ValueError:  # out of range, which MONAI rejects
            return value
        return value if found == value.replace("#", "::") else found

    assert with_whole_references(document) == expected(document, [])
    assert document == given_document


def test_they_are_followed_from_the_place_where_they_are_written():
    document = {
        "roi": [96, 96, 96],
        "inferer": {"size": "@##roi", "half": "$[n // 2 for n in @#size]", "sizes": ["@###roi", "@#0"]},
    }
    config = Config(document, "inference.json")
    found = config.plain(config.raw("inferer"))
    assert found == {"size": [96] * 3, "half": [48] * 3, "sizes": [[96] * 3, [96] * 3]}


@pytest.mark.parametrize("text", ["@##roi", "$@###roi + [1]"])
def test_one_that_leads_above_the_top_is_refused_where_it_is_needed(text):
    config = Config({"size": text, "roi": [1]}, "inference.json")
    with pytest.raises(BundleInvalid) as caught:
        config.top("size")
    assert caught.value.reason in ("reference", "expression")
    with raises_reason(BundleInvalid, "reference", names="size"):
        Config({"size": "@##roi", "roi": [1]}, "inference.json").top("size")
