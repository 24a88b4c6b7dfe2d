"""What a derived object takes over from its source images, cleaned so that it conforms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.charset import python_encoding
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import UID
from pydicom.valuerep import VR

from ctflow.dicom.attributes import Raw, number, raw_of, text, texts, value_of
from ctflow.dicom.pixels import LOSSY

# Patient, Clinical Trial Subject, General Study and Patient Study modules (DICOM PS3.3 C.7.1 and C.7.2).
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
# Taken over where they have a value: an empty one would say nothing, and an empty Type 1 one would not conform.
_OPTIONAL = (
    "IssuerOfPatientID",
    "PatientBirthTime",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "LongitudinalTemporalInformationModified",
    "TimezoneOffsetFromUTC",
)
_PER_IMAGE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "PixelSpacing",
)
_LENGTHS = ("SliceThickness", "SpacingBetweenSlices")  # taken over where they are one number each
_REFERENCED_CLASS, _REFERENCED_INSTANCE = Tag("ReferencedSOPClassUID"), Tag("ReferencedSOPInstanceUID")
_DATE = re.compile(r"[12]\d{3}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)?")
_FORMATS = {
    "PatientBirthDate": _DATE,
    "StudyDate": _DATE,
    "StudyTime": _TIME,
    "PatientBirthTime": _TIME,
    "PatientSex": re.compile("[MFO]"),
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "PatientSize": re.compile(r"\d{1,3}(\.\d{1,10})?"),
    "PatientWeight": re.compile(r"\d{1,4}(\.\d{1,10})?"),
    "PatientIdentityRemoved": re.compile("YES|NO"),
    "LongitudinalTemporalInformationModified": re.compile("UNMODIFIED|MODIFIED|REMOVED"),
    "TimezoneOffsetFromUTC": re.compile(r"[+-][01]\d[0-5]\d"),
    "StudyDescription": re.compile(r"[^\\]{1,64}"),
    "DeidentificationMethod": re.compile(r"[^\\]{1,64}"),
    "LossyImageCompressionRatio": re.compile(r"\d{1,8}(\.\d{1,7})?"),
    "LossyImageCompressionMethod": re.compile(r"[A-Z0-9_]{1,16}"),
}
# Those that may have several values.
_MULTIPLE = frozenset({"DeidentificationMethod", "LossyImageCompressionRatio", "LossyImageCompressionMethod"})


@dataclass(frozen=True, eq=False)
class Sources:
    """What every object derived from a series takes over from its images; it does not depend on what is marked.

    Attributes:
        header: The first image's, as it is.
        uids: SOPInstanceUID of each image, in array order.
        cleaned: A small copy of each header (`clean_sources`).
        references: Each image as a sequence of references names it.
    """

    header: Dataset
    uids: tuple[str, ...]
    cleaned: tuple[Dataset, ...]
    references: tuple[Dataset, ...]

    def __len__(self) -> int:
        return len(self.uids)


def sources_from_headers(headers: Sequence[Dataset]) -> Sources:
    """Prepare what objects derived from a series will need.

    Args:
        headers: Of the source images, in array order; they are not changed.
    """
    cleaned = clean_sources(headers)
    uids = tuple(text(header, "SOPInstanceUID") for header in headers)
    return Sources(headers[0], uids, tuple(cleaned), tuple(_reference(one) for one in cleaned))


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.add(DataElement(_REFERENCED_CLASS, VR.UI, source.SOPClassUID))
    item.add(DataElement(_REFERENCED_INSTANCE, VR.UI, source.SOPInstanceUID))
    return item


def clean_sources(sources: Sequence[Dataset]) -> list[Dataset]:
    """Small copies of source headers that highdicom takes and that conform.

    Args:
        sources: Headers of the source images; they are not changed.

    Returns:
        One dataset each: identity and geometry of the image; the first one's patient, study and orientation, with
        absent or malformed Type 2 values empty, and empty or malformed optional ones left out; what compression lost
        in any.
    """
    shared = _patient_and_study(sources[0])
    shared.update(_loss(sources))
    known: dict[Raw, DataElement] = {}
    if text(sources[0], "ImageOrientationPatient"):  # others' may differ in the last decimals, which highdicom refuses
        shared.add(_element(sources[0], "ImageOrientationPatient", known))
    cleaned = []
    for source in sources:
        dataset = Dataset()
        dataset.update(shared)
        for keyword in _PER_IMAGE:
            if texts(source, keyword) not in ((), ("",)):
                dataset.add(_element(source, keyword, known))
        for keyword in _LENGTHS:
            if number(source, keyword) is not None:
                dataset.add(_element(source, keyword, known))
        if "SliceThickness" not in dataset:  # images may leave it empty, and highdicom asks for it
            dataset.SliceThickness = None
        cleaned.append(dataset)
    return cleaned


def _element(source: Dataset, keyword: str, known: dict[Raw, DataElement]) -> DataElement:
    """An element of a source: those that are the same in several images are converted once."""
    raw = raw_of(source, keyword)
    if raw is None:
        return source[keyword]
    if raw not in known:
        known[raw] = source[keyword]
    return known[raw]


def _patient_and_study(source: Dataset) -> Dataset:
    dataset = Dataset()
    dataset.SpecificCharacterSet = _character_set(source)
    for keyword in _TYPE_2:
        value = value_of(source, keyword)
        setattr(dataset, keyword, value if _is_well_formed(keyword, value) else "")
    for keyword in _OPTIONAL:
        value = value_of(source, keyword)
        if value is not None and str(value) and _is_well_formed(keyword, value):
            setattr(dataset, keyword, value)
    if "DeidentificationMethodCodeSequence" in dataset and not dataset.DeidentificationMethodCodeSequence:
        del dataset.DeidentificationMethodCodeSequence
    return dataset


def _loss(sources: Sequence[Dataset]) -> Dataset:
    """LossyImageCompression and what is known of it, if any source says so or is stored in a lossy transfer syntax.

    A transfer syntax tells the method. It does not tell the ratio, which is then left out and not invented.
    """
    dataset = Dataset()
    methods = [LOSSY.get(UID(_transfer_syntax_of(source))) for source in sources]
    declared = [source for source in sources if text(source, "LossyImageCompression") == "01"]
    if not declared and not any(methods):
        return dataset
    dataset.LossyImageCompression = "01"
    if declared:
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if texts(declared[0], keyword) and _is_well_formed(keyword, value_of(declared[0], keyword)):
                dataset[keyword] = declared[0][keyword]
    if "LossyImageCompressionMethod" not in dataset and any(methods):
        dataset.LossyImageCompressionMethod = sorted({method for method in methods if method})
    return dataset


def _transfer_syntax_of(source: Dataset) -> str:
    """Transfer syntax UID of the file that a header is from; "" if it does not say."""
    meta = getattr(source, "file_meta", None)
    return "" if meta is None else text(meta, "TransferSyntaxUID")


def _is_well_formed(keyword: str, value: object) -> bool:
    form = _FORMATS.get(keyword)
    if value is None or form is None:
        return value is not None
    values = list(value) if isinstance(value, MultiValue) else [value]
    fits = len(values) == 1 or keyword in _MULTIPLE
    return fits and all(form.fullmatch(str(one).strip()) for one in values)


def _character_set(source: Dataset) -> list[str]:
    """The source's, so that names keep their bytes; UTF-8 where it names one that is unknown."""
    names = list(texts(source, "SpecificCharacterSet")) or [""]
    known = all(name in python_encoding for name in names)
    return (names if any(names) else ["ISO_IR 100"]) if known else ["ISO_IR 192"]
