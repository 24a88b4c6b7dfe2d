"""What an earlier run left never looks like a result of this one: not a folder, not the run's document."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from ctflow.bundle import read_bundle
from ctflow.core.atomic import SUPERSEDED
from ctflow.core.errors import BackendUnavailable, NotWritten, NoUsableSeries
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline import documents, run
from ctflow.pipeline.case import find_cases, key_of_series, without_arrays
from ctflow.pipeline.run import run_folder
from ctflow.report import run_record
from ctflow.settings.run import Settings
from phantom_support import phantom_drawn_once
from reasons import raises_reason

SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())
SETTINGS = Settings(device="cpu", cache=None)


@pytest.fixture(scope="module")
def model(coarse_bundle):
    return read_bundle(coarse_bundle)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for seed in (1, 2):
        write_ct_series(phantom_drawn_once(seed, (17, 32, 32)).volume, folder / str(seed), seed=seed)
    return folder


@pytest.fixture
def two(written, tmp_path) -> Path:
    """Two small series that can be run."""
    return Path(shutil.copytree(written, tmp_path / "in"))


def earlier(output: Path, key: str) -> Path:
    """What an earlier run left of a series."""
    (output / key).mkdir(parents=True)
    (output / key / "segmentation.dcm").write_text("old")
    (output / "result.json").write_text('{"status": "done"}')
    return output / key


def make_too_short(series: Path) -> None:
    for name in ("00000.dcm", "00001.dcm"):
        (series / name).unlink()


def said(output: Path) -> dict:
    document = json.loads((output / "result.json").read_text())
    jsonschema.validate(document, SCHEMA)
    return document


def shown(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def superseded(output: Path, key: str, number: int = 1) -> str:
    return (output / SUPERSEDED / f"{key}-{number}" / "segmentation.dcm").read_text()


def test_a_series_that_is_refused_leaves_no_earlier_result_in_place(model, two, tmp_path):
    keys = [case.key for case in find_cases(two, model.spec, SETTINGS).cases]
    for number in ("1", "2"):
        (two / number / "00009.dcm").unlink()
    for number in (1, 2):  # the second run moves to the next number
        earlier(tmp_path / "out", keys[0])
        assert run_folder(two, tmp_path / "out", model, SETTINGS).exit_code == 2
        assert superseded(tmp_path / "out", keys[0], number) == "old"
    assert shown(tmp_path / "out") == [SUPERSEDED, "result.json"]
    document = said(tmp_path / "out")
    assert (document["status"], document["exit_code"], document["error"]) == ("failed", 2, None)
    assert [entry["status"] for entry in document["series"]] == ["refused", "refused"]
    assert [["moved to .superseded" in each for each in entry["warnings"]] for entry in document["series"]] == [
        [True],
        [],
    ]


def test_a_series_that_is_set_aside_leaves_no_earlier_result_in_place(model, two, tmp_path):
    keys = [case.key for case in find_cases(two, model.spec, SETTINGS).cases]
    for number in ("1", "2"):
        make_too_short(two / number)
    earlier(tmp_path / "out", keys[1])
    with raises_reason(NoUsableSeries, "none-eligible"):
        run_folder(two, tmp_path / "out", model, SETTINGS)
    assert superseded(tmp_path / "out", keys[1]) == "old"
    assert shown(tmp_path / "out") == [SUPERSEDED, "result.json"]
    document = said(tmp_path / "out")
    assert (document["status"], document["exit_code"], document["series"]) == ("failed", 2, [])
    assert document["error"]["reason"] == "none-eligible"
    assert [entry["reason"] for entry in document["set_aside"]] == ["too-few-slices"] * 2
    assert ["moved to .superseded" in entry["message"] for entry in document["set_aside"]] == [False, True]


def test_a_series_that_was_not_asked_for_keeps_its_result(model, two, tmp_path):
    keys = [case.key for case in find_cases(two, model.spec, SETTINGS).cases]
    earlier(tmp_path / "out", keys[0])
    with raises_reason(NoUsableSeries, "none-eligible"):
        run_folder(two, tmp_path / "out", model, replace(SETTINGS, series="1.2.3"))
    assert shown(tmp_path / "out") == [keys[0], "result.json"]
    assert said(tmp_path / "out")["status"] == "failed"


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda folder: folder.mkdir(), "no-dicom"), (lambda _: None, "not-a-folder")],
    ids=["empty", "absent"],
)
def test_an_input_without_a_series_is_in_the_document(model, tmp_path, make, reason):
    make(tmp_path / "in")
    earlier(tmp_path / "out", "1.2.3-of-another-input")
    with raises_reason(NoUsableSeries, reason):
        run_folder(tmp_path / "in", tmp_path / "out", model, SETTINGS)
    assert said(tmp_path / "out")["error"]["reason"] == reason
    assert shown(tmp_path / "out") == ["1.2.3-of-another-input", "result.json"]


def test_an_engine_that_cannot_be_opened_fails_every_series(model, two, tmp_path):
    keys = [case.key for case in find_cases(two, model.spec, SETTINGS).cases]
    earlier(tmp_path / "out", keys[0])
    with raises_reason(BackendUnavailable, "no-such-device"):
        run_folder(two, tmp_path / "out", model, replace(SETTINGS, device="cuda:7"))
    assert superseded(tmp_path / "out", keys[0]) == "old"
    document = said(tmp_path / "out")
    assert (document["status"], document["exit_code"]) == ("failed", 4)
    assert [entry["error"] for entry in document["series"]] == [document["error"]] * 2


def test_an_interrupt_is_said_and_leaves_results_of_what_was_done_alone(model, two, tmp_path, monkeypatch):
    first, second = find_cases(two, model.spec, SETTINGS).cases
    output = tmp_path / "out"
    for each in (first, second):
        earlier(output, each.key)
    seen = []

    def segment_case(case, *_):
        seen.append(json.loads((output / "result.json").read_text())["status"])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return case

    done = documents._failed_document(
        first, model.spec, run_record.error_facts(NotWritten("a stand-in", reason="unwritable"))
    )
    monkeypatch.setattr(run, "segment_case", segment_case)
    monkeypatch.setattr(
        "ctflow.pipeline.write.write_case", lambda case, *_: replace(without_arrays(case), document=done)
    )
    with pytest.raises(KeyboardInterrupt):
        run_folder(two, output, model, replace(SETTINGS, cases_in_flight=1))
    assert seen == ["running", "running"]
    document = said(output)
    assert (document["status"], document["exit_code"]) == ("interrupted", 130)
    assert document["series"][0] == done
    assert document["series"][1]["error"]["reason"] == "interrupted"
    assert shown(output) == [SUPERSEDED, first.key, "result.json"]
    assert superseded(output, second.key) == "old"


def test_a_set_aside_series_whose_earlier_result_stays_makes_a_good_run_end_as_six(model, two, tmp_path, monkeypatch):
    make_too_short(two / "2")
    found = run.look_for_cases(two, model.spec.body_parts, SETTINGS)
    (aside,) = (each.series for each in found.selection.candidates if not each.selected)
    earlier(tmp_path / "out", key_of_series(aside))

    def refused(_):
        raise NotWritten("it cannot be written", reason="unwritable")

    monkeypatch.setattr(run_record, "supersede_folder", refused)
    report = run.finish_run(
        tuple(replace(case, document={}) for case in found.cases), found, model.spec, tmp_path / "out"
    )
    assert report.exit_code == 6
    assert "it cannot be written" in report.document["set_aside"][0]["message"]
