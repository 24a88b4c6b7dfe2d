from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from ctflow.core.model import Code, Segment
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.source import clean_sources, sources_from_headers
from dicom_support import NAMES, assembled, small_volume, spec_of
from tests_support import dciodvfy_errors

LUNG = Code("39607008", "SCT", "Lung")
SPEC = spec_of((Segment(1, "Lung", Code("123037004", "SCT", "Anatomical Structure"), LUNG),), name="model", version="1")


@pytest.fixture(scope="module")
def series_headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series") / "ct"
    write_ct_series(small_volume(), folder)
    return [instance.header for instance in assembled(folder).instances]


@pytest.fixture
def headers(series_headers):
    return copy.deepcopy(series_headers)


def put(header: Dataset, keyword: str, value: object) -> None:
    """Sets any value, as a file from outside may hold it."""
    header.add(DataElement(tag_for_keyword(keyword), dictionary_VR(keyword), value, validation_mode=IGNORE))


def odd(headers, absent=(), **values):
    """Copies of headers, every one without `absent` and with `values`."""
    copies = copy.deepcopy(headers)
    for header in copies:
        for keyword in absent:
            if keyword in header:
                del header[keyword]
        for keyword, value in values.items():
            put(header, keyword, value)
    return copies


def segmentation_of(headers, spec=SPEC, sources=None) -> Dataset:
    labels = np.zeros((len(headers), headers[0].Rows, headers[0].Columns), np.uint8)
    labels[3:6, 2:5, 2:5] = 1
    return segmentation_from_labels(labels, sources or headers, spec, Provenance("0.1.0", "ab" * 32, {}))


def conforming(headers, tmp_path) -> Dataset:
    """The result as read back from a file in which dciodvfy finds no error."""
    path = tmp_path / "segmentation.dcm"
    write_dataset(segmentation_of(headers), path)
    assert dciodvfy_errors(path) == []
    return pydicom.dcmread(path)


def named_in(sources) -> set[str]:
    """The attributes that the one warning names."""
    if not sources.warnings:
        return set()
    (warning,) = sources.warnings
    return set(warning.rpartition(": ")[2].split(", "))


def together(rows):
    """Rows in as few mappings as hold each of them, no keyword twice in one: an object is checked once for many."""
    groups = []
    for keyword, value in rows:
        group = next((group for group in groups if keyword not in group), None)
        if group is None:
            groups.append(group := {})
        group[keyword] = value
    return groups


TYPE_2 = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "ReferringPhysicianName", "StudyID"]
TYPE_2 += ["StudyDate", "StudyTime", "AccessionNumber"]


@pytest.mark.parametrize("keyword", TYPE_2)
def test_an_absent_attribute_becomes_an_empty_one(headers, keyword):
    sources = sources_from_headers(odd(headers[:1], absent=[keyword]))
    assert sources.cleaned[0][keyword].value in ("", None)
    assert sources.warnings == ()


def test_headers_without_any_patient_or_study_value_give_a_conforming_object(headers, tmp_path):
    absent = [*TYPE_2, "PatientIdentityRemoved", "DeidentificationMethod", "StudyDescription", "SpecificCharacterSet"]
    absent += ["PositionReferenceIndicator"]
    result = conforming(odd(headers, absent=absent), tmp_path)
    assert all(not result[keyword].value for keyword in TYPE_2)


MALFORMED = [
    ("PatientSex", "X"),
    ("PatientSex", "female"),
    ("PatientBirthDate", "1950"),
    ("PatientBirthDate", "1950.01.01"),
    ("PatientBirthDate", "19501301"),
    ("PatientBirthDate", "ANON"),
    ("StudyDate", "00000000"),
    ("StudyTime", "25:00"),
    ("StudyTime", "noon"),
    ("PatientBirthDate", "19500231"),
    ("StudyDate", "20190229"),
    ("StudyDate", "20190101-20190201"),
    ("PatientName", ["Wang", "XiaoDong"]),
    ("PatientName", "a^b^c^d^e^f"),
    ("PatientName", "a=b=c=d"),
    ("PatientName", "x" * 65),
    ("ReferringPhysicianName", ["One", "Two"]),
    ("PatientID", "x" * 65),
    ("PatientID", ["A-1", "A-2"]),
    ("PatientID", "A\t1"),
    ("AccessionNumber", "x" * 17),
    ("AccessionNumber", ["A-1", "A-2"]),
    ("StudyID", "x" * 17),
]


@pytest.mark.parametrize(("keyword", "value"), MALFORMED)
def test_a_malformed_value_becomes_an_empty_one_and_is_named(headers, keyword, value):
    sources = sources_from_headers(odd(headers[:1], **{keyword: value}))
    assert not sources.cleaned[0][keyword].value
    assert named_in(sources) == {keyword}


@pytest.mark.parametrize("values", together(MALFORMED))
def test_an_object_of_malformed_values_conforms(headers, tmp_path, values):
    result = conforming(odd(headers, **values), tmp_path)
    assert not [keyword for keyword in values if result[keyword].value]


OPTIONAL = [
    ("StudyDescription", "x" * 65),
    ("StudyDescription", "a\\b"),
    ("PatientAge", "63"),
    ("PatientWeight", "-70"),
    ("PatientSize", "17500000"),
    ("PatientIdentityRemoved", "PERHAPS"),
    ("LongitudinalTemporalInformationModified", "YES"),
    ("TimezoneOffsetFromUTC", "CET"),
    ("ClinicalTrialSponsorName", ""),
    ("ClinicalTrialProtocolID", ""),
    ("ClinicalTrialSubjectID", ""),
    ("IssuerOfPatientID", ""),
]


@pytest.mark.parametrize("values", together(OPTIONAL))
def test_empty_and_malformed_optional_values_are_left_out(headers, tmp_path, values):
    assert not set(values) & set(conforming(odd(headers, **values), tmp_path).dir())


WELL_FORMED = [
    ("PatientSex", "F"),
    ("PatientBirthDate", "19500131"),
    ("PatientAge", "063Y"),
    ("PatientWeight", "70.5"),
    ("StudyTime", "0102"),
    ("StudyTime", "235959.123456"),
    ("StudyDescription", "x" * 64),
    ("TimezoneOffsetFromUTC", "+0100"),
    ("AccessionNumber", "A-1"),
    ("StudyID", "7"),
]


@pytest.mark.parametrize("values", together(WELL_FORMED))
def test_well_formed_values_are_taken_over(headers, tmp_path, values):
    result = conforming(odd(headers, **values), tmp_path)
    assert {keyword: str(result[keyword].value) for keyword in values} == values
    assert sources_from_headers(odd(headers, **values)).warnings == ()


@pytest.mark.parametrize(("character_set", "name"), NAMES)
def test_names_keep_their_bytes(write, tmp_path, character_set, name):
    def adjust(dataset, _):
        dataset.SpecificCharacterSet = character_set
        dataset.PatientName = name

    folder = write(adjust=adjust)
    source = pydicom.dcmread(next(folder.iterdir()))
    result = conforming([instance.header for instance in assembled(folder).instances], tmp_path)
    assert result.get_item("PatientName").value.strip() == source.get_item("PatientName").value.strip()
    assert str(result.PatientName) == name


OUTSIDE = [
    (["ISO_IR 144"], "Люксембург", "Tumör"),
    (["ISO_IR 100"], "Müller^Jürgen", "腫瘍"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", "Tumör"),
    ([""], "Plain^Name", "腫瘍"),
    ([], "Plain^Name", "опухоль"),
]


@pytest.mark.parametrize(("character_set", "name", "label"), OUTSIDE)
def test_a_label_outside_the_sources_character_set_is_kept_and_so_is_the_name(
    write, tmp_path, character_set, name, label
):
    def adjust(dataset, _):
        dataset.PatientName, dataset.StudyDescription = name, name.split("^")[0]
        dataset.SpecificCharacterSet = character_set
        if not character_set:
            del dataset.SpecificCharacterSet

    headers = [instance.header for instance in assembled(write(adjust=adjust)).instances]
    spec = replace(SPEC, segments=(replace(SPEC.segments[0], label=label),))
    path = tmp_path / "segmentation.dcm"
    write_dataset(segmentation_of(headers, spec), path)
    assert dciodvfy_errors(path) == []
    result = pydicom.dcmread(path)
    assert result.SpecificCharacterSet == "ISO_IR 192"
    assert result.SegmentSequence[0].SegmentLabel == label
    assert str(result.PatientName) == name
    assert result.StudyDescription == name.split("^")[0]
    assert name.split("=")[-1].split("^")[0].encode("utf-8") in path.read_bytes()


@pytest.mark.parametrize(("character_set", "label"), [(["ISO_IR 100"], "Tumör"), (["", "ISO 2022 IR 87"], "腫瘍")])
def test_a_label_that_the_sources_character_set_holds_changes_nothing(write, tmp_path, character_set, label):
    folder = write(adjust=lambda dataset, _: setattr(dataset, "SpecificCharacterSet", character_set))
    headers = [instance.header for instance in assembled(folder).instances]
    spec = replace(SPEC, segments=(replace(SPEC.segments[0], label=label),))
    write_dataset(segmentation_of(headers, spec), tmp_path / "segmentation.dcm")
    result = pydicom.dcmread(tmp_path / "segmentation.dcm")
    assert result.SpecificCharacterSet == (character_set[0] if len(character_set) == 1 else character_set)
    assert result.SegmentSequence[0].SegmentLabel == label


def test_an_unknown_character_set_is_replaced_by_utf_8(headers, tmp_path):
    result = conforming(odd(headers, SpecificCharacterSet="ISO_IR 999", PatientName="Plain^Name"), tmp_path)
    assert result.SpecificCharacterSet == "ISO_IR 192"
    assert result.PatientName == "Plain^Name"


def test_identity_removed_without_a_method_is_left_out_whole(headers, tmp_path):
    """The standard asks for a method, which must not be made up."""
    removed = odd(headers, PatientIdentityRemoved="YES", DeidentificationMethod="")
    assert "PatientIdentityRemoved" not in conforming(removed, tmp_path)
    assert named_in(sources_from_headers(removed)) == {"PatientIdentityRemoved"}


def test_identity_removed_with_a_method_is_taken_over_whole(headers, tmp_path):
    result = conforming(odd(headers, PatientIdentityRemoved="YES", DeidentificationMethod="By hand"), tmp_path)
    assert (result.PatientIdentityRemoved, result.DeidentificationMethod) == ("YES", "By hand")


TRIAL = {
    "ClinicalTrialSponsorName": "Sponsor",
    "ClinicalTrialProtocolID": "P-1",
    "ClinicalTrialProtocolName": "Protocol",
    "ClinicalTrialSiteID": "7",
    "ClinicalTrialSiteName": "Site",
    "ClinicalTrialSubjectID": "S-1",
}
TRIAL_TYPE_1 = ["ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialSubjectID"]


@pytest.mark.parametrize("keyword", TRIAL_TYPE_1)
@pytest.mark.parametrize("value", ["", "x" * 65])
def test_the_clinical_trial_subject_module_is_dropped_whole_where_it_lacks_a_part(headers, keyword, value):
    sources = sources_from_headers(odd(headers[:1], **(TRIAL | {keyword: value})))
    assert not [each for each in sources.cleaned[0].dir() if each.startswith("ClinicalTrial")]
    assert set(TRIAL) - {keyword} <= named_in(sources)


@pytest.mark.parametrize("value", ["", "x" * 65, "as it is"])
def test_the_clinical_trial_subject_module_is_kept_whole(headers, tmp_path, value):
    others = {keyword: value for keyword in TRIAL if keyword not in TRIAL_TYPE_1}
    result = conforming(odd(headers, **(TRIAL | others)), tmp_path)
    kept = {keyword: value if len(value) <= 64 else "" for keyword, value in others.items()}
    assert {each: result[each].value or "" for each in TRIAL} == TRIAL | kept


def test_a_code_of_a_method_that_is_none_is_left_out(headers, tmp_path):
    whole, half = Dataset(), Dataset()
    whole.CodeValue, whole.CodingSchemeDesignator, whole.CodeMeaning = "113100", "DCM", "Basic Profile"
    half.CodeValue, half.CodeMeaning = "113105", "No scheme"
    marked = odd(headers, absent=["DeidentificationMethod"], PatientIdentityRemoved="YES")
    for header in marked:
        header.DeidentificationMethodCodeSequence = pydicom.Sequence([half, whole])
    result = conforming(marked, tmp_path)
    assert [item.CodeValue for item in result.DeidentificationMethodCodeSequence] == ["113100"]
    assert named_in(sources_from_headers(marked)) == {"DeidentificationMethodCodeSequence"}


def test_a_coded_method_is_taken_over_and_an_empty_one_is_not(headers, tmp_path):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "113100", "DCM", "Basic Application Profile"
    coded = odd(headers, absent=["DeidentificationMethod"], DeidentificationMethodCodeSequence=pydicom.Sequence([item]))
    assert conforming(coded, tmp_path).DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    ((first, *_), _) = clean_sources(odd(headers, DeidentificationMethodCodeSequence=pydicom.Sequence([])))
    assert "DeidentificationMethodCodeSequence" not in first


def test_the_first_header_speaks_for_patient_and_study(headers):
    headers = odd(headers)
    put(headers[1], "PatientName", "Other^Name")
    cleaned, _ = clean_sources(headers)
    assert len({str(dataset.PatientName) for dataset in cleaned}) == 1
    assert [dataset.SOPInstanceUID for dataset in cleaned] == [header.SOPInstanceUID for header in headers]
    assert [dataset.ImagePositionPatient for dataset in cleaned] == [h.ImagePositionPatient for h in headers]
    assert "PixelData" not in cleaned[0]
    assert "Manufacturer" not in cleaned[0]


@pytest.mark.parametrize("value", [None, "nan", ["1", "2"], "7", "0"])
@pytest.mark.parametrize("keyword", ["SliceThickness", "SpacingBetweenSlices"])
def test_the_slices_distance_is_what_a_seg_says_whatever_one_image_declares(headers, tmp_path, keyword, value):
    headers = odd(headers, SliceThickness="3", SpacingBetweenSlices="2.5")
    put(headers[0], keyword, value)
    result = conforming(headers, tmp_path)
    measures = result.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == measures.SpacingBetweenSlices == 2.5


@pytest.mark.parametrize("index", [0, 3])
def test_most_images_orientation_and_pixel_spacing_stand_for_those_that_are_rounded(headers, tmp_path, index):
    headers = odd(headers)
    (_, usual, *_) = headers
    orientation, spacing = list(usual.ImageOrientationPatient), list(usual.PixelSpacing)
    put(headers[index], "ImageOrientationPatient", [value + 0.00004 for value in orientation])
    put(headers[index], "PixelSpacing", [round(float(value) + 0.0004, 4) for value in spacing])
    result = conforming(headers, tmp_path)
    (shared,) = result.SharedFunctionalGroupsSequence
    assert list(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == orientation
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == spacing


def test_what_is_prepared_serves_several_objects(headers):
    """An object that needs UTF-8 for its own words leaves the next one the sources' character set."""
    sources = sources_from_headers(odd(headers, SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürgen"))
    before = [header.to_json() for header in (*sources.cleaned, *sources.references)]
    spec = replace(SPEC, segments=(replace(SPEC.segments[0], label="опухоль"),))
    assert segmentation_of(headers, spec, sources).SpecificCharacterSet == "ISO_IR 192"
    assert segmentation_of(headers, SPEC, sources).SpecificCharacterSet == "ISO_IR 100"
    assert [header.to_json() for header in (*sources.cleaned, *sources.references)] == before


def test_a_value_that_cannot_be_parsed_becomes_an_empty_one(headers):
    header = headers[0]
    for keyword, vr, value in (("PatientWeight", "FD", b"abc"), ("PatientSize", "DS", b"175cm ")):
        tag = pydicom.tag.Tag(tag_for_keyword(keyword))
        header[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)
    ((first,), _) = clean_sources([header])
    assert "PatientWeight" not in first
    assert "PatientSize" not in first


def test_attributes_of_another_vr_in_the_source_have_the_right_one_in_the_object(headers, tmp_path):
    headers = odd(headers)
    for header in headers:
        for keyword in ("StudyInstanceUID", "SOPInstanceUID", "ImagePositionPatient", "PixelSpacing", "StudyDate"):
            value = header[keyword].value
            header[keyword] = DataElement(tag_for_keyword(keyword), "LO", list(map(str, value)) if
                                          not isinstance(value, str) else str(value))  # fmt: skip
        header["Rows"] = DataElement(tag_for_keyword("Rows"), "UL", header.Rows)
    result = conforming(headers, tmp_path)
    assert result.StudyInstanceUID == headers[0].StudyInstanceUID
    assert result.Rows == headers[0].Rows


def test_several_deidentification_methods_are_taken_over(headers, tmp_path):
    result = conforming(odd(headers, DeidentificationMethod=["One", "Two"]), tmp_path)
    assert list(result.DeidentificationMethod) == ["One", "Two"]


LOSSY = [("1.2.840.10008.1.2.4.81", "ISO_14495_1"), ("1.2.840.10008.1.2.4.91", "ISO_15444_1")]


@pytest.mark.parametrize("lossy", ["all", "one"])
@pytest.mark.parametrize(("syntax", "method"), LOSSY)
def test_loss_in_any_source_is_marked(write, tmp_path, syntax, method, lossy):
    folder = write(small_volume(shape=(16, 32, 40)))
    for path in sorted(folder.iterdir())[slice(None) if lossy == "all" else slice(5, 6)]:
        dataset = pydicom.dcmread(path)
        options = {"jls_error": 1} if syntax.endswith("81") else {"j2k_psnr": [60]}
        dataset.compress(syntax, generate_instance_uid=False, **options)
        dataset.LossyImageCompression = "00"  # as senders that transcode leave it
        dataset.save_as(path)
    loaded = assembled(folder)
    assert any("compressed with loss" in warning for warning in loaded.warnings)
    result = conforming([instance.header for instance in loaded.instances], tmp_path)
    assert result.LossyImageCompression == "01"
    assert result.LossyImageCompressionMethod == method
    assert "LossyImageCompressionRatio" not in result


def test_loss_that_a_source_declares_is_taken_over(headers, tmp_path):
    ratios, methods = [5.5, 2.0], ["ISO_10918_1", "ISO_15444_1"]
    marked = odd(headers)
    for keyword, value in (
        ("LossyImageCompression", "01"),
        ("LossyImageCompressionRatio", ratios),
        ("LossyImageCompressionMethod", methods),
    ):
        put(marked[3], keyword, value)
    result = conforming(marked, tmp_path)
    assert result.LossyImageCompression == "01"
    assert [float(ratio) for ratio in result.LossyImageCompressionRatio] == ratios
    assert list(result.LossyImageCompressionMethod) == methods


@pytest.mark.parametrize(("ratio", "method"), [(-4, "jpeg 2000"), (None, "")])
def test_loss_that_is_declared_badly_is_still_marked(headers, tmp_path, ratio, method):
    values = {"LossyImageCompressionRatio": ratio, "LossyImageCompressionMethod": method}
    result = conforming(odd(headers, LossyImageCompression="01", **values), tmp_path)
    assert result.LossyImageCompression == "01"
    assert not set(values) & set(result.dir())


def test_without_loss_the_seg_says_so(headers, tmp_path):
    assert conforming(headers, tmp_path).LossyImageCompression == "00"


def test_sources_are_not_changed(headers):
    before = copy.deepcopy(headers)
    clean_sources(headers)
    assert headers == before


def test_nothing_of_the_patient_is_logged(headers, caplog):
    caplog.set_level(logging.DEBUG)
    values = {"PatientName": "Secret^Person", "PatientID": ["SECRET-1", "SECRET-2"], "PatientBirthDate": "SECRETDATE"}
    marked = odd(headers, absent=["StudyID"], PatientSex="SECRETSEX", StudyDescription="secret " * 70, **values)
    segmentation_of(marked)
    assert named_in(sources_from_headers(marked)) == {"PatientBirthDate", "PatientID", "PatientSex", "StudyDescription"}
    assert "secret" not in (caplog.text + str(sources_from_headers(marked).warnings)).lower()
