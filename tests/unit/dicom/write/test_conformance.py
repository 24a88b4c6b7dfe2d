from __future__ import annotations

import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from ctflow.dicom.write.conformance import conforming_character_set, conforming_values, is_date


def header_of(keyword: str, raw: bytes, charset: str = "", vr: str | None = None) -> Dataset:
    """A header as a file with such bytes gives it."""
    header = Dataset()
    if charset:
        header.SpecificCharacterSet = charset.split("\\")
    tag = pydicom.tag.Tag(tag_for_keyword(keyword))
    header[tag] = RawDataElement(tag, vr or dictionary_VR(keyword), len(raw), raw, 0, False, True)
    encodings = pydicom.charset.convert_encodings(charset.split("\\")) if charset else None
    header.set_original_encoding(False, True, encodings)
    return header


CONFORMING = [
    ("PatientID", b"A-1 ", "", ("A-1",)),
    ("PatientID", b" A-1\0", "", ("A-1",)),
    ("PatientID", b"", "", ()),
    ("PatientID", b"  ", "", ()),
    ("PatientName", b"Wang^XiaoDong", "", ("Wang^XiaoDong",)),
    ("PatientName", "Müller".encode("latin-1"), "ISO_IR 100", ("Müller",)),
    ("PatientName", "山田".encode(), "ISO_IR 192", ("山田",)),
    ("PatientName", "誠".encode("gbk"), "GB18030", ("誠",)),  # its second byte is a backslash
    ("DeidentificationMethod", b"One\\Two", "", ("One", "Two")),
    ("PatientBirthDate", b"20000229", "", ("20000229",)),
    ("StudyTime", b"2359", "", ("2359",)),
    ("PatientWeight", b"70.5", "", ("70.5",)),
    ("SeriesNumber", b"+7", "", ("+7",)),
    ("TimezoneOffsetFromUTC", b"-0330", "", ("-0330",)),
    ("LossyImageCompressionMethod", b"ISO_10918_1", "", ("ISO_10918_1",)),
]


@pytest.mark.parametrize(("keyword", "raw", "charset", "values"), CONFORMING)
def test_what_conforms_is_found(keyword, raw, charset, values):
    assert conforming_values(header_of(keyword, raw, charset), keyword) == values


MALFORMED = [
    ("PatientID", b"A-1\\A-2", ""),
    ("PatientID", b"x" * 66, ""),
    ("PatientID", b"A\x1b1", ""),
    ("PatientName", "誠".encode("gbk"), ""),
    ("PatientName", "Müller".encode("latin-1"), ""),
    ("PatientName", "Müller".encode("latin-1"), "ISO_IR 192"),
    ("PatientName", "Müller".encode("latin-1"), "ISO_IR 999"),
    ("PatientName", b"M\x81ller", "ISO_IR 100"),
    ("PatientName", b"\xff\xff", "GB18030"),
    ("PatientBirthDate", b"19500231", ""),
    ("PatientBirthDate", b"1950.1.1", ""),
    ("StudyTime", b"10:20:30", ""),
    ("StudyTime", b"235960", ""),
    ("StudyTime", b"1000-1100", ""),
    ("PatientWeight", b"1e999", ""),
    ("PatientWeight", b"70,5", ""),
    ("SeriesNumber", b"99999999999 ", ""),
    ("SeriesNumber", b"seven", ""),
    ("PatientAge", b"63", ""),
    ("PatientSex", b"m", ""),
    ("TimezoneOffsetFromUTC", b"+1500", ""),
]


@pytest.mark.parametrize(("keyword", "raw", "charset"), MALFORMED)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_does_not_conform_is_told_from_what_is_absent(keyword, raw, charset):
    header = header_of(keyword, raw, charset)
    assert conforming_values(header, keyword) is None
    assert conforming_values(Dataset(), keyword) == ()


@pytest.mark.parametrize(("vr", "raw", "values"), [("LO", b"20190228", ("20190228",)), ("OB", b"20190228", None)])
def test_another_vr_in_the_file_does_not_matter_where_the_value_has_the_right_form(vr, raw, values):
    assert conforming_values(header_of("StudyDate", raw, vr=vr), "StudyDate") == values


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(ValueError, match="Nothing"):
        conforming_values(Dataset(), "Nothing")


@pytest.mark.parametrize(("value", "is_one"), [("20240229", True), ("20230229", False), ("2024", False), ("", False)])
def test_a_date_is_a_day_that_there_is(value, is_one):
    assert is_date(value) is is_one


CHARACTER_SETS = [
    ("", "Plain", ["ISO_IR 100"]),
    ("ISO_IR 100", "Müller", ["ISO_IR 100"]),
    ("\\ISO 2022 IR 87", "山田", ["", "ISO 2022 IR 87"]),
    ("UTF-8", "Müller", ["ISO_IR 192"]),
    ("ISO_IR 999", "Plain", ["ISO_IR 192"]),
    ("ISO_IR 100\\ISO_IR 144", "Plain", ["ISO_IR 192"]),
    ("GB18030", "王", ["GB18030"]),
    ("GBK", "王", ["ISO_IR 192"]),
    ("GB18030", "誠", ["ISO_IR 192"]),
    ("ISO_IR 100", "山田", ["ISO_IR 192"]),
]


@pytest.mark.parametrize(("named", "name", "expected"), CHARACTER_SETS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_character_set_is_kept_where_it_is_one_and_holds_what_is_taken_over(named, name, expected):
    header, taken = Dataset(), Dataset()
    header.SpecificCharacterSet = named.split("\\")
    taken.PatientName = name
    assert conforming_character_set(header, taken) == expected
