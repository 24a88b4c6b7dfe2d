from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctflow.node.journal.records import STATES, EventRecord, Patient, SeriesRecord
from ctflow.node.web import views

NOW = 1_770_000_000.0
SERIES = SeriesRecord(
    key="ab" * 16, revision=1, previous=None, state="complete", reason=None, message=None, calling_ae="ORTHANC",
    peer="10.1.2.3", modality="CT", first_at=NOW - 60, last_at=NOW - 30, expected_instances=None,
    instances=275, bytes=145_000_000,
    duplicates=0, refused=0, attempts=0, next_at=0.0, series_uid="1.2.3.4", study_uid="1.2.3",
    patient=Patient("Doe^Jane", "4711", "19500102", "A-99"),
)  # fmt: skip


def series(**changed) -> SeriesRecord:
    return dataclasses.replace(SERIES, **changed)


def test_every_state_of_the_journal_has_a_word():
    assert set(views.STATES) == set(STATES)
    assert len({shown.label for shown in views.STATES.values()}) == len(STATES)


@given(st.text(max_size=2000))
def test_a_senders_text_is_one_line_that_can_be_drawn(text):
    shown = views.plain(text)
    assert shown.isprintable()
    assert len(shown) <= 501
    assert text[:500].isprintable() is False or shown.startswith(text[:500])


def test_a_change_of_direction_is_marked():
    assert views.plain("CT\u202egnp.exe") == "CT\ufffdgnp.exe"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (99, "99 s"),
        (120, "2 min"),
        (5999, "100 min"),
        (7200, "2 h"),
        (172_799, "48 h"),
        (864_000, "10 days"),
    ],
)
def test_a_span_has_one_unit(seconds, expected):
    assert views.duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 kB"),
        (526_000, "526 kB"),
        (8_900_000, "8.9 MB"),
        (145_000_000, "145 MB"),
        (1.25e9, "1.2 GB"),
        (3e12, "3.0 TB"),
    ],
)
def test_a_size_has_two_or_three_digits(count, expected):
    assert views.byte_size(count) == expected


def test_a_time_says_its_day_only_if_it_is_another():
    assert len(views.moment(NOW - 5, NOW).short) == len("12:00:00")
    assert views.moment(NOW - 5, NOW).ago == "5 s ago"
    assert views.moment(NOW + 5, NOW).ago == "now"
    assert views.moment(NOW - 5 * 86400, NOW).short[:2].isdigit()
    assert "2024" in views.moment(NOW - 700 * 86400, NOW).short


def test_the_patient_is_a_fact_only_if_that_is_switched_on():
    facts = dict(views.facts(SERIES, {}, NOW, patient_data=False))
    for value in ("Doe^Jane", "4711", "19500102", "A-99", "1.2.3.4"):
        assert value not in str(facts)
    facts = dict(views.facts(SERIES, {}, NOW, patient_data=True))
    assert (facts["Patient ID"], facts["Series UID"]) == ("4711", "1.2.3.4")


def test_a_series_says_what_is_missing_and_when_it_is_tried_again():
    waits = series(message="DeviceOutOfMemory: x", next_at=NOW + 45)
    assert views.reason(waits, NOW) == "DeviceOutOfMemory: x; again in 45 s"
    assert views.retry_label(waits, NOW) == "Try now"
    for count, words in ((2, "2 instances were"), (1, "1 instance was")):
        refused = series(state="received", refused=count)
        assert views.reason(refused, NOW) == f"{words} refused and must be sent again"
    assert views.reason(series(), NOW) is None
    assert views.reason(series(state="running", message="DeviceOutOfMemory: x"), NOW) is None


def test_only_what_can_be_tried_again_has_a_button():
    assert {state for state in STATES if views.retry_label(series(state=state), NOW)} == {"aside", "dead", "discarded"}


def event(kind, at) -> EventRecord:
    return EventRecord(1, at, kind, SERIES.key, None, "text")


EVENTS = [event("running", NOW - 5), event("complete", NOW - 10), event("received", NOW - 60)]


@pytest.mark.parametrize(
    ("state", "has_result", "tones"),
    [
        ("received", False, ["now", "todo", "todo", "todo", "todo"]),
        ("complete", False, ["past", "now", "todo", "todo", "todo"]),
        ("running", False, ["past", "past", "now", "todo", "todo"]),
        ("done", True, ["past", "past", "past", "past", "todo"]),
        ("delivered", True, ["past", "past", "past", "past", "past"]),
        ("aside", False, ["past", "past", "past", "stopped", "todo"]),
        ("dead", True, ["past", "past", "past", "past", "stopped"]),
    ],
)
def test_a_way_shows_what_is_behind_and_where_it_stopped(state, has_result, tones):
    steps = views.steps(series(state=state), EVENTS, NOW, has_result=has_result)
    assert [step.tone for step in steps] == tones
    assert [step.here for step in steps].count(True) == 1


def test_a_series_that_was_set_aside_before_it_was_complete_stopped_there():
    steps = views.steps(series(state="aside"), EVENTS[2:], NOW, has_result=False)
    assert [step.tone for step in steps] == ["past", "stopped", "todo", "todo", "todo"]
    assert steps[0].at.ago == "60 s ago"
    assert steps[1].at is None


def test_a_segment_without_a_mark_has_no_measures():
    empty = {"label": "Tumour", "components": 0, "voxels": 0, "volume_ml": 0.0, "longest_diameter_mm": None}
    (shown,) = views.segment_rows([empty])
    assert (shown.findings, shown.volume, shown.diameter) == ("0", "-", "-")
