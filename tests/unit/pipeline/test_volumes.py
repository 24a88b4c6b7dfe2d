"""A series that holds several volumes: each has a case, a folder, objects and a document of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pydicom
import pytest

from ctflow.core.errors import NoUsableSeries, SettingsInvalid
from ctflow.dicom.read.select.selection import require_selected
from ctflow.dicom.read.select.volumes import KEYS
from ctflow.dicom.write.derived import series_description
from ctflow.pipeline.case import look_for_cases
from ctflow.pipeline.run import finish_run, run_case
from ctflow.settings.run import VOLUME_NAMES, Settings, settings_from_values
from dicom_support import spec_of, write_volumes
from marking_support import LUNG, MarkingSegmenter, marking_model
from tests_support import dciodvfy_errors

SETTINGS = Settings(device="cpu", cache=None, secondary_capture=True, rtstruct=True, report="none")
SCHEMA = json.loads((Path(__file__).parents[3] / "docs" / "result.schema.json").read_text())
PHASES = tuple({"NominalPercentageOfCardiacPhase": percent} for percent in (40, 75))
OBJECTS = ("segmentation.dcm", "measurements.dcm", "structures.dcm", "secondary_capture.dcm")


def run(folder: Path, output: Path, settings: Settings = SETTINGS):
    model = marking_model()
    found = look_for_cases(folder, (), settings)
    require_selected(found.selection, found.scan)
    segmenter = MarkingSegmenter(model, settings)
    cases = tuple(run_case(case, segmenter, settings, output) for case in found.cases)
    return finish_run(cases, found, model.spec, output)


@pytest.fixture
def phases(tmp_path):
    write_volumes(tmp_path / "in", *PHASES)
    return tmp_path / "in"


def test_each_volume_has_a_result_of_its_own(phases, tmp_path):
    report = run(phases, tmp_path / "out")
    assert report.exit_code == 0
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads((tmp_path / "out" / "result.json").read_text()))
    folders = [case.folder for case in report.cases]
    assert [folder.name.rpartition("-phase-")[2] for folder in folders] == ["40", "75"]
    objects = [[pydicom.dcmread(folder / name) for name in OBJECTS] for folder in folders]
    uids = [uid for some in objects for each in some for uid in (each.SOPInstanceUID, each.SeriesInstanceUID)]
    assert len(set(uids)) == len(uids) == 2 * 2 * len(OBJECTS)
    for percent, folder, some in zip((40, 75), folders, objects, strict=True):
        for each in some:
            assert f"phase {percent} %" in each.SeriesDescription
        assert dciodvfy_errors(folder / "segmentation.dcm") == []
        facts = json.loads((folder / "result.json").read_text())["series"]
        assert facts["volume"] == {
            "name": f"phase-{percent}",
            "label": f"phase {percent} %",
            "number": 1 + (percent == 75),
            "of": 2,
        }


def test_an_object_refers_to_the_slices_of_its_volume_alone(phases, tmp_path):
    report = run(phases, tmp_path / "out")
    for number, case in enumerate(report.cases):
        own = {pydicom.dcmread(path).SOPInstanceUID for path in phases.glob(f"{number}-*")}
        (series,) = pydicom.dcmread(case.folder / "segmentation.dcm").ReferencedSeriesSequence
        assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} <= own


def test_a_rerun_gives_the_same_uids(phases, tmp_path):
    for name in ("1", "2"):
        run(phases, tmp_path / name)
    for path in (tmp_path / "1").rglob("*.dcm"):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()


def test_one_volume_is_chosen_and_the_others_are_named(phases, tmp_path):
    report = run(phases, tmp_path / "out", replace(SETTINGS, volume="phase=75"))
    (case,) = report.cases
    assert case.folder.name.endswith("-phase-75")
    (aside,) = report.document["set_aside"]
    assert aside["reason"] == "not-asked-for"
    with pytest.raises(NoUsableSeries, match="2: phase 75 %"):
        run(phases, tmp_path / "other", replace(SETTINGS, volume="phase=10"))


def test_results_of_other_volumes_stay_where_one_is_asked_for(phases, tmp_path):
    run(phases, tmp_path / "out")
    run(phases, tmp_path / "out", replace(SETTINGS, volume="2"))
    assert len(list((tmp_path / "out").glob("1.2.4-*-phase-*"))) == 2


def test_the_result_of_a_whole_that_is_now_several_volumes_is_moved_aside(phases, tmp_path):
    for path in sorted(phases.glob("1-*")):
        path.rename(tmp_path / path.name)
    (whole,) = run(phases, tmp_path / "out").cases
    assert "phase" not in whole.folder.name
    for path in tmp_path.glob("1-*"):
        path.rename(phases / path.name)
    run(phases, tmp_path / "out")
    assert not whole.folder.exists()
    assert len(list((tmp_path / "out").glob("1.2.4-*"))) == 2
    for path in phases.glob("1-*"):
        path.unlink()
    run(phases, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("1.2.4-*")] == [whole.folder.name]


@pytest.mark.parametrize("value", ["all", "first", "1", "12", "phase=50", "acquisition=2", "temporal=3"])
def test_a_choice_is_read(value):
    assert settings_from_values({"volume": value}, {}).volume == value
    assert settings_from_values({}, {"CTFLOW_VOLUME": value}).volume == value


@pytest.mark.parametrize("value", ["0", "-1", "last", "phase", "phase=", "fase=50", "1.5"])
def test_a_choice_that_means_nothing_is_rejected(value):
    with pytest.raises(SettingsInvalid, match="phase=50"):
        settings_from_values({"volume": value}, {})


def test_the_names_of_a_choice_are_those_of_the_volumes():
    assert tuple(dict.fromkeys(key.name for key in KEYS)) == VOLUME_NAMES


def test_a_description_begins_with_research_only_and_the_volume():
    spec = spec_of((LUNG,))
    assert series_description(spec, "Made by", "phase 40 %").endswith(" USE: phase 40 %: lung_tumour")
    clinical = spec_of((LUNG,), demonstration=False)
    assert series_description(clinical, "Made by", "phase 40 %") == "phase 40 %: Made by lung_tumour"
    assert series_description(clinical, "Made by") == "Made by lung_tumour"
