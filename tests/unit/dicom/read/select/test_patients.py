from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.rules import differing_patients
from dicom_support import selection_of


def differing(write, *kinds, every=2):
    """What is found where the slices have the kinds' attributes by turns; every value is written and read again."""

    def adjust(dataset: Dataset, index: int) -> None:
        dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = "", "", ""
        for keyword, value in kinds[index % every if index % every < len(kinds) else 0].items():
            setattr(dataset, keyword, value)

    return differing_patients(scan_folder(write(adjust=adjust)).instances)


@pytest.mark.parametrize(
    ("kinds", "keyword"),
    [
        (({"PatientID": ["A", "B"]}, {"PatientID": ["A", "C"]}), "PatientID"),
        (({"PatientID": "A"}, {"PatientID": ["A", "C"]}), "PatientID"),
        (({"PatientID": "A"}, {}), "PatientID"),
        (({"PatientID": "a"}, {"PatientID": "A"}), "PatientID"),
        (tuple({"PatientID": "AB", "IssuerOfPatientID": issuer} for issuer in ("NORTH", "SOUTH")), "IssuerOfPatientID"),
        (({"PatientName": "Doe^Jane"}, {"PatientName": "Doe^John"}), "PatientName"),
        (({"PatientName": "Doe^Jane"}, {}), "PatientName"),
        (({"PatientBirthDate": "19500101"}, {"PatientBirthDate": "19500102"}), "PatientBirthDate"),
        (({"PatientName": "Doe", "PatientBirthDate": "19500101"}, {"PatientName": "Doe"}), "PatientBirthDate"),
        (
            tuple(
                {"PatientName": f"Yamada^Tarou={name}", "SpecificCharacterSet": "ISO_IR 192"}
                for name in ("山田^太郎", "山田^太朗")
            ),
            "PatientName",
        ),
    ],
)
def test_several_patients_are_told_apart(write, kinds, keyword):
    found = differing(write, *kinds)
    assert found is not None
    assert found.startswith(f"{keyword} of 0000")
    assert not any(value in found for kind in kinds for value in map(str, kind.values()) if len(value) > 1)


UTF_8, LATIN_1 = {"SpecificCharacterSet": "ISO_IR 192"}, {"SpecificCharacterSet": "ISO_IR 100"}
JAPANESE = {"SpecificCharacterSet": ["", "ISO 2022 IR 87"]}


@pytest.mark.parametrize(
    "kinds",
    [
        ({"PatientID": ["A", "B"]}, {"PatientID": ["A ", " B"]}),
        ({"PatientID": "A", "PatientName": "Doe^Jane"}, {"PatientID": "A", "PatientName": "Roe^Jane"}),
        ({"PatientID": "A", "IssuerOfPatientID": "NORTH"}, {"PatientID": "A"}),
        ({"PatientID": "A", "IssuerOfPatientID": "NORTH"}, {"PatientID": "A", "IssuerOfPatientID": " NORTH "}),
        ({}, {}),
        ({**UTF_8, "PatientName": "Müller^Jürgen"}, {**LATIN_1, "PatientName": "Müller^Jürgen"}),
        ({**UTF_8, "PatientName": "Müller^Jürgen"}, {**UTF_8, "PatientName": "Mu\u0308ller^Ju\u0308rgen"}),
        ({**UTF_8, "PatientName": "Yamada=山田^太郎"}, {**JAPANESE, "PatientName": "YAMADA^=山田^太郎"}),
        ({**UTF_8, "PatientName": "Yamada=山田"}, {"PatientName": "Yamada"}),
        ({"PatientName": "Doe^Jane^^^"}, {"PatientName": "DOE ^ JANE"}),
        ({"PatientBirthDate": "19500101"}, {"PatientBirthDate": "1950.01.01"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DA:UserWarning")
def test_one_patient_written_in_several_ways_is_one(write, kinds):
    assert differing(write, *kinds) is None


def test_the_slices_that_deviate_are_named(write):
    found = differing(write, {"PatientID": ["A", "B"]}, {"PatientID": ["A", "C"]}, every=9)
    assert found == "PatientID of 00001.dcm, 00010.dcm"


def test_such_a_series_is_set_aside_even_by_force(write):
    def adjust(dataset, index):
        dataset.PatientID = ["SECRET", "B" if index % 2 else "C"]

    (found,) = selection_of(write(adjust=adjust), force=True).candidates
    assert (found.selected, found.reason) == (False, "mixed-patients")
    assert "SECRET" not in found.message
