"""The report as a DICOM Encapsulated PDF."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pydicom
import pytest

from ctflow.core.model import RESEARCH_ONLY, Code, Segment
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.rendered.encapsulated_pdf import encapsulated_pdf_from_bytes
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.source import sources_from_headers
from dicom_support import NAMES, assembled, setter, spec_of
from service_support import dcmtk
from tests_support import dciodvfy_errors

TISSUE = Code("85756007", "SCT", "Tissue")
SPEC = spec_of((Segment(1, "Lung tumour", TISSUE, TISSUE),))
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager"})
PDF = b"%PDF-1.4 something\n%%EOF\n"


def encapsulated(folder, pdf=PDF, spec=SPEC):
    loaded = assembled(folder)
    headers = [instance.header for instance in loaded.instances]
    labels = np.zeros(loaded.volume.array.shape, np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    seg = segmentation_from_labels(labels, headers, spec, MADE_BY)
    return encapsulated_pdf_from_bytes(pdf, (seg,), headers, spec, MADE_BY), seg, headers


@pytest.mark.parametrize("pdf", [PDF, PDF.replace(b"e", b"ee", 1)])
def test_it_conforms_and_gives_the_pdf_back(write, tmp_path, pdf):
    write_dataset(encapsulated(write(), pdf)[0], tmp_path / "report.dcm")
    assert dciodvfy_errors(tmp_path / "report.dcm") == []
    result = pydicom.dcmread(tmp_path / "report.dcm")
    assert result.SOPClassUID == "1.2.840.10008.5.1.4.1.1.104.1"
    assert result.EncapsulatedDocument[: result.EncapsulatedDocumentLength] == pdf
    assert len(result.EncapsulatedDocument) - len(pdf) == len(pdf) % 2


@pytest.mark.parametrize("pdf", [PDF, PDF.replace(b"e", b"ee", 1)])
def test_dcmtk_gives_the_pdf_back(write, tmp_path, pdf):
    write_dataset(encapsulated(write(), pdf)[0], tmp_path / "report.dcm")
    subprocess.run([dcmtk("dcm2pdf"), tmp_path / "report.dcm", tmp_path / "report.pdf"], check=True)
    assert (tmp_path / "report.pdf").read_bytes() == pdf


def test_it_names_the_volume_of_a_series_that_holds_several(write):
    headers = [instance.header for instance in assembled(write()).instances]
    seg = segmentation_from_labels(np.zeros((len(headers), 12, 10), np.uint8), headers, SPEC, MADE_BY)
    sources = sources_from_headers(headers, part="phase 50 %")
    result = encapsulated_pdf_from_bytes(PDF, (seg,), sources, SPEC, MADE_BY)
    assert "phase 50 %" in result.SeriesDescription
    assert result.DocumentTitle.endswith("lung_tumour 0.1.0: phase 50 %")


def test_it_stands_in_the_source_study_in_a_series_of_its_own(write):
    result, seg, headers = encapsulated(write())
    assert result.StudyInstanceUID == headers[0].StudyInstanceUID
    assert result.SeriesInstanceUID not in {seg.SeriesInstanceUID, headers[0].SeriesInstanceUID}
    assert (result.Modality, result.SeriesNumber) == ("DOC", seg.SeriesNumber + 4)
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
        assert result[keyword].value == seg[keyword].value
    for keyword in ("ContentDate", "ContentTime", "SeriesDate", "SeriesTime"):
        assert result[keyword].value == seg[keyword].value
    assert not [element.keyword for element in result if "InstanceCreation" in element.keyword], "of the clock"


def test_it_says_what_it_is_and_what_it_comes_from(write):
    result, seg, headers = encapsulated(write())
    assert result.MIMETypeOfEncapsulatedDocument == "application/pdf"
    assert (result.BurnedInAnnotation, result.VerificationFlag) == ("NO", "UNVERIFIED")
    assert result.DocumentTitle == f"{RESEARCH_ONLY}: Segmentation report of lung_tumour 0.1.0"
    assert RESEARCH_ONLY in result.SeriesDescription
    assert result.ConceptNameCodeSequence[0].CodeValue == "126000"
    references = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in result.SourceInstanceSequence]
    assert references == [(each.SOPClassUID, each.SOPInstanceUID) for each in (seg, *headers)]
    clinical = encapsulated(write(), spec=replace(SPEC, demonstration=False))[0]
    assert clinical.DocumentTitle == "Segmentation report of lung_tumour 0.1.0"
    assert RESEARCH_ONLY not in clinical.SeriesDescription


def test_the_same_pdf_is_the_same_file_and_another_has_another_uid(write, tmp_path):
    folder = write()
    for name in ("a.dcm", "b.dcm"):
        write_dataset(encapsulated(folder)[0], tmp_path / name)
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    other, first = encapsulated(folder, PDF + b"more")[0], pydicom.dcmread(tmp_path / "a.dcm")
    assert other.SOPInstanceUID != first.SOPInstanceUID
    assert other.SeriesInstanceUID != first.SeriesInstanceUID


@pytest.mark.parametrize(("charset", "name"), NAMES)
def test_names_in_other_scripts_keep_their_bytes(write, tmp_path, charset, name):
    folder = write(adjust=setter(SpecificCharacterSet=charset, PatientName=name))
    write_dataset(encapsulated(folder)[0], tmp_path / "report.dcm")
    assert dciodvfy_errors(tmp_path / "report.dcm") == []
    result, source = pydicom.dcmread(tmp_path / "report.dcm"), pydicom.dcmread(next(folder.glob("*.dcm")))
    assert result.get_item("PatientName").value.strip() == source.get_item("PatientName").value.strip()


def test_what_is_no_pdf_is_a_programming_mistake(write):
    with pytest.raises(ValueError, match="not a PDF"):
        encapsulated(write(), b"<html>")
