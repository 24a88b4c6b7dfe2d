"""A dataset made of the walk that looks for damage is the one that pydicom reads."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from io import BytesIO

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from ctflow.dicom.attributes import PARSE_ERRORS
from ctflow.dicom.read.header import header_of_layout
from ctflow.dicom.read.structure import Layout, layout_of_header

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)


def image() -> Dataset:
    """Elements of every kind that a header of CT has."""
    dataset, item, inner = Dataset(), Dataset(), Dataset()
    dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = "1.2.3", "1.2.3.4", "CT"
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = "Yamada^Tarou=山田^太郎", "7", ""
    inner.CodeValue, inner.CodeMeaning = "24627-2", "山"
    item.ReferencedSOPInstanceUID, item.PurposeOfReferenceCodeSequence = "1.2", [inner]
    dataset.ReferencedImageSequence = [item, item]
    dataset.SourceImageSequence = [item]
    dataset["SourceImageSequence"].is_undefined_length = True
    dataset.ImagePositionPatient, dataset.SliceThickness = [1.5, -2, 3], None
    dataset.private_block(0x0029, "VENDOR", create=True).add_new(1, "OB", bytes(50_000))  # beyond the first bytes
    dataset.BitsAllocated, dataset.PixelRepresentation, dataset.PixelPaddingValue = 16, 1, 0
    dataset["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "SS", -2000)
    dataset.Rows = dataset.Columns = 4
    return dataset


def file_of(dataset: Dataset, syntax: str) -> bytes:
    stream, meta = BytesIO(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = syntax, "1.2.3.4"
    meta.MediaStorageSOPClassUID = "1.2.3"
    dataset.file_meta = meta
    dataset.PixelData = encapsulate([bytes(32)]) if syntax == JPEG2000Lossless else bytes(32)
    dataset["PixelData"].VR = "OB" if syntax == JPEG2000Lossless else "OW"
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def header_of(content: bytes) -> Dataset | None:
    layout = layout_of_header(BytesIO(content), preamble=True)
    assert isinstance(layout, Layout)
    return header_of_layout(BytesIO(content), layout)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_header_is_what_pydicom_reads(syntax):
    content = file_of(image(), syntax)
    found, expected = header_of(content), pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
    assert found is not None
    assert list(found.keys()) == list(expected.keys())
    assert found.original_encoding == expected.original_encoding
    assert found.original_character_set == expected.original_character_set
    assert found.file_meta == expected.file_meta
    assert str(found) == str(expected)
    assert str(found.PatientName) == "Yamada^Tarou=山田^太郎"
    assert found.PixelPaddingValue == -2000
    assert "PixelData" not in found


def test_pixel_data_begin_where_the_header_ends():
    content = file_of(image(), ExplicitVRLittleEndian)
    layout = layout_of_header(BytesIO(content), preamble=True)
    assert isinstance(layout, Layout)
    assert content[layout.end : layout.end + 6] == b"\xe0\x7f\x10\x00OW"


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_damaged_file_is_named_or_read_as_pydicom_reads_it(syntax):
    rng, whole, read = random.Random(str(syntax)), file_of(image(), syntax), 0
    end = whole.index(b"VENDOR")
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 3)):
            damaged[rng.randrange(132, end)] = rng.choice([rng.randrange(256), 0, 255, 65])
        layout = layout_of_header(BytesIO(damaged), preamble=True)
        if isinstance(layout, str):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = outcome(lambda: header_of_layout(BytesIO(damaged), layout))  # noqa: B023  # called at once
            expected = outcome(lambda: pydicom.dcmread(BytesIO(damaged), stop_before_pixels=True))  # noqa: B023
        assert found in (None, expected)
        read += found is not None
    assert read > 100


def outcome(read: Callable[[], Dataset | None]) -> list[str] | str | None:
    """What each element is, or the error that reading the file, or converting an element, raises."""
    try:
        header = read()
    except PARSE_ERRORS as error:
        return type(error).__name__
    return None if header is None else [shown(header, tag) for tag in header.keys()]  # noqa: SIM118


def shown(header: Dataset, tag: int) -> str:
    try:
        return str(header[tag])
    except PARSE_ERRORS as error:
        return type(error).__name__


def test_pydicom_is_asked_where_it_guesses():
    assert header_of(file_of(image(), JPEG2000Lossless)) is not None
    content = file_of(image(), ExplicitVRLittleEndian)
    assert header_of(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")) is None
    assert header_of(content[:132] + content[144:]) is None  # without the length of its meta information
    big = Dataset()
    big.SOPClassUID, big.Rows, big.Columns = "1.2.3", 4, 4
    assert header_of(file_of(big, ExplicitVRBigEndian)) is None
