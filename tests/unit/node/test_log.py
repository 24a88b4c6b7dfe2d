from __future__ import annotations

import io
import json
import logging
import threading

import pytest

from ctflow.core.errors import NotWritten
from ctflow.node import log as node_log
from ctflow.node.log import AUDIT, AuditTrail, close_node_log, set_up_node_log, told_forever
from ctflow.node.settings.groups import Log
from node_support import Ward, loggers_kept
from reasons import raises_reason


@pytest.fixture
def restored():
    with loggers_kept():
        yield


@pytest.fixture
def ward(tmp_path):
    ward = Ward(tmp_path / "node")
    yield ward
    ward.close()


def lines_of(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_is_one_json_object(restored):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    logging.getLogger("ctflow.x").info("two\nlines %s", '"quoted" é')
    logging.getLogger("ctflow.x").debug("not shown")
    (line,) = lines_of(stream)
    assert line["message"] == 'two\nlines "quoted" é'
    assert (line["level"], line["logger"]) == ("info", "ctflow.x")
    assert line["time"].endswith("Z")


def test_an_error_is_told_by_kind_and_place_and_never_by_its_text(restored):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    name = "^".join(["Doe", "Jane"])  # source lines are told, values are not
    try:
        raise ValueError(name)
    except ValueError:
        logging.getLogger("ctflow").exception("it failed")
    (line,) = lines_of(stream)
    assert name not in stream.getvalue()
    assert line["error"].endswith("ValueError")
    assert "test_log.py" in line["error"]


def test_libraries_that_quote_data_sets_are_silent_at_every_level(restored):
    stream = io.StringIO()
    set_up_node_log(Log(level="debug"), stream)
    logging.getLogger("pynetdicom.acse").critical("Doe^Jane")
    logging.getLogger("pydicom").critical("Doe^Jane")
    assert stream.getvalue() == ""


def test_the_audit_trail_is_written_at_every_level(restored, ward, tmp_path):
    stream = io.StringIO()
    set_up_node_log(Log(level="error"), stream)
    logging.getLogger("ctflow.x").warning("not shown")
    ward.receive("1")
    assert AuditTrail(ward.journal, tmp_path / "told").tell() == 1
    assert [line["level"] for line in lines_of(stream)] == ["audit"]


def test_a_file_is_turned_over_and_old_ones_go(restored, tmp_path):
    file = tmp_path / "logs" / "node.jsonl"
    handler = set_up_node_log(Log(file=file, rotate_at=10_000, keep=2))
    for number in range(400):
        logging.getLogger("ctflow").info("line %d", number)
    close_node_log(handler)
    assert sorted(path.name for path in file.parent.iterdir()) == ["node.jsonl", "node.jsonl.1", "node.jsonl.2"]
    assert all(path.stat().st_size <= 10_000 for path in file.parent.iterdir())
    assert json.loads(file.read_text().splitlines()[-1])["message"] == "line 399"


def test_a_file_that_cannot_be_opened_is_named(restored, tmp_path):
    (tmp_path / "file").touch()
    with raises_reason(NotWritten, "unwritable"):
        set_up_node_log(Log(file=tmp_path / "file" / "node.jsonl"))


def test_who_sent_what_and_which_model_answered_is_told(restored, ward, tmp_path):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    key = ward.delivered("7", 5)
    trail = AuditTrail(ward.journal, tmp_path / "told")
    trail.tell()
    told = lines_of(stream)
    assert [line["event"] for line in told] == ["received", "complete", "running", "done", "sent", "sent", "delivered"]
    assert [line["event_id"] for line in told] == list(range(1, 8))
    series = ward.journal.find(key)
    for line in told:
        assert (line["series"], line["calling_ae"], line["instances"]) == (series.digest, "ORTHANC", 5)
    assert told[0]["peer"] == "10.1.2.3"
    done = told[3]
    assert (done["model"], done["model_version"], done["seconds"]) == ("lung tumour", "1.0", 7.2)
    assert done["weights"] == "ab" * 32
    assert series.series_uid not in stream.getvalue()


def test_the_trail_goes_on_where_an_earlier_process_ended(restored, ward, tmp_path):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    ward.receive("1")
    AuditTrail(ward.journal, tmp_path / "told").tell()
    ward.receive("2")  # and the process ends before it is told
    again = AuditTrail(ward.journal, tmp_path / "told")
    assert again.tell() == 1
    assert again.tell() == 0
    assert len({line["event_id"] for line in lines_of(stream)}) == 2


@pytest.mark.parametrize("content", [b"", b"many", b"-5", b"\xff", b"1" * 30, b"2"])
def test_a_position_that_is_damaged_or_of_another_journal_starts_over(restored, ward, tmp_path, content):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    (tmp_path / "told").write_bytes(content)
    ward.receive("1")
    assert AuditTrail(ward.journal, tmp_path / "told").tell() == 1
    assert len(lines_of(stream)) == 1


def test_a_position_that_cannot_be_kept_loses_no_line(restored, ward, tmp_path):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    ward.receive("1")
    trail = AuditTrail(ward.journal, tmp_path / "none" / "told")
    with raises_reason(NotWritten, "unwritable"):
        trail.tell()
    with raises_reason(NotWritten, "unwritable"):
        trail.tell()
    assert len(lines_of(stream)) == 1


def test_a_thread_tells_what_happens_while_it_happens_and_at_the_end(restored, ward, tmp_path):
    stream, told = io.StringIO(), threading.Event()
    handler = set_up_node_log(Log(), stream)
    handler.addFilter(lambda record: told.set() or True)
    changed = threading.Event()
    ward.journal.on_change(changed.set)
    ward.receive("1")
    with told_forever(AuditTrail(ward.journal, tmp_path / "told"), changed):
        assert told.wait(30)
        told.clear()
        ward.receive("2")
        assert told.wait(30)
        ward.receive("3")
    assert [line["event_id"] for line in lines_of(stream)] == [1, 2, 3]


def test_a_failure_of_the_thread_does_not_end_it(restored, ward, tmp_path, monkeypatch):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    trail = AuditTrail(ward.journal, tmp_path / "told")
    tell, failed = trail.tell, threading.Event()

    def fail_once():
        if not failed.is_set():
            failed.set()
            raise OSError("full")
        return tell()

    monkeypatch.setattr(trail, "tell", fail_once)
    changed = threading.Event()
    with told_forever(trail, changed):
        assert failed.wait(30)
        ward.receive("1")
    assert {line["message"] for line in lines_of(stream)} == {"the audit trail could not be written", "from ORTHANC"}


def test_times_are_told_in_utc_to_the_millisecond():
    assert node_log._iso(1_770_000_000.25) == "2026-02-02T02:40:00.250Z"
    assert AUDIT > logging.INFO


def test_a_long_trail_is_read_in_pages_and_told_in_order(restored, ward, tmp_path, monkeypatch):
    stream = io.StringIO()
    set_up_node_log(Log(), stream)
    for number in range(8):
        ward.journal.event("note", f"note {number}")
    asked, read = [], ward.journal.events_after
    monkeypatch.setattr(node_log, "_PAGE", 4)
    monkeypatch.setattr(
        ward.journal, "events_after", lambda after, limit: asked.append(limit) or read(after, limit=limit)
    )
    assert AuditTrail(ward.journal, tmp_path / "told").tell() == 8
    assert [line["message"] for line in lines_of(stream)] == [f"note {number}" for number in range(8)]
    assert asked == [4, 4, 4]
