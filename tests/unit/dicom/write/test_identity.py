from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctflow.dicom.write.identity import digest_of_mask, instance_uid, series_uid, uid_from_parts

SETTINGS = {"overlap": 0.25, "blend": "gaussian", "batch_size": 4, "fold": True, "roi": None}


def of(sources=("1.2", "1.3"), weights="aa", version="0.1.0", settings=SETTINGS, mask="bb") -> str:
    return instance_uid(sources, weights, version, settings, mask)


@given(st.lists(st.text(max_size=80), max_size=5))
def test_every_uid_is_valid(parts):
    uid = uid_from_parts(*parts)
    assert uid.is_valid
    assert uid.startswith("2.25.")
    assert len(uid) <= 64
    assert int(uid.split(".")[2]) >> 76 & 0xF == 5, "RFC 9562 version 5"


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_only_the_same_parts_give_the_same_uid(one, other):
    assert (uid_from_parts(*one) == uid_from_parts(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), (("a", "b"), ("b", "a")), (("a", ""), ("a",)), (('a", "b',), ("a", "b"))],
)
def test_borders_and_order_of_parts_matter(one, other):
    assert uid_from_parts(*one) != uid_from_parts(*other)


def test_uids_do_not_change_between_versions():
    """Objects already delivered keep their identity: a failure here needs a reason in the changelog."""
    assert uid_from_parts("a", "b") == "2.25.229689428425318008464540733317408206118"


def test_order_of_sources_and_settings_does_not_matter():
    assert of(sources=("1.2", "1.3")) == of(sources=iter(("1.3", "1.2")))
    assert of() == of(settings=dict(reversed(SETTINGS.items())))


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ("1.2",)},
        {"sources": ("1.2", "1.3", "1.3")},
        {"sources": ("1.21", "1.3")},
        {"weights": "ab"},
        {"version": "0.1.1"},
        {"mask": "bc"},
        {"settings": {**SETTINGS, "overlap": 0.5}},
        {"settings": {**SETTINGS, "blend": "constant"}},
        {"settings": {**SETTINGS, "batch_size": 1}},
        {"settings": {**SETTINGS, "fold": False}},
        {"settings": {**SETTINGS, "fold": "true"}},
        {"settings": {**SETTINGS, "roi": "None"}},
        {"settings": {**SETTINGS, "new": None}},
        {"settings": {}},
    ],
)
def test_whatever_changes_the_result_changes_its_uid(change):
    assert of(**change) != of()


def test_a_series_belongs_to_source_model_version_kind_and_instance():
    parts = ("1.2", "model", "1", "SEG", "1.3")
    uids = {series_uid(*parts)}
    for index in range(5):
        uids.add(series_uid(*(part + "0" if i == index else part for i, part in enumerate(parts))))
    assert len(uids) == 6
    assert series_uid(*parts) == series_uid(*parts)


def test_the_digest_depends_on_shape_and_values_and_not_on_memory_order():
    labels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    changed = labels.copy()
    changed[1, 1, 1] += 1
    assert digest_of_mask(labels) != digest_of_mask(labels.reshape(3, 2, 4))
    assert digest_of_mask(labels) != digest_of_mask(changed)
    assert digest_of_mask(labels) == digest_of_mask(np.asfortranarray(labels))
    assert digest_of_mask(labels) != digest_of_mask(labels[::-1])
    assert len(digest_of_mask(labels)) == 64
