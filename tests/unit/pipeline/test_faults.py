"""A fault that one series meets ends that series, by name, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import pytest

from ctflow.cli import inspection
from ctflow.core.entry_point import exit_code_of, show_tracebacks
from ctflow.core.errors import EXIT_PARTLY, EXIT_UNEXPECTED
from ctflow.dicom.read import scan
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select import selection
from ctflow.dicom.write import source
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline import segmenter, stages, write
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from dicom_support import selection_of, small_volume
from marking_support import MarkingSegmenter, marking_model

# In this process, where a stage can be replaced.
SETTINGS = Settings(device="cpu", cache=None, report="none", cases_in_flight=1)
STAGES = [
    "assemble_series",
    "sources_from_headers",
    "segmentation_from_labels",
    "measure_segments",
    "write_picture",
    "report_from_measurements",
    "publish_folder",
]


@pytest.fixture
def folder(tmp_path):
    """Two good series."""
    for seed in (1, 2):
        write_ct_series(small_volume(seed=seed), tmp_path / "in" / str(seed), seed=seed)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def schema(request):
    return json.loads((request.config.rootpath / "docs" / "result.schema.json").read_text())


@pytest.fixture(autouse=True)
def _marks(monkeypatch):
    monkeypatch.setattr(segmenter, "Segmenter", MarkingSegmenter)


def failing(function: Callable, calls: int) -> Callable:
    """The function, whose first calls raise what nobody foresees, with a patient's name in it."""
    left = [calls]

    def maybe(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("Doe^John")
        return function(*arguments, **options)

    return maybe


@pytest.mark.parametrize("stage", STAGES)
def test_an_unexpected_error_of_any_stage_is_that_series_own_failure(
    folder, tmp_path, monkeypatch, caplog, stage, schema
):
    place = {"assemble_series": stages, "sources_from_headers": source}.get(stage, write)
    monkeypatch.setattr(place, stage, failing(getattr(place, stage), 1))
    report = run_folder(folder, tmp_path / "out", marking_model(), SETTINGS)
    assert report.exit_code == EXIT_PARTLY
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    jsonschema.validate(document, schema)
    failed, done = document["series"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert (failed["error"]["type"], failed["error"]["reason"]) == ("Unexpected", "unexpected")
    assert failed["error"]["exit_code"] == EXIT_UNEXPECTED
    assert failed["series"]["digest"] in failed["error"]["message"]
    assert "unexpected ValueError" in failed["error"]["message"]
    assert "Doe" not in caplog.text + json.dumps(document)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name == report.cases[0].key]


def test_where_nothing_else_happened_the_exit_code_is_that_of_an_unexpected_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "assemble_series", failing(stages.assemble_series, 2))
    assert run_folder(folder, tmp_path / "out", marking_model(), SETTINGS).exit_code == EXIT_UNEXPECTED


def test_the_log_shows_where_if_it_is_asked_to_and_never_the_text(folder, tmp_path, monkeypatch, caplog):
    model = marking_model()
    for shown in (False, True):
        if shown:
            show_tracebacks()
        monkeypatch.setattr(stages, "assemble_series", failing(stages.assemble_series, 1))
        caplog.clear()
        run_folder(folder, tmp_path / f"out{shown}", model, SETTINGS)
        assert ("in load_case" in caplog.text or "in stage" in caplog.text) is shown
        assert "Doe^John" not in caplog.text.replace('raise ValueError("Doe^John")', "")


def test_a_series_that_cannot_be_judged_is_set_aside_by_name_and_the_others_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "describe", failing(selection.describe, 1))
    report = run_folder(folder, tmp_path / "out", marking_model(), SETTINGS)
    assert report.exit_code == EXIT_PARTLY
    assert [entry["reason"] for entry in report.document["set_aside"]] == ["unexpected"]
    assert [entry["status"] for entry in report.document["series"]] == ["done"]


def test_where_no_series_can_be_judged_the_run_ends_as_unexpected(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "describe", failing(selection.describe, 2))
    said: list[str] = []
    code = exit_code_of(
        lambda: run_folder(folder, tmp_path / "out", marking_model(), SETTINGS).exit_code, say=said.append
    )
    assert code == EXIT_UNEXPECTED
    assert said[0].startswith("Unexpected [unexpected]: no series can be segmented: ")


def test_a_file_that_no_parser_foresaw_is_unreadable_and_the_others_are_read(folder, monkeypatch):
    class Odd(Exception):
        pass

    def fail(*_arguments, **_options):
        monkeypatch.undo()
        raise Odd("Doe^John")

    monkeypatch.setattr(scan, "_instance_of_file", fail)
    found = scan_folder(folder)
    assert [file.reason for file in found.unreadable] == ["unexpected"]
    assert len(found.instances) == 31


def test_inspect_names_the_fault_of_one_series_and_shows_the_others(folder, monkeypatch):
    monkeypatch.setattr(inspection, "stack_of_series", failing(inspection.stack_of_series, 1))
    failed, shown = inspection.inspect_folder(folder)["series"]
    assert (failed["selected"], failed["reason"]) == (False, "unexpected")
    assert "Doe" not in failed["message"]
    assert shown["selected"]
    assert shown["geometry"]


def test_a_selection_knows_which_series_failed(folder, monkeypatch):
    assert selection_of(folder).failed == ()
    monkeypatch.setattr(selection, "describe", failing(selection.describe, 1))
    (failed,) = selection_of(folder).failed
    assert failed.reason == "unexpected"
