from __future__ import annotations

import pytest

from ctflow.dicom.read.geometry.agreement import COMPARED, alternating_keyword, disagreements
from ctflow.dicom.read.scan import scan_folder


def instances(folder):
    return scan_folder(folder).instances


def varied(value_of):
    """Gives each slice attributes by its index."""

    def adjust(dataset, index):
        for keyword, value in value_of(index).items():
            setattr(dataset, keyword, value)

    return adjust


def test_a_usual_series_agrees(write):
    assert disagreements(instances(write())) == ()


def test_numbers_agree_by_value_and_absent_with_empty(write):
    adjust = varied(
        lambda d: {"SliceThickness": ["2.5", "2.50", "+2.5"][d % 3], **({"Laterality": ""} if d % 2 else {})}
    )
    assert disagreements(instances(write(adjust=adjust))) == ()


@pytest.mark.parametrize(
    "keyword", ["RescaleIntercept", "PixelPaddingValue", "BitsStored", "PatientPosition", "PatientName"]
)
def test_a_lone_deviation_is_named_without_its_value(write, keyword):
    value = {"PatientPosition": "FFP", "PatientName": "SECRET^NAME", "BitsStored": 12}.get(keyword, 7)
    adjust = varied(lambda d: {keyword: value} if d in (4, 9) else {})
    (sentence,) = disagreements(instances(write(adjust=adjust)))
    assert sentence == f"{keyword} of 00004.dcm, 00009.dcm differs from the other slices'"
    assert keyword in COMPARED


def test_many_deviations_are_one_sentence(write):
    adjust = varied(lambda d: {"RescaleIntercept": str(-1000 - d)})
    assert disagreements(instances(write(adjust=adjust))) == ("RescaleIntercept differs between slices",)


@pytest.mark.parametrize(
    ("number_of", "interleaved"),
    [
        (lambda d: d % 2, True),
        (lambda d: d % 3, True),
        (lambda d: d // 8, False),  # one behind the other
        (lambda d: d, False),  # step and shoot
        (lambda d: int(d == 5), False),
        (lambda _: 1, False),
    ],
)
def test_acquisitions_that_alternate_are_interleaved(write, number_of, interleaved):
    folder = write(adjust=varied(lambda d: {"AcquisitionNumber": str(number_of(d))}))
    assert alternating_keyword(instances(folder)) == ("AcquisitionNumber" if interleaved else None)


@pytest.mark.parametrize("keyword", ["TemporalPositionIndex", "NominalPercentageOfCardiacPhase"])
@pytest.mark.parametrize(
    ("number_of", "interleaved"),
    [
        (lambda d: d % 2, True),
        (lambda d: d % 3, True),
        (lambda d: d // 8, False),
        (lambda d: 74 + (d * d // 3) % 2, False),  # measured in each slice
        (lambda d: d, False),
        (lambda _: 75, False),
    ],
)
def test_phases_are_interleaved_where_they_take_turns_without_exception(write, keyword, number_of, interleaved):
    folder = write(adjust=varied(lambda d: {keyword: number_of(d)}))
    assert alternating_keyword(instances(folder)) == (keyword if interleaved else None)
