from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import jsonschema
import pytest

from ctflow.bundle import read_bundle
from ctflow.core.errors import NotWritten
from ctflow.core.model import NOTHING_MARKED
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline.run import run_folder
from ctflow.report.result import SCHEMA_VERSION, run_result, series_result, write_result
from ctflow.settings.run import Settings
from phantom_support import phantom_drawn_once
from reasons import raises_reason

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

FINDING = {
    "volume_ml": 1.5,
    "longest_diameter_mm": 0.0,
    "long_axis_mm": 0.0,
    "short_axis_mm": 0.0,
    "mean_hu": -31.5,
    "sd_hu": 0.0,
    "centroid_mm": [1.0, -2.0, 3.5],
    "largest_at": [3, 0, 7],
    "outside_body": 0.75,
    "implausible": ["outside-body", "hu-range"],
}
SEGMENT = {
    "number": 1,
    "label": "Tumour",
    "voxels": 12,
    "volume_ml": 1.5,
    "longest_diameter_mm": 4.0,
    "centroid_mm": [1.0, -2.0, 3.5],
    "components": 1,
    "findings": [FINDING],
    "findings_left_out": 0,
    "hu_range": [-700.0, 300.0],
    "implausible": {"findings": 1, "volume_ml": 1.5, "outside_body": 1, "hu_range": 1},
}
EMPTY = {**SEGMENT, "voxels": 0, "volume_ml": 0.0, "longest_diameter_mm": None, "centroid_mm": None}
EMPTY |= {"components": 0, "findings": [], "hu_range": None}
EMPTY["implausible"] = {"findings": 0, "volume_ml": 0.0, "outside_body": 0, "hu_range": 0}
ERROR = {"type": "BrokenSeries", "exit_code": 2, "reason": "gap", "message": "a slice is missing"}
SERIES = {
    "digest": "0" * 12,
    "series_instance_uid": "1.2",
    "slices": 16,
    "shape": [16, 4, 4],
    "spacing_mm": [2.5, 1, 1],
}
ENGINE = {
    "backend": "eager",
    "precision": "fp32",
    "device": "cpu",
    "roi": [64, 64, 64],
    "batch_range": [1, 4],
    "weights_digest": "ab" * 32,
    "out_channels": 2,
    "versions": {"torch": "2.8"},
    "fewest_computed": 1,
}
AGREEMENT = {
    "windows": 4,
    "of": 48,
    "dice": 0.9998,
    "relative_error": 1e-3,
    "judged": "labels",
    "engine": "openvino fp32",
    "reference": "eager fp32",
    "series": "this series",
    "date": "2026-11-29",
    "kept": True,
}

WINDOW = {"roi": [64, 64, 64], "overlap": 0.25, "blend": "gaussian", "batch_size": 4}
OF_BODY = {**WINDOW, "part": "body", "windows": 60, "windows_of_all": 144}


def done(**changes):
    values = {
        "status": "done",
        "series": SERIES,
        "model": {"name": "m", "version": "1", "weights_digest": "ab" * 32},
        "engine": ENGINE,
        "window": WINDOW,
        "settings": asdict(Settings(cache=None)),
        "stage_seconds": {"read": 0.5},
        "segments": [SEGMENT],
        "warnings": [],
        "research_only": None,
        "intended_use": "",
        "folder": "1.2",
        "error": None,
    }
    return series_result(**{**values, **changes})


def refused(**changes):
    nothing = dict.fromkeys(("model", "engine", "window", "settings", "folder"))
    return done(status="refused", **nothing, segments=[], error=ERROR, **changes)


def run_of(*series, **changes):
    values = {"status": "done", "exit_code": 0, "set_aside": [], "unreadable": [], "research_only": None}
    return run_result(series=series, **{**values, **changes})


def valid(document) -> bool:
    return VALIDATOR.is_valid(json.loads(json.dumps(document)))


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["series_result"]["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


MEASURED = {"backend": "eager", "precision": "fp16", "window_seconds": 0.1, "batch": 4, "reason": None}


def test_what_auto_measured_is_in_it():
    assert valid(done(measured=[MEASURED, {**MEASURED, "window_seconds": None, "batch": None, "reason": "no driver"}]))
    assert not valid(done(measured=[{**MEASURED, "batch": 0}]))


def test_every_document_of_the_schemas_kinds_is_valid():
    unread = {**SERIES, "shape": None, "spacing_mm": None}
    assert valid(done())
    assert valid(done(segments=[EMPTY, SEGMENT], research_only="RESEARCH ONLY", warnings=["one"]))
    assert valid(done(window=OF_BODY))
    assert valid(done(window={**WINDOW, "windows_constant": 3}))
    assert valid(done(window={**WINDOW, "constant_windows": "compute"}))
    assert valid(done(agreement=AGREEMENT))
    assert valid(done(agreement={**AGREEMENT, "dice": None, "judged": "logits"}))

    assert valid(refused(series=unread))
    assert valid({**refused(), "status": "failed"})
    set_aside = [{"digest": "0" * 12, "reason": "localizer", "message": "a localizer"}]
    unreadable = [{"file": "a/b.dcm", "reason": "no-header", "message": "no DICOM"}]
    assert valid(run_of(done(), refused(), status="partly", exit_code=6, set_aside=set_aside, unreadable=unreadable))
    assert valid(run_of())


def changed(document, *path_and_value):
    *path, last, value = path_and_value
    document = copy.deepcopy(document)
    inner = document
    for step in path:
        inner = inner[step]
    inner[last] = value
    return document


@pytest.mark.parametrize(
    "document",
    [
        {},
        changed(done(), "extra", 1),
        changed(done(), "schema_version", 2),
        changed(done(), "status", "fine"),
        changed(done(), "error", ERROR),
        changed(done(agreement=AGREEMENT), "agreement", "windows", 0),
        changed(done(agreement=AGREEMENT), "agreement", "of", 0),
        changed(done(agreement=AGREEMENT), "agreement", "date", None),
        changed(done(agreement=AGREEMENT), "agreement", {"dice": 1.0}),
        changed(done(), "engine", None),
        changed(done(), "folder", None),
        changed(done(), "series", "digest", "PATIENT"),
        changed(done(), "series", "shape", [16, 4]),
        changed(done(), "series", "patient_name", "x"),
        changed(done(), "segments", 0, "voxels", 1.5),
        changed(done(), "segments", 0, "findings", 0, "centroid_mm", [1, 2]),
        changed(done(), "window", "overlap", 1.0),
        changed(done(), "window", {key: value for key, value in OF_BODY.items() if key != "windows_of_all"}),
        changed(done(), "window", {**OF_BODY, "part": "head"}),
        changed(done(), "stage_seconds", "read", -1),
        changed(refused(), "error", None),
        changed(refused(), "segments", [SEGMENT]),
        changed(run_of(), "extra", 1),
        changed(run_of(), "exit_code", -1),
        changed(run_of(refused()), "series", 0, "extra", 1),
        {key: value for key, value in done().items() if key != "statement"},
        {key: value for key, value in run_of().items() if key != "unreadable"},
    ],
)
def test_the_schema_is_strict(document):
    assert not valid(document)


def test_an_empty_result_says_that_disease_is_not_excluded():
    assert done(segments=[EMPTY])["statement"] == NOTHING_MARKED
    assert done(segments=[])["statement"] == NOTHING_MARKED
    assert done(segments=[EMPTY, SEGMENT])["statement"] is None
    assert refused()["statement"] is None
    assert "does not exclude disease" in NOTHING_MARKED


def test_a_document_shares_nothing_with_what_it_was_made_from():
    seconds = {"read": 0.5}
    document = done(stage_seconds=seconds)
    seconds["read"] = 9.0
    assert document["stage_seconds"] == {"read": 0.5}


def test_a_document_is_written_as_utf_8_and_read_back(tmp_path):
    document = run_of(done(warnings=["Tumör 肺"]))
    write_result(document, tmp_path / "result.json")
    content = (tmp_path / "result.json").read_bytes()
    assert json.loads(content) == document
    assert "Tumör 肺".encode() in content
    assert content.endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_a_programming_mistake(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_result(done(stage_seconds={"read": value}), tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="result.json"):
        write_result(run_of(), tmp_path / "absent" / "result.json")


def test_what_a_run_writes_is_valid(coarse_bundle, series, tmp_path):
    """A good series, one with a gap, and a file that is no image."""
    folder = tmp_path / "in"
    write_ct_series(phantom_drawn_once(1, (18, 80, 80)).volume, folder / "broken", seed=1)
    (folder / "broken" / "00009.dcm").unlink()
    (folder / "good").symlink_to(series)
    (folder / "notes.dcm").write_text("no image")
    report = run_folder(folder, tmp_path / "out", read_bundle(coarse_bundle), Settings(device="cpu", cache=None))
    files = sorted((tmp_path / "out").rglob("result.json"))
    assert len(files) == 2
    for file in files:
        VALIDATOR.validate(json.loads(file.read_text()))
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert report.exit_code == document["exit_code"] == 6
    assert {entry["status"] for entry in document["series"]} == {"done", "refused"}
