"""Attributes that a derived object takes over from its source images, cleaned to conform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as PydicomSequence
from pydicom.tag import Tag
from pydicom.uid import UID
from pydicom.valuerep import VR

from ctflow.compat.pydicom import lenient
from ctflow.dicom.attributes import Raw, integer, raw_of, text, texts, value_of
from ctflow.dicom.read.pixels.stored import LOSSY
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.dicom.write.conformance import (
    conforming_character_set,
    conforming_code,
    conforming_values,
    element_of_values,
    encodings_of_header,
)
from ctflow.dicom.write.frames import FramePlanes, planes_of_images
from ctflow.dicom.write.measures import Measures, measures_from_headers

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
# Taken over only with a value: an empty one says nothing, and an empty Type 1 one does not conform.
_OPTIONAL = (
    "IssuerOfPatientID",
    "PatientBirthTime",
    "StudyDescription",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "LongitudinalTemporalInformationModified",
    "TimezoneOffsetFromUTC",
    "PositionReferenceIndicator",
)
_PER_IMAGE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "PixelSpacing",
)
_REFERENCED_CLASS, _REFERENCED_INSTANCE = Tag("ReferencedSOPClassUID"), Tag("ReferencedSOPInstanceUID")
# Not taken over, but needed for an object's own series number, dates and times.
_READ = (
    "SeriesNumber",
    *(f"{kind}{what}" for kind in ("Acquisition", "Content", "Series") for what in ("Date", "Time")),
)
_TRIAL = ("ClinicalTrialSponsorName", "ClinicalTrialProtocolID")  # Type 1 of the Clinical Trial Subject module
_TRIAL_SUBJECT = ("ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID")  # one of them is required
_TRIAL_TYPE_2 = ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName")
_NOT_TAKEN = "written empty or left out, because the source's values or their modules do not conform to DICOM"


@dataclass(frozen=True, eq=False)
class Sources:
    """Input from the images that every object derived from a series takes over; independent of the mask.

    Attributes:
        header: The first image's, unchanged.
        uids: SOPInstanceUID of each image, in array order; of a frame of an Enhanced CT with its number.
        cleaned: A small copy of each header (`clean_sources`), a frame's as that of a CT image.
        references: Each image as an item of a reference sequence.
        instances: The same for each object once, without numbers of frames.
        measures: The images' relative positions; None if they do not give them.
        warnings: For the user, on values not taken over.
        part: Which volume of the series the images are, for people; "" if the series is one volume.
        frames: Number of each image's frame in its Enhanced CT; empty for single-frame images.
    """

    header: Dataset
    uids: tuple[str, ...]
    cleaned: tuple[Dataset, ...]
    references: tuple[Dataset, ...]
    instances: tuple[Dataset, ...]
    measures: Measures | None
    warnings: tuple[str, ...] = ()
    part: str = ""
    frames: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.uids)

    @cached_property
    def planes(self) -> FramePlanes:
        """A SEG's frame on each image."""
        return planes_of_images(self.cleaned)


@lenient()
def sources_from_headers(headers: Sequence[Dataset], *, part: str = "") -> Sources:
    """Prepare the input for objects derived from a series.

    Args:
        headers: Of the source images, in array order; they are not changed.
        part: As of `Sources`.
    """
    cleaned, warnings = clean_sources(headers)
    numbers = [integer(header, "ReferencedFrameNumber") for header in headers]  # of the reader (`read.enhanced`)
    frames = tuple(number for number in numbers if number is not None)
    uids = tuple(text(header, "SOPInstanceUID") for header in headers)
    references = instances = tuple(_reference(one) for one in cleaned)
    if frames:
        first = dict(zip(reversed(uids), reversed(references), strict=True))
        instances = tuple(first[uid] for uid in dict.fromkeys(uids))
        references = tuple(_reference(one, number) for one, number in zip(cleaned, frames, strict=True))
        uids = tuple(f"{uid} frame {number}" for uid, number in zip(uids, frames, strict=True))
        for one in cleaned:  # highdicom takes a single object with all its frames, or images of a single frame
            one.SOPClassUID = CT_IMAGE_STORAGE
    measures = measures_from_headers(headers)
    return Sources(headers[0], uids, tuple(cleaned), references, instances, measures, warnings, part, frames)


def _reference(source: Dataset, frame: int | None = None) -> Dataset:
    item = Dataset()
    item.add(DataElement(_REFERENCED_CLASS, VR.UI, source.SOPClassUID))
    item.add(DataElement(_REFERENCED_INSTANCE, VR.UI, source.SOPInstanceUID))
    if frame is not None:
        item.ReferencedFrameNumber = frame
    return item


@lenient()
def clean_sources(sources: Sequence[Dataset]) -> tuple[list[Dataset], tuple[str, ...]]:
    """Small conforming copies of source headers that highdicom accepts.

    Args:
        sources: Headers of the source images; they are not changed.

    Returns:
        One dataset each: identity and geometry of the image; the first one's patient, study and orientation, with
        absent or malformed Type 2 values empty, and empty or malformed optional ones left out, each module completely
        or not at all; the lossy compression of any image. And a sentence that names malformed values, if any.
    """
    taken = _Taken(sources[0])
    shared = taken.patient_and_study()
    shared.update(_loss(sources, taken))
    shared.SpecificCharacterSet = conforming_character_set(sources[0], shared)
    known: dict[Raw, DataElement] = {}
    if text(sources[0], "ImageOrientationPatient"):  # others may differ in the last decimals, which highdicom rejects
        shared.add(_element(sources[0], "ImageOrientationPatient", known))
    cleaned = []
    for source in sources:
        dataset = Dataset()
        dataset.update(shared)
        for keyword in _PER_IMAGE:
            if texts(source, keyword) not in ((), ("",)):
                dataset.add(_element(source, keyword, known))
        dataset.SliceThickness = None  # highdicom requires it; a SEG's value comes from `measures`
        cleaned.append(dataset)
    return cleaned, taken.warnings()


def _element(source: Dataset, keyword: str, known: dict[Raw, DataElement]) -> DataElement:
    """An element of a source; an element that is the same in several images is converted once."""
    raw = raw_of(source, keyword)
    if raw is None:
        return _of_right_vr(source[keyword], source)
    if raw not in known:
        known[raw] = _of_right_vr(source[keyword], source)
    return known[raw]


def _of_right_vr(element: DataElement, source: Dataset) -> DataElement:
    """The element with the VR that PS3.6 gives it: a gateway may have changed it."""
    vr = dictionary_VR(element.tag)
    if vr == element.VR:
        return element
    values = texts(source, element.keyword)
    made = [integer(source, element.keyword)] if vr == VR.US else values
    return DataElement(element.tag, vr, made[0] if len(made) == 1 else list(made), validation_mode=IGNORE)


class _Taken:
    """The patient and study attributes that objects take over from one header; records malformed ones."""

    def __init__(self, header: Dataset) -> None:
        self._header = header
        self._malformed: set[str] = set()

    def warnings(self) -> tuple[str, ...]:
        """One sentence that names attributes, never their values, as those are the patient's."""
        names = ", ".join(sorted(self._malformed))
        return (f"{_NOT_TAKEN}: {names}",) if names else ()

    def values(self, keyword: str, header: Dataset | None = None) -> tuple[str, ...]:
        """The conforming values."""
        values = conforming_values(self._header if header is None else header, keyword)
        if values is None:
            self._malformed.add(keyword)
        return values or ()

    def patient_and_study(self) -> Dataset:
        """Patient, General Study, Patient Study and Clinical Trial Subject modules."""
        dataset = Dataset()
        for keyword in (*_TYPE_2, *_OPTIONAL):
            values = self.values(keyword)
            if values or keyword in _TYPE_2:
                dataset.add(element_of_values(keyword, values))
        self._add_removal(dataset)
        self._add_trial(dataset)
        for keyword in (*_READ, "SpecificCharacterSet"):
            self.values(keyword)
        return dataset

    def _add_removal(self, dataset: Dataset) -> None:
        """A statement that the patient's identity was removed needs the method, which must not be invented."""
        removed, method = self.values("PatientIdentityRemoved"), self.values("DeidentificationMethod")
        codes = self._method_codes()
        if removed == ("YES",) and not method and not codes:
            self._malformed.add("PatientIdentityRemoved")
            return
        for keyword, values in (("PatientIdentityRemoved", removed), ("DeidentificationMethod", method)):
            if values:
                dataset.add(element_of_values(keyword, values))
        if codes:
            dataset.DeidentificationMethodCodeSequence = codes

    def _method_codes(self) -> list[Dataset]:
        keyword = "DeidentificationMethodCodeSequence"
        items = value_of(self._header, keyword)
        if items is None and keyword not in self._header:
            return []
        encodings = encodings_of_header(self._header)
        found = [conforming_code(item, encodings) for item in items] if isinstance(items, PydicomSequence) else [None]
        if None in found:
            self._malformed.add(keyword)
        return [code for code in found if code is not None]

    def _add_trial(self, dataset: Dataset) -> None:
        """The Clinical Trial Subject module, completely or not at all (PS3.3 C.7.1.3)."""
        found = {keyword: self.values(keyword) for keyword in (*_TRIAL, *_TRIAL_SUBJECT, *_TRIAL_TYPE_2)}
        if not all(found[keyword] for keyword in _TRIAL) or not any(found[keyword] for keyword in _TRIAL_SUBJECT):
            self._malformed.update(keyword for keyword, values in found.items() if values)
            return
        for keyword, values in found.items():
            if values or keyword in _TRIAL_TYPE_2:
                dataset.add(element_of_values(keyword, values))


def _loss(sources: Sequence[Dataset], taken: _Taken) -> Dataset:
    """LossyImageCompression and its known details, if any source declares it or has a lossy transfer syntax.

    A transfer syntax gives the method but not the ratio, which is then left out, not invented.
    """
    dataset = Dataset()
    methods = [LOSSY.get(UID(_transfer_syntax_of(source))) for source in sources]
    declared = [source for source in sources if text(source, "LossyImageCompression") == "01"]
    if not declared and not any(methods):
        return dataset
    dataset.LossyImageCompression = "01"
    if declared:
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            values = taken.values(keyword, declared[0])
            if values:
                dataset.add(element_of_values(keyword, values))
    if "LossyImageCompressionMethod" not in dataset and any(methods):
        dataset.LossyImageCompressionMethod = sorted({method for method in methods if method})
    return dataset


def _transfer_syntax_of(source: Dataset) -> str:
    """Transfer syntax UID of a header's file; "" if unknown."""
    meta = getattr(source, "file_meta", None)
    return "" if meta is None else text(meta, "TransferSyntaxUID")
