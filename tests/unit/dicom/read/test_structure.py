"""A few values of an encoded data set, read in the walk that looks for damage, are what pydicom reads."""

from __future__ import annotations

import random
from io import BytesIO

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.dicom.read.structure import flaw_of_header, values_of_data_set

WANTED = (0x00080018, 0x00080060, 0x0020000D, 0x00201209, 0x00180050)
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)


def image() -> Dataset:
    dataset, inner = Dataset(), Dataset()
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.Modality = "1.2.3.4", "1.2.3", "CT"
    inner.SOPInstanceUID, inner.StudyInstanceUID = "9.9.9", "9.9"  # not the image's own
    dataset.SourceImageSequence = [inner]
    dataset.NumberOfSeriesRelatedInstances = 20
    dataset.Rows = dataset.Columns = 4
    dataset.BitsAllocated, dataset.PixelRepresentation = 16, 0
    dataset.PixelData = bytes(32)
    return dataset


def encoded(dataset: Dataset, syntax: str) -> bytes:
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    if syntax == ExplicitVRBigEndian:
        dataset["PixelData"].VR = "OW"
    write_dataset(stream, dataset)
    return stream.getvalue()


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_values_are_those_of_the_first_level_and_absent_ones_are_left_out(syntax):
    found = values_of_data_set(memoryview(encoded(image(), syntax)), syntax, WANTED)
    assert {tag: value.decode().strip(" \0") for tag, value in found.items()} == {
        0x00080018: "1.2.3.4", 0x00080060: "CT", 0x0020000D: "1.2.3", 0x00201209: "20",
    }  # fmt: skip


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_damage_is_what_the_look_at_a_file_calls_damage(syntax):
    rng = random.Random(str(syntax))
    whole = encoded(image(), syntax)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    begin = DicomBytesIO()
    begin.write(bytes(128) + b"DICM")
    pydicom.filewriter.write_file_meta_info(begin, meta, enforce_standard=False)
    said = set()
    for _ in range(300):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(1, len(whole))])])
        for _ in range(rng.randrange(3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        found = values_of_data_set(bytes(damaged), syntax, WANTED)
        flaw = flaw_of_header(BytesIO(begin.getvalue() + damaged), preamble=True)
        assert (found if isinstance(found, str) else None) == flaw
        said.add(flaw)
    assert len(said) >= 3
    assert None in said


def test_of_nothing_there_is_nothing():
    assert values_of_data_set(b"", ExplicitVRLittleEndian, WANTED) == {}
