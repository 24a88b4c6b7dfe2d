"""Searches of the journal, and the hours of the last day."""

from __future__ import annotations

import pytest

from ctflow.core.volume import digest_of_uid
from ctflow.node.journal.records import Why
from ctflow.node.journal.search import SeriesSearch
from node_support import PATIENT, Ward


@pytest.fixture
def ward(tmp_path):
    ward = Ward(tmp_path / "node", patient_data=True)
    ward.receive("1", calling_ae="ORTHANC", peer="10.1.2.3", patient=PATIENT)
    ward.clock.now += 4000
    ward.receive("2", calling_ae="SCAN_1", peer="10.9.2.3", study_uid="1.2.9")
    yield ward
    ward.close()


def found(ward, *args, **search) -> list[str]:
    return [each.series_uid.removeprefix("1.2.") for each in ward.journal.series(SeriesSearch(*args, **search))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("orth", ["1"]),
        ("10.9", ["2"]),
        ("0.9", []),  # an address is searched from its beginning
        (digest_of_uid("1.2.1")[:5].upper(), ["1"]),
        (digest_of_uid("1.2.9"), ["2"]),
        ("doe^j", ["1"]),
        ("pid-4711", ["1"]),
        ("A-99", ["1"]),
        ("%", []),  # no pattern
        ("N_1", ["2"]),
        ("NX1", []),
        ("\\", []),
        ("'; DROP TABLE series; --", []),
        ("", ["2", "1"]),
    ],
)
def test_a_text_is_searched_for_as_it_is(ward, text, expected):
    assert found(ward, text=text) == expected


def test_conditions_are_joined(ward):
    assert found(ward, since=ward.clock.now - 3600) == ["2"]
    assert found(ward, study=digest_of_uid("1.2.3")) == ["1"]
    assert found(ward, ("received",), text="orthanc", study=digest_of_uid("1.2.9")) == []
    assert found(ward, ("delivered",)) == []


def test_a_reason_is_found(ward):
    ward.journal.set_aside(ward.journal.series()[0].key, Why("gap", "slices are 5 mm apart"))
    assert found(ward, text="5 MM") == found(ward, text="gap") == ["2"]


def test_the_last_day_has_24_hours_with_what_each_brought(tmp_path):
    ward = Ward(tmp_path / "other")
    ward.done("1")
    begun = ward.clock.now
    ward.clock.now += 2 * 3600
    ward.done("2")
    job = ward.run("3")
    ward.journal.set_aside(job.key, Why("gap", "a gap"))
    day = ward.journal.last_day(ward.clock.now)
    assert [hour["at"] % 3600 for hour in day] == [0] * 24
    assert day[-1]["at"] <= ward.clock.now < day[-1]["at"] + 3600
    assert (day[-1]["good"], day[-1]["other"]) == (1, 1)
    (first,) = [hour for hour in day[:-1] if hour["good"] or hour["other"]]
    assert first["at"] <= begun < first["at"] + 3600
    assert not any(hour["good"] for hour in ward.journal.last_day(ward.clock.now + 25 * 3600))
    ward.close()
