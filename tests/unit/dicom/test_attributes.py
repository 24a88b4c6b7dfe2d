"""Values are converted once for many slices, and each slice still has its own."""

from __future__ import annotations

from io import BytesIO

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.dicom.attributes import integer, number, text, texts


def read_back(syntax: str = ImplicitVRLittleEndian, **values: object) -> Dataset:
    """A header whose values lie as in a file."""
    dataset, stream = Dataset(), BytesIO()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(stream, enforce_file_format=False)
    stream.seek(0)
    return pydicom.dcmread(stream, force=True)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_values_are_text_and_numbers(syntax):
    header = read_back(syntax, ImageType=["ORIGINAL", "PRIMARY "], SliceThickness="2.50", Rows=512, InstanceNumber=" 7")
    assert texts(header, "ImageType") == ("ORIGINAL", "PRIMARY")
    assert number(header, "SliceThickness") == 2.5
    assert (integer(header, "Rows"), integer(header, "InstanceNumber")) == (512, 7)
    assert texts(header, "ImageComments") == ()


def test_the_same_bytes_in_another_character_set_are_another_name():
    latin = read_back(SpecificCharacterSet="ISO_IR 100", PatientName="Müller")
    greek = read_back(SpecificCharacterSet="ISO_IR 126", PatientName="Mόller")
    assert latin.get_item("PatientName").value == greek.get_item("PatientName").value
    assert (text(latin, "PatientName"), text(greek, "PatientName")) == ("Müller", "Mόller")


def test_padding_has_the_sign_that_the_pixels_have():
    unsigned = read_back(PixelRepresentation=0, PixelPaddingValue=63536)
    signed = read_back(PixelRepresentation=1, PixelPaddingValue=-2000)
    assert unsigned.get_item("PixelPaddingValue").value == signed.get_item("PixelPaddingValue").value
    assert (integer(unsigned, "PixelPaddingValue"), integer(signed, "PixelPaddingValue")) == (63536, -2000)


def test_a_value_set_later_is_the_value():
    header = read_back(SliceThickness="2.5")
    assert number(header, "SliceThickness") == 2.5
    header.SliceThickness = "3"
    assert number(header, "SliceThickness") == 3


def test_a_damaged_value_is_absent():
    header = read_back(ExplicitVRLittleEndian, Rows=512)
    raw = header.get_item("Rows")
    header[raw.tag] = raw._replace(value=b"\0\2\0", length=3)
    assert texts(header, "Rows") == ()
