"""OUT/result.json says what becomes of a run from its first moment on, whatever ends it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from ctflow.core.errors import BrokenSeries, BundleInvalid, NotWritten, StorageFull
from ctflow.report import run_record
from ctflow.report.run_record import error_facts, recorded_run, supersede_result
from reasons import raises_reason

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())


def said(output: Path) -> dict:
    document = json.loads((output / "result.json").read_text())
    jsonschema.validate(document, SCHEMA)
    return document


def test_while_a_run_lasts_its_document_says_so_and_not_what_an_earlier_run_said(tmp_path):
    (tmp_path / "result.json").write_text('{"status": "done"}')
    with recorded_run(tmp_path):
        assert (said(tmp_path)["status"], said(tmp_path)["exit_code"]) == ("running", None)


@pytest.mark.parametrize(
    ("error", "status", "facts"),
    [
        (BundleInvalid("no weights", reason="weights"), "failed", ("BundleInvalid", 3, "weights", "no weights")),
        (BrokenSeries("a slice is missing", reason="gap"), "failed", ("BrokenSeries", 2, "gap", "a slice is missing")),
        (
            KeyboardInterrupt(),
            "interrupted",
            ("KeyboardInterrupt", 130, "interrupted", "the run was interrupted: run it again"),
        ),
        (
            ValueError("DOE^JANE"),
            "failed",
            ("Unexpected", 70, "unexpected", "unexpected ValueError, a bug in ctflow: --debug shows where"),
        ),
    ],
    ids=["model", "reason", "interrupt", "unexpected"],
)
def test_what_ends_a_run_is_in_its_document(tmp_path, error, status, facts):
    with pytest.raises(type(error)), recorded_run(tmp_path / "new" / "out"):
        raise error
    document = said(tmp_path / "new" / "out")
    assert (document["status"], document["exit_code"]) == (status, facts[1])
    assert tuple(document["error"].values()) == facts
    assert document["error"] == error_facts(error)


def test_of_two_that_record_one_run_the_outer_one_does(tmp_path):
    with recorded_run(tmp_path) as record:
        (tmp_path / "result.json").write_text("what the run wrote")
        with recorded_run(tmp_path, record) as inner:
            assert inner is record
    assert (tmp_path / "result.json").read_text() == "what the run wrote"


def test_what_is_known_of_the_series_is_said_where_the_run_ends_early(tmp_path):
    with pytest.raises(KeyboardInterrupt), recorded_run(tmp_path) as record:
        record.describe = lambda error: {"described": error["reason"]}
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "result.json").read_text()) == {"described": "interrupted"}


def test_an_output_that_cannot_be_written_ends_the_run_before_it_begins(tmp_path):
    (tmp_path / "out").write_text("a file")
    with raises_reason(NotWritten, "unwritable"), recorded_run(tmp_path / "out"):
        pytest.fail("the run has begun")


def test_a_full_disk_leaves_no_document_of_an_earlier_run(tmp_path, monkeypatch):
    def full(*_):
        raise StorageFull("no space left")

    (tmp_path / "result.json").write_text('{"status": "done"}')
    monkeypatch.setattr(run_record, "write_result", full)
    with raises_reason(StorageFull, "disk-full"), recorded_run(tmp_path):
        pytest.fail("the run has begun")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_running_and_the_first_error(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise StorageFull("no space left")

    with raises_reason(BundleInvalid, "weights"), recorded_run(tmp_path):
        monkeypatch.setattr(run_record, "write_result", full)
        raise BundleInvalid("no weights", reason="weights")
    assert said(tmp_path)["status"] == "running"
    assert "StorageFull [disk-full]: no space left" in caplog.text


def test_a_result_that_cannot_be_moved_aside_is_told_of(tmp_path, monkeypatch, caplog):
    def refused(_):
        raise NotWritten("it cannot be written", reason="unwritable")

    assert supersede_result(tmp_path, "1.2.3-abc", "0" * 12) == ("", True)
    monkeypatch.setattr(run_record, "supersede_folder", refused)
    remark, is_moved = supersede_result(tmp_path, "1.2.3-abc", "0" * 12)
    assert not is_moved
    assert "could not be moved: it cannot be written" in remark
    assert "series 000000000000" in caplog.text
    assert "1.2.3" not in caplog.text
