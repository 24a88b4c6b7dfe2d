from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.dicom.write.encode import json_from_dataset, save_dataset

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
WORDS = ("SCT", "DCM", "odd", "Größe", "two\\values", "")


def code(value: str, meaning: str = "a meaning") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def document(items, transfer_syntax=ExplicitVRLittleEndian) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = transfer_syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.34", "2.25.1"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName, dataset.StudyDescription = "Größe^X", "Lunge, groß"
    dataset.Rows, dataset.PixelRepresentation, dataset.SmallestImagePixelValue = 3, 0, 1  # "US or SS"
    dataset.ContentSequence = items
    return dataset


def saved(dataset, save) -> bytes:
    stream = io.BytesIO()
    save(dataset, stream)
    return stream.getvalue()


def assert_as_pydicom(dataset) -> None:
    expected = saved(dataset, lambda each, stream: each.save_as(stream, enforce_file_format=True))
    assert saved(dataset, save_dataset) == expected
    assert saved(dataset, save_dataset) == expected  # nothing of it has changed
    assert json_from_dataset(dataset) == dataset.to_json()


def own_character_set() -> Dataset:
    item = code("1", "größer")
    item.SpecificCharacterSet = "ISO_IR 100"
    return item


def of_undefined_length() -> Dataset:
    item = code("2")
    item.is_undefined_length_sequence_item = True
    return item


def sequence_of_undefined_length() -> Dataset:
    item = Dataset()
    item.ConceptCodeSequence = [code("3")]
    item["ConceptCodeSequence"].is_undefined_length = True
    return item


def private() -> Dataset:
    item = Dataset()
    item.private_block(0x0099, "ctflow", create=True).add_new(1, "LO", "SCT")
    return item


def ambiguous() -> Dataset:
    item = Dataset()
    item.PixelRepresentation, item.PixelPaddingValue = 1, -3
    return item


def sign_of_what_lies_deeper() -> Dataset:
    item, deeper = Dataset(), Dataset()
    deeper.LUTDescriptor = [1, 2, 16]  # "US or SS"
    item.PixelRepresentation, item.ModalityLUTSequence = 1, [deeper]
    return item


def group_length() -> Dataset:
    item = code("5")
    item.add_new(0x00080000, "UL", 12)
    return item


def two_vrs_of_one_tag() -> Dataset:
    item, other = Dataset(), Dataset()
    item.add_new(0x00080104, "LO", "a meaning")
    other.add_new(0x00080104, "UT", "a meaning")
    item.ConceptCodeSequence = [other]
    return item


def from_a_file() -> Dataset:
    stream = io.BytesIO(saved(document([code("4", "größer")], ImplicitVRLittleEndian), Dataset.save_as))
    return pydicom.dcmread(stream, force=True).ContentSequence[0]


def values_of_all_kinds() -> Dataset:
    item = Dataset()
    item.PersonName, item.UID, item.DateTime = "Größe^X", "1.2.3", "20200102"
    item.GraphicData, item.DimensionIndexValues, item.ImageType = [1.5, -2.25, 3.0], [1, 2], ["DERIVED", "PRIMARY"]
    item.NumericValue, item.FloatingPointValue, item.InstanceNumber = "1.25", 1.25, 7
    item.TextValue, item.CodeMeaning, item.ConceptCodeSequence = "a\\b", None, []
    item.SelectorATValue, item.ICCProfile = 0x00080018, b"\x01\x02\x03"
    return item


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    "item",
    [
        own_character_set, of_undefined_length, sequence_of_undefined_length, private, ambiguous, group_length,
        sign_of_what_lies_deeper, two_vrs_of_one_tag, from_a_file, values_of_all_kinds, Dataset,
    ],
)  # fmt: skip
def test_odd_items_are_written_as_pydicom_writes_them(item, syntax):
    outer = Dataset()
    outer.ConceptCodeSequence = [code("1", "größer"), item(), code("1", "größer")]
    assert_as_pydicom(document([outer, item(), outer], syntax))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_items_that_share_and_repeat_are_written_as_pydicom_writes_them(seed):
    random = np.random.default_rng(seed)
    items = [code(str(random.choice(WORDS[:3])), str(random.choice(WORDS))) for _ in range(4)]
    for _ in range(12):
        item = Dataset()
        item.TextValue, item.ValueType = str(random.choice(WORDS)), "TEXT"
        item.ConceptCodeSequence = [items[index] for index in random.integers(0, len(items), random.integers(0, 4))]
        items.append(item)
    for syntax in SYNTAXES:
        assert_as_pydicom(document(items, syntax))


def test_without_sequences_or_a_character_set_it_is_written_as_pydicom_writes_it():
    dataset = document([code("1")])
    del dataset.SpecificCharacterSet, dataset.PatientName, dataset.StudyDescription
    assert_as_pydicom(dataset)
    del dataset.ContentSequence
    assert_as_pydicom(dataset)


def test_a_sequence_of_undefined_length_and_a_file_that_was_read_are_written_as_pydicom_writes_them():
    dataset = document([code("1", "größer")])
    dataset["ContentSequence"].is_undefined_length = True
    assert_as_pydicom(dataset)
    again = saved(dataset, lambda each, stream: each.save_as(stream, enforce_file_format=True))
    assert_as_pydicom(pydicom.dcmread(io.BytesIO(again)))


def test_another_transfer_syntax_is_pydicoms():
    assert_as_pydicom(document([code("1", "größer")], ExplicitVRBigEndian))


def test_an_item_follows_the_sign_of_its_data_sets_pixels():
    item = Dataset()
    item.LUTDescriptor = [1, 2, 16]  # "US or SS"
    dataset = document([item])
    dataset.PixelRepresentation, dataset.SmallestImagePixelValue = 1, -1
    expected = saved(dataset, lambda each, stream: each.save_as(stream, enforce_file_format=True))
    assert saved(dataset, save_dataset) == expected
