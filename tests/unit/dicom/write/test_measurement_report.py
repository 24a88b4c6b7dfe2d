from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY, Code, Segment
from ctflow.core.volume import Volume
from ctflow.dicom.write import measurement_report
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.measurement_report import report_from_measurements
from ctflow.dicom.write.segmentation import SegForm, segmentation_from_labels
from ctflow.measurements.components import MOST_FINDINGS
from ctflow.measurements.measure import SegmentMeasurements, measure_segments, split_findings
from ctflow.measurements.plausibility import Checks, warnings_of_findings
from dicom_support import NAMES, assembled, small_volume, spec_of
from tests_support import dciodvfy_errors, report_by_dcmqi

ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
NEOPLASM = Code("108369006", "SCT", "Neoplasm")
LUNG = Code("39607008", "SCT", "Lung")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
TUMOUR = Segment(1, "Lung tumour", ABNORMAL, NEOPLASM, (LUNG,))
LUNGS = Segment(2, "Lungs", ORGAN, LUNG)
OTHER = Segment(3, "Other", ORGAN, LUNG)
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager", "precision": "fp32", "overlap": 0.25})
SPEC = spec_of((TUMOUR,))
SEVERAL = replace(SPEC, segments=(TUMOUR, LUNGS, OTHER))
TURN = 0.3
GRIDS = {
    "head first": [(0, 0, 2.5), (0, 0.8, 0), (0.8, 0, 0)],
    "feet first": [(0, 0, -2.5), (0, 0.8, 0), (-0.8, 0, 0)],
    "anisotropic": [(0, 0, 3.0), (0, 0.5, 0), (1.25, 0, 0)],
    "oblique": [
        (0, -2 * np.sin(TURN), 2 * np.cos(TURN)),
        (0, 0.7 * np.cos(TURN), 0.7 * np.sin(TURN)),
        (0.9, 0, 0),
    ],
}


def grid_of(name):
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(GRIDS[name])
    affine[:3, 3] = (-10.5, 20.25, -300.0)
    return affine


def some_labels() -> np.ndarray:
    """Two tumours, and one lung; nothing else."""
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    labels[7, 2, 1] = 1
    labels[13, 10, 7:9] = 1
    return labels


@dataclass
class Made:
    report: Dataset
    segmentation: Dataset
    measured: tuple[SegmentMeasurements, ...]
    volume: Volume
    headers: list[Dataset]


def reported(folder: Path, labels=None, spec=SPEC, made_by=MADE_BY) -> Made:
    loaded = assembled(folder)
    headers = [instance.header for instance in loaded.instances]
    labels = some_labels() if labels is None else labels
    segmentation = segmentation_from_labels(labels, headers, spec, made_by)
    measured = measure_segments(labels, loaded.volume, spec.segments)
    report = report_from_measurements(measured, segmentation, headers, spec, made_by)
    return Made(report, segmentation, measured, loaded.volume, headers)


@pytest.fixture
def written(tmp_path):
    def make(dataset, name="measurements.dcm"):
        write_dataset(dataset, tmp_path / name)
        return tmp_path / name

    return make


def groups_of(path):
    return hd.sr.srread(path).content.get_volumetric_roi_measurement_groups()


def comments_of(report) -> list[str]:
    (container,) = (item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "C0034375")
    return [item.TextValue for item in container.ContentSequence]


def values_by_dcmqi(group) -> dict[str, tuple[float, str]]:
    found = {}
    for item in group["measurementItems"]:
        derivation = item.get("derivationModifier", {}).get("CodeValue", "")
        found[f"{item['quantity']['CodeValue']} {derivation}".strip()] = (
            float(item["value"]),
            item["units"]["CodeValue"],
        )
    return found


def expected_of(finding) -> dict[str, tuple[float, str]]:
    return {
        "118565006": (finding.volume_ml * 1000, "mm3"),
        "103339001": (finding.long_axis_mm, "mm"),
        "103340004": (finding.short_axis_mm, "mm"),
        "81827009 56851009": (finding.longest_diameter_mm, "mm"),
        "112031 373098007": (finding.mean_hu, "[hnsf'U]"),
        "112031 386136009": (finding.sd_hu, "[hnsf'U]"),
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_two_readers_find_every_measurement(write, written, grid):
    made = reported(write(small_volume(grid_of(grid))))
    path = written(made.report)
    assert dciodvfy_errors(path) == []
    theirs, groups = report_by_dcmqi(path)["Measurements"], groups_of(path)
    findings = made.measured[0].findings
    assert len(findings) == 2
    for finding, group, by_dcmqi in zip(findings, groups, theirs, strict=True):
        found, expected = values_by_dcmqi(by_dcmqi), expected_of(finding)
        assert found.keys() == expected.keys()
        for name, (value, unit) in expected.items():
            assert found[name] == (pytest.approx(value, abs=1e-4), unit)
        values = [measurement.value for measurement in group.get_measurements()]
        assert values == pytest.approx([value for value, _ in expected.values()], abs=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_centroid_is_a_point_in_the_frame_of_reference(write, written, grid):
    made = reported(write(small_volume(grid_of(grid))))
    labels = some_labels()
    expected = [np.argwhere((labels == 1) & (np.indices(labels.shape)[0] < 10)), np.argwhere(labels[10:]) + [10, 0, 0]]
    for group, index in zip(groups_of(written(made.report)), expected, strict=True):
        (item,) = (item for item in group[0].ContentSequence if item.value_type.value == "SCOORD3D")
        (volume, *others) = group.get_measurements()
        (place,) = volume.referenced_coordinates
        assert np.array_equal(place.value, item.value)
        assert not any(other.referenced_coordinates for other in others)
        assert item.name == codes.DCM.ImageRegion
        assert item.graphic_type.value == "POINT"
        assert item.frame_of_reference_uid == made.headers[0].FrameOfReferenceUID
        assert item.value[0] == pytest.approx(made.volume.geometry.world_from_index(index).mean(axis=0), abs=1e-3)


def test_a_group_names_its_segment_of_the_seg_and_the_source_series(write, written):
    labels = some_labels()
    labels[9:12, 7:9, 3:5] = 2
    made = reported(write(), labels, SEVERAL)
    path = written(made.report)
    assert dciodvfy_errors(path) == []
    theirs = report_by_dcmqi(path)["Measurements"]
    assert [group["ReferencedSegment"] for group in theirs] == [1, 1, 2]
    assert {group["segmentationSOPInstanceUID"] for group in theirs} == {made.segmentation.SOPInstanceUID}
    assert {g["SourceSeriesForImageSegmentation"] for g in theirs} == {made.headers[0].SeriesInstanceUID}
    assert [group["Finding"]["CodeValue"] for group in theirs] == ["108369006", "108369006", "39607008"]
    assert [group.get("FindingSite", {}).get("CodeValue") for group in theirs] == ["39607008", "39607008", None]
    for group in groups_of(path):
        assert group.reference_type == codes.DCM.ReferencedSegment
    assert f"Segment 3, Other: {NOTHING_MARKED}" in comments_of(made.report)
    assert NOTHING_MARKED not in comments_of(made.report)


def test_everything_that_is_referred_to_is_evidence(write):
    made = reported(write())
    evidence = hd.sr.Comprehensive3DSR.from_dataset(made.report).get_evidence(current_procedure_only=True)
    seg = made.segmentation
    expected = {(seg.SeriesInstanceUID, seg.SOPInstanceUID)}
    expected |= {(header.SeriesInstanceUID, header.SOPInstanceUID) for header in made.headers}
    assert {(series, instance) for _, series, instance, _ in evidence} == expected
    assert {study for study, *_ in evidence} == {made.headers[0].StudyInstanceUID}


def test_the_algorithm_is_identified_as_in_the_seg(write, written):
    made = reported(write())
    (algorithm,) = made.segmentation.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    for group in report_by_dcmqi(written(made.report))["Measurements"]:
        theirs = group["measurementAlgorithmIdentification"]
        assert theirs["AlgorithmName"] == algorithm.AlgorithmName == "lung_tumour"
        assert theirs["AlgorithmVersion"] == algorithm.AlgorithmVersion == "0.1.0"
        assert theirs["AlgorithmParameters"] == [algorithm.AlgorithmParameters]
    texts = {item.TextValue for _, item in walk(made.report) if "TextValue" in item}
    assert algorithm.AlgorithmSource in texts


def walk(dataset, depth=0):
    for item in dataset.get("ContentSequence", []):
        yield depth, item
        yield from walk(item, depth + 1)


def test_nobody_has_verified_the_report(write, written):
    report = pydicom.dcmread(written(reported(write()).report))
    assert (report.VerificationFlag, report.CompletionFlag, report.PreliminaryFlag) == (
        "UNVERIFIED",
        "COMPLETE",
        "PRELIMINARY",
    )
    assert "VerifyingObserverSequence" not in report
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert report.SOPClassUID == pydicom.uid.Comprehensive3DSRStorage


@pytest.mark.parametrize("spec", [SPEC, SEVERAL, replace(SPEC, demonstration=False)])
def test_an_empty_report_says_that_it_does_not_exclude_disease(write, written, spec):
    made = reported(write(), np.zeros((16, 12, 10), np.uint8), spec)
    path = written(made.report)
    assert dciodvfy_errors(path) == []
    assert report_by_dcmqi(path)["Measurements"] == []
    assert groups_of(path) == []
    assert made.report.ConceptNameCodeSequence[0].CodeMeaning == "Qualitative Evaluations"
    assert NOTHING_MARKED in comments_of(made.report)
    assert "does not exclude disease" in NOTHING_MARKED
    series = {item.SeriesInstanceUID for item in evidence_series(made.report)}
    assert series == {made.headers[0].SeriesInstanceUID, made.segmentation.SeriesInstanceUID}


def evidence_series(report):
    return report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence


@pytest.mark.parametrize("demonstration", [True, False])
def test_demonstration_reports_say_that_they_are_for_research_only(write, demonstration):
    report = reported(write(), spec=replace(SPEC, demonstration=demonstration)).report
    assert (RESEARCH_ONLY in comments_of(report)) == demonstration
    assert report.SeriesDescription.startswith(RESEARCH_ONLY) == demonstration
    assert (report.SeriesDescription == "Measurements by lung_tumour") != demonstration


def test_more_than_the_listed_findings_are_told(write, written):
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[::2, ::2, ::2] = 1
    count = int(labels.sum())
    made = reported(write(), labels)
    path = written(made.report)
    assert dciodvfy_errors(path) == []
    assert len(groups_of(path)) == MOST_FINDINGS < count
    left = count - MOST_FINDINGS
    sentence = f"the {MOST_FINDINGS} largest of {count} findings are listed, {left} are left out."
    assert any(sentence in comment for comment in comments_of(made.report))
    assert made.report.CompletionFlag == "PARTIAL"
    assert str(left) in made.report.CompletionFlagDescription
    assert len(report_by_dcmqi(path)["Measurements"]) == MOST_FINDINGS


def trackings(made) -> list[str]:
    groups = hd.sr.Comprehensive3DSR.from_dataset(made.report).content.get_volumetric_roi_measurement_groups()
    return [group.tracking_uid for group in groups]


def test_tracking_is_unique_and_only_the_same_result_shares_it(write):
    folder = write()
    first, again = reported(folder), reported(folder)
    assert trackings(first) == trackings(again)
    other = some_labels()
    other[0, 0, 0] = 1
    everywhere = [
        *trackings(first),
        *trackings(reported(folder, other)),
        first.segmentation.SegmentSequence[0].TrackingUID,
    ]
    assert len(set(everywhere)) == len(everywhere) == 6


def test_another_result_is_another_object_of_the_same_series(write):
    folder = write()
    first = reported(folder)
    labels = some_labels()
    labels[0, 0, 0] = 1
    brighter = tuple(
        replace(entry, findings=tuple(replace(finding, mean_hu=finding.mean_hu + 1) for finding in entry.findings))
        for entry in first.measured
    )
    others = [
        reported(folder, labels).report,
        reported(folder, made_by=replace(MADE_BY, weights_digest="cd" * 32)).report,
        reported(folder, made_by=replace(MADE_BY, ctflow_version="0.2.0")).report,
        reported(folder, made_by=replace(MADE_BY, settings={"overlap": 0.5})).report,
        report_from_measurements(brighter, first.segmentation, first.headers, SPEC, MADE_BY),
    ]
    assert len({report.SOPInstanceUID for report in (first.report, *others)}) == 6
    assert len({report.SeriesInstanceUID for report in (first.report, *others)}) == 6  # a viewer shows one of a series
    assert first.report.SeriesInstanceUID not in {
        first.segmentation.SeriesInstanceUID,
        first.headers[0].SeriesInstanceUID,
    }
    assert first.report.SeriesNumber == first.segmentation.SeriesNumber + 1
    newer = reported(folder, spec=replace(SPEC, version="0.2.0")).report
    assert newer.SeriesInstanceUID != first.report.SeriesInstanceUID


PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from test_measurement_report import reported
from ctflow.dicom.write.derived import write_dataset
write_dataset(reported(Path(sys.argv[1])).report, Path(sys.argv[2]))
"""


def test_the_same_measurements_give_the_same_bytes_in_any_process(write, written, tmp_path):
    folder = write()
    first = written(reported(folder).report).read_bytes()
    assert written(reported(folder).report, "again.dcm").read_bytes() == first
    here = Path(__file__).parent
    code = PROCESS.format(tests=str(here.parents[2]), here=str(here))
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "UTC+7"}
    subprocess.run([sys.executable, "-c", code, folder, tmp_path / "other.dcm"], check=True, env=environment)
    assert (tmp_path / "other.dcm").read_bytes() == first


def test_dates_are_the_sources_and_the_clocks_are_nowhere(write):
    made = reported(write())
    moment = (made.segmentation.ContentDate, made.segmentation.ContentTime)
    assert (made.report.ContentDate, made.report.ContentTime) == moment
    assert (made.report.SeriesDate, made.report.SeriesTime) == moment
    assert "InstanceCreationDate" not in made.report
    assert made.report.ContributingEquipmentSequence[0].ContributionDateTime == "".join(moment)


@pytest.mark.parametrize(("character_set", "name"), NAMES)
def test_names_keep_their_bytes(write, written, character_set, name):
    def adjust(dataset, _):
        dataset.SpecificCharacterSet = character_set
        dataset.PatientName = name

    folder = write(adjust=adjust)
    source = pydicom.dcmread(next(folder.iterdir()))
    path = written(reported(folder).report)
    assert dciodvfy_errors(path) == []
    result = pydicom.dcmread(path)
    assert result.get_item("PatientName").value.strip() == source.get_item("PatientName").value.strip()
    assert str(result.PatientName) == name
    assert len(report_by_dcmqi(path)["Measurements"]) == 2


def test_a_label_outside_the_sources_character_set_is_kept(write, written):
    def adjust(dataset, _):
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 144", "Люксембург"

    path = written(
        reported(write(adjust=adjust), spec=replace(SPEC, segments=(replace(TUMOUR, label="Tumör"),))).report
    )
    assert dciodvfy_errors(path) == []
    assert str(pydicom.dcmread(path).PatientName) == "Люксембург"
    assert groups_of(path)[0].tracking_identifier == "lung_tumour Tumör 1, finding 1"


COPIED = ("Patient", "ClinicalTrial", "Deidentification", "LongitudinalTemporal", "Study", "Accession", "Referring")


def test_it_holds_no_more_of_the_patient_than_the_seg(write, caplog):
    caplog.set_level(logging.DEBUG)
    secrets = {
        "PatientName": "Secret^Person",
        "PatientID": "SECRET-1",
        "OtherPatientIDs": "SECRET-2",
        "PatientComments": "SECRET comment",
        "InstitutionName": "SECRET hospital",
        "OperatorsName": "Secret^Operator",
        "StationName": "SECRET3",
        "ProtocolName": "SECRET protocol",
    }

    def adjust(dataset, _):
        for keyword, value in secrets.items():
            setattr(dataset, keyword, value)

    made = reported(write(adjust=adjust))
    about = [element for element in made.report if element.keyword.startswith(COPIED)]
    assert len(about) > 8
    for element in about:
        assert made.segmentation[element.tag] == element
    shown = {element.keyword for element in made.report.iterall() if "secret" in str(element.value).lower()}
    assert shown - {"ContentSequence"} == {"PatientName", "PatientID"}
    assert "secret" not in caplog.text.lower()


def test_headers_without_patient_values_give_a_conforming_report(write, written):
    def adjust(dataset, _):
        for keyword in (
            "PatientBirthDate",
            "PatientSex",
            "StudyID",
            "StudyTime",
            "AccessionNumber",
            "SpecificCharacterSet",
        ):
            if keyword in dataset:
                del dataset[keyword]

    assert dciodvfy_errors(written(reported(write(adjust=adjust)).report)) == []


def test_a_mean_just_below_zero_is_zero(write, written):
    made = reported(write())
    (entry,) = made.measured
    near = (replace(entry, findings=(replace(entry.findings[0], mean_hu=-1e-9),), findings_left_out=1),)
    path = written(report_from_measurements(near, made.segmentation, made.headers, SPEC, MADE_BY))
    (group,) = report_by_dcmqi(path)["Measurements"]
    assert [item["value"] for item in group["measurementItems"]][4] == "0.0"


def test_odd_names_fit(write, written):
    odd = Segment(1, "Tumour\\left\n" + "x" * 80, ABNORMAL, NEOPLASM)
    made = reported(write(), spec=replace(SPEC, segments=(odd,), name="m\\n" * 40, version="v" * 90))
    path = written(made.report)
    assert dciodvfy_errors(path) == []
    assert all(group["TrackingIdentifier"].isprintable() for group in report_by_dcmqi(path)["Measurements"])
    assert [group.tracking_identifier.rsplit(", ", 1)[1] for group in groups_of(path)] == ["finding 1", "finding 2"]


def test_sources_and_seg_are_not_changed(write):
    made = reported(write())
    before = copy.deepcopy((made.headers, made.segmentation))
    report_from_measurements(made.measured, made.segmentation, made.headers, SPEC, MADE_BY)
    assert (made.headers, made.segmentation) == before


def test_measurements_of_other_segments_are_a_programming_mistake(write):
    made = reported(write())
    with pytest.raises(ValueError, match="differ"):
        report_from_measurements(made.measured, made.segmentation, made.headers, SEVERAL, MADE_BY)


def test_a_real_series_gives_a_conforming_report(data, written):
    loaded = assembled(data / "lidc-idri-0314")
    labels = np.zeros(loaded.volume.array.shape, np.uint8)
    middle = tuple(slice(n // 2 - 4, n // 2 + 4) for n in labels.shape)
    labels[middle] = 1
    headers = [instance.header for instance in loaded.instances]
    segmentation = segmentation_from_labels(labels, headers, SPEC, MADE_BY)
    measured = measure_segments(labels, loaded.volume, SPEC.segments)
    path = written(report_from_measurements(measured, segmentation, headers, SPEC, MADE_BY))
    assert dciodvfy_errors(path) == []
    (group,) = report_by_dcmqi(path)["Measurements"]
    assert values_by_dcmqi(group)["112031 373098007"][0] == pytest.approx(loaded.volume.array[middle].mean(), abs=1e-3)


def implausible_report(write, written):
    """A tumour in the body, and one beside it of air."""
    loaded = assembled(write(small_volume(grid_of("head first"))))
    headers = [instance.header for instance in loaded.instances]
    spec = replace(SPEC, segments=(replace(TUMOUR, hu_range=(-700.0, 300.0)),))
    hu = np.full(loaded.volume.array.shape, 30, np.int16)
    hu[:12] = -1000
    volume, labels = Volume(hu, loaded.volume.geometry), some_labels()

    def upper_slices(lines, first, last):
        return np.where(lines[:, 0] >= 8, last - first + 1, 0)

    measured = measure_segments(labels, volume, spec.segments, upper_slices)
    remarks = warnings_of_findings(measured, Checks(volume, upper_slices))
    segmentation = segmentation_from_labels(labels, headers, spec, MADE_BY)
    return written(report_from_measurements(measured, segmentation, headers, spec, MADE_BY, remarks=remarks))


def test_an_implausible_finding_says_so_in_its_group_and_above(write, written):
    path = implausible_report(write, written)
    assert dciodvfy_errors(path) == []
    assert len(report_by_dcmqi(path)["Measurements"]) == 2, "a reader of TID 1500 is not put off"
    plausible, doubted = groups_of(path)
    items = [group[0].ContentSequence for group in (plausible, doubted)]
    comments = [
        [item.TextValue for item in each if item.ConceptNameCodeSequence[0].CodeValue == codes.DCM.Comment.value]
        for each in items
    ]
    (named,), (said,) = comments
    assert re.fullmatch(r"Lung tumour, finding 1: [\d.]+ ml", named)
    assert said.endswith(" ml. Implausible: 100 % outside the body; mean -1000 HU, not -700 to 300 HU.")
    (said,) = [text for text in comments_of(pydicom.dcmread(path)) if "implausible" in text]
    assert said.startswith("Lung tumour: 1 of 2 findings (")
    assert "(mostly outside the body: 1; mean outside -700 to 300 HU: 1)" in said


@pytest.mark.parametrize("by_finding", [False, True])
def test_each_group_is_what_highdicom_makes_of_its_finding(write, monkeypatch, by_finding):
    random = np.random.default_rng(2)
    labels = ((random.random((16, 12, 10)) < 0.08) * random.integers(1, 4, (16, 12, 10))).astype(np.uint8)
    loaded = assembled(write(small_volume(grid_of("oblique"))))
    headers = [instance.header for instance in loaded.instances]
    measured = measure_segments(labels, loaded.volume, SEVERAL.segments)
    marked, parts = split_findings(labels, SEVERAL.segments) if by_finding else (labels, ())
    marking = replace(SEVERAL, segments=parts or SEVERAL.segments)
    form = SegForm("labelmap" if by_finding else "binary")  # a label map also describes its background
    segmentation = segmentation_from_labels(marked, headers, marking, MADE_BY, form=form)

    def report() -> Dataset:
        return report_from_measurements(measured, segmentation, headers, SEVERAL, MADE_BY, marked_as=parts)

    def by_highdicom(findings, segment, basis, algorithm):
        named = [measurement_report._named(rank, segment, basis) for rank in range(1, len(findings) + 1)]
        groups = [
            measurement_report._group(finding, name, segment, basis, algorithm)
            for finding, name in zip(findings, named, strict=True)
        ]
        for rank, (group, finding) in enumerate(zip(groups, findings, strict=True), start=1):
            group.ContentSequence.append(measurement_report._comment(rank, finding, segment))
        return groups

    quick = report()
    monkeypatch.setattr(measurement_report, "_groups", by_highdicom)
    assert sum(len(entry.findings) for entry in measured) > 20
    assert quick.to_json() == report().to_json()
