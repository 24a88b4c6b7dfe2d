"""docs/viewers.md says what the tests of the viewers recorded, and `--for` chooses what they found right."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from ctflow.settings.run import Settings
from ctflow.settings.viewers import VIEWERS
from orthanc_support import needs_orthanc, ran_alone
from viewer_record import RECORD
from viewer_support import FORMS, SERIES, objects_of, write_series
from viewer_table import PAGE, page_with_tables, summary

DEFAULTS = {each.name: each.default for each in fields(Settings)}


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_the_tables_are_the_records(record):
    text = PAGE.read_text(encoding="utf-8")
    assert text == page_with_tables(text, record), "python tests/viewer_table.py writes them"


def test_a_cell_says_which_series_differ():
    assert summary({}) == "not tried"
    assert summary({"a": "right", "b": "right", "c": "right"}) == "right"
    assert summary({"a": "right", "b": "wrong", "c": "wrong"}) == "right; b: wrong; c: wrong"
    assert summary({"a": "wrong", "b": "wrong"}) == "wrong (a, b)"


def form_of(viewer: str, series: str) -> str:
    """The form that `--for` gives a series' SEG."""
    asked = {"seg": "binary", **{name: word for name, word in VIEWERS[viewer].items() if word != "yes"}}
    given = {name: word for name, word in asked.items() if word != DEFAULTS[name]}
    if series not in ("tilted", "uneven"):
        given.pop("seg_grid", None)
    (form,) = (form for form, options in FORMS.items() if options == given)
    return form


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize(("viewer", "reader"), [("ohif", "OHIF"), ("slicer", "reader dcmqi")])
def test_what_is_chosen_for_a_viewer_is_right_in_every_version(record, viewer, reader, series):
    versions = [name for name in record if name.startswith(reader)]
    assert len(versions) == (3 if viewer == "ohif" else 1)
    for version in versions:
        assert record[version][form_of(viewer, series)][series] == "right", version


def test_a_report_is_right_in_every_version_of_ohif(record):
    for version in (name for name in record if name.startswith("OHIF")):
        assert all(outcome.startswith("right") for outcome in record[version]["report"].values())
        assert set(record[version]["report without findings"].values()) == {"right"}


@pytest.mark.e2e
def test_orthanc_takes_a_label_map_only_if_it_is_told_to(tmp_path):
    needs_orthanc()
    ct = write_series("plain", tmp_path / "ct")
    segs = [objects_of(ct, tmp_path / seg, seg=seg) / "segmentation.dcm" for seg in ("binary", "labelmap")]
    taken = ran_alone(RECORD.parents[2] / "tests" / "orthanc_store.py", tmp_path, *segs, timeout_s=200)
    assert taken == {"as it comes": [True, False], "accepting": [True, True]}
