from __future__ import annotations

from dataclasses import replace

import numpy as np
import pydicom
import pytest
import SimpleITK as itk

from ctflow.core.model import RESEARCH_ONLY, Code, Segment
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.rendered.secondary_capture import secondary_capture_from_picture
from ctflow.dicom.write.segmentation import segmentation_from_labels
from dicom_support import assembled, spec_of
from tests_support import dciodvfy_errors

TISSUE = Code("85756007", "SCT", "Tissue")
SPEC = spec_of((Segment(1, "Lung tumour", TISSUE, TISSUE),))
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager"})
PICTURE = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)


def captured(folder, picture=PICTURE, spec=SPEC):
    loaded = assembled(folder)
    headers = [instance.header for instance in loaded.instances]
    labels = np.zeros(loaded.volume.array.shape, np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    seg = segmentation_from_labels(labels, headers, spec, MADE_BY)
    return secondary_capture_from_picture(picture, seg, headers, spec, MADE_BY), seg, headers


@pytest.mark.parametrize("shape", [(30, 41, 3), (31, 41, 3)])
def test_it_conforms_and_another_reader_sees_the_picture(write, tmp_path, shape):
    picture = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    image, _, _ = captured(write(), picture)
    path = tmp_path / "secondary_capture.dcm"
    write_dataset(image, path)
    assert dciodvfy_errors(path) == []
    assert np.array_equal(itk.GetArrayFromImage(itk.ReadImage(path))[0], picture)
    assert np.array_equal(pydicom.dcmread(path).pixel_array, picture)


def test_it_stands_in_the_source_study_in_a_series_of_its_own(write):
    image, seg, headers = captured(write())
    assert image.StudyInstanceUID == headers[0].StudyInstanceUID
    assert image.SeriesInstanceUID not in {seg.SeriesInstanceUID, headers[0].SeriesInstanceUID}
    assert image.SeriesNumber == seg.SeriesNumber + 2
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
        assert image[keyword].value == seg[keyword].value
    assert (image.ContentDate, image.ContentTime) == (seg.ContentDate, seg.ContentTime)
    assert not [element.keyword for element in image if "SecondaryCapture" in element.keyword], "of the clock"


def test_it_says_what_it_is_and_what_it_comes_from(write):
    image, _, headers = captured(write())
    assert image.BurnedInAnnotation == "NO"
    assert list(image.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert "lung_tumour 0.1.0" in image.DerivationDescription
    assert RESEARCH_ONLY in image.DerivationDescription
    assert RESEARCH_ONLY in image.SeriesDescription
    references = [item.ReferencedSOPInstanceUID for item in image.SourceImageSequence]
    assert references == [header.SOPInstanceUID for header in headers]
    clinical, _, _ = captured(write(), spec=replace(SPEC, demonstration=False))
    assert RESEARCH_ONLY not in clinical.DerivationDescription + clinical.SeriesDescription


def test_the_same_picture_is_the_same_file_and_another_has_another_uid(write, tmp_path):
    folder = write()
    for name in ("a.dcm", "b.dcm"):
        write_dataset(captured(folder)[0], tmp_path / name)
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    other = captured(folder, PICTURE[::-1].copy())[0]
    first = pydicom.dcmread(tmp_path / "a.dcm")
    assert other.SOPInstanceUID != first.SOPInstanceUID
    assert other.SeriesInstanceUID != first.SeriesInstanceUID


def test_a_lossy_source_stays_marked(write, tmp_path):
    def adjust(dataset, _index):
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionRatio = "7.5"
        dataset.LossyImageCompressionMethod = "ISO_15444_1"

    image, _, _ = captured(write(adjust=adjust))
    write_dataset(image, tmp_path / "secondary_capture.dcm")
    assert dciodvfy_errors(tmp_path / "secondary_capture.dcm") == []
    assert (image.LossyImageCompression, float(image.LossyImageCompressionRatio)) == ("01", 7.5)
    assert "LossyImageCompression" not in captured(write())[0]


def test_names_in_other_scripts_keep_their_bytes(write, tmp_path):
    def adjust(dataset, _index):
        dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        dataset.PatientName = "Yamada^Tarou=山田^太郎"

    folder = write(adjust=adjust)
    image, _, _ = captured(folder)
    write_dataset(image, tmp_path / "secondary_capture.dcm")
    result, source = pydicom.dcmread(tmp_path / "secondary_capture.dcm"), pydicom.dcmread(next(folder.glob("*.dcm")))
    assert result.get_item("PatientName").value.strip() == source.get_item("PatientName").value.strip()


@pytest.mark.parametrize("picture", [PICTURE[..., 0], PICTURE.astype(np.float32), PICTURE[..., :2]])
def test_what_is_no_rgb_picture_is_a_programming_mistake(write, picture):
    with pytest.raises(ValueError, match="uint8"):
        captured(write(), picture)
