"""A folder as a destination, beyond what every destination promises (tests/contract/test_destinations.py)."""

from __future__ import annotations

import json

import pytest

from ctflow.cohort.destinations import folder as folder_module
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.marker import outcome_of_mark
from ctflow.cohort.outcome import MarkName, RowOutcome
from ctflow.core.errors import NotWritten

FINGERPRINT = "0123456789ab"
OUTCOME = RowOutcome("a.b-1", FINGERPRINT, "done", "done", "", 0, 1, 1.5, digest="ab")


@pytest.fixture
def destination(tmp_path):
    with FolderDestination(tmp_path / "out", "whole") as entered:
        yield entered


def workspace_with(destination, text: str, row_id: str = OUTCOME.id):
    folder = destination.workspace(row_id)
    (folder / "series").mkdir()
    (folder / "series" / "segmentation.dcm").write_text(text)
    (folder / "result.json").write_text("{}")
    return folder


def test_a_committed_row_is_listed_by_its_name_alone(destination, tmp_path):
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    (tmp_path / "out" / "rows" / ".half.json").touch()
    (tmp_path / "out" / "rows" / "notes.txt").touch()
    assert list(destination.marks()) == [MarkName("a.b-1", FINGERPRINT, "done")]
    assert (tmp_path / "out" / "results" / "a.b-1" / "series" / "segmentation.dcm").read_text() == "x"
    mark = json.loads((tmp_path / "out" / "rows" / f"a.b-1.{FINGERPRINT}.done.json").read_text())
    assert (mark["id"], mark["status"], mark["attempt"], mark["seconds"]) == ("a.b-1", "done", 1, 1.5)


def test_a_destination_is_read_without_entering_it(destination, tmp_path):
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    reading = FolderDestination(tmp_path / "out", "report")
    assert list(reading.marks()) == [OUTCOME.name]
    assert outcome_of_mark(reading, OUTCOME.name) == OUTCOME
    assert reading.read("results/a.b-1/series/segmentation.dcm") == b"x"
    assert reading.read("results/none/preview.png") is None
    assert reading.read("results/a.b-1/result.json/preview.png") is None
    (tmp_path / "page").write_text("page")
    reading.keep(tmp_path / "page", "cohort.html")
    assert (tmp_path / "out" / "cohort.html").read_text() == "page"


def test_a_result_that_another_process_renames_at_the_same_time_is_replaced(destination, tmp_path, monkeypatch):
    original, calls = folder_module.publish_folder, []

    def disturbed(folder, final):
        calls.append(folder)
        if len(calls) < 3:
            raise NotWritten("no", reason="unwritable")
        original(folder, final)

    monkeypatch.setattr(folder_module, "publish_folder", disturbed)
    destination.commit(workspace_with(destination, "x"), OUTCOME)
    assert [mark.id for mark in destination.marks()] == [OUTCOME.id]


def test_of_two_that_speak_at_the_same_time_one_is_first(tmp_path, monkeypatch):
    original = folder_module.write_result

    def overtaken(document, path):
        original({"model": "other"}, tmp_path / "cohort.json")
        original(document, path)

    monkeypatch.setattr(folder_module, "write_result", overtaken)
    with FolderDestination(tmp_path, "whole") as destination:
        assert destination.agree({"model": "a"}) == {"model": "other"}


def test_what_a_killed_process_left_is_removed_and_the_work_of_a_running_one_is_not(tmp_path):
    left = tmp_path / ".work" / "part-2-of-3" / "run" / "row"
    left.mkdir(parents=True)
    (left / "half").touch()
    with FolderDestination(tmp_path, "part-1-of-2") as running:
        (running.workspace("r") / "half").touch()
        with FolderDestination(tmp_path, "part-2-of-2"):
            assert not (tmp_path / ".work" / "part-2-of-3").exists()
            assert len(list(tmp_path.glob(".work/part-1-of-2/*/r~/half"))) == 1
    assert not [each for each in (tmp_path / ".work").iterdir() if each.is_dir()]


def test_a_destination_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotWritten), FolderDestination(tmp_path / "out", "whole"):
        pytest.fail("a file is no folder")
