"""Common to all objects that ctflow writes: equipment, dates, character set, names, and writing the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from pydicom.charset import convert_encodings
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import UID
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR, VR

from ctflow.compat.pydicom import lenient
from ctflow.core.atomic import write_atomically
from ctflow.core.model import RESEARCH_ONLY, Code, ModelSpec, Segment
from ctflow.dicom.attributes import integer, texts
from ctflow.dicom.write.conformance import conforming_values, holds_text
from ctflow.dicom.write.encode import elements_of, save_dataset
from ctflow.dicom.write.identity import uid_from_parts

ALGORITHM_SOURCE = "ctflow"
_LONG_STRING = 64  # characters of VR LO
_PER_FRAME_GROUPS = 0x52009230  # thousands of items without text
_OWN_TEXT_VR = CUSTOMIZABLE_CHARSET_VR - {VR.PN}


@dataclass(frozen=True)
class Provenance:
    """The origin of a mask.

    Attributes:
        ctflow_version: The version that writes.
        weights_digest: SHA-256 of the model's weights, as hexadecimal digits.
        settings: Every setting that changes the result.
    """

    ctflow_version: str
    weights_digest: str
    settings: Mapping[str, str | int | float | bool | None]


def algorithm_parameters(provenance: Provenance) -> dict[str, str]:
    """The parameters of an algorithm identification (DICOM PS3.16 TID 4019), by name."""
    return {
        "weights_sha256": provenance.weights_digest,
        "ctflow_version": provenance.ctflow_version,
        **{key: str(value) for key, value in provenance.settings.items()},
    }


def equipment(spec: ModelSpec, provenance: Provenance) -> dict[str, str]:
    """Arguments of highdicom's objects on the writer and the character set."""
    return {
        "manufacturer": ALGORITHM_SOURCE,
        "manufacturer_model_name": fitted(spec.name),
        "software_versions": provenance.ctflow_version,
        "device_serial_number": provenance.weights_digest[:12],
        "specific_character_set": "ISO_IR 192",  # highdicom rejects valid ones; `give_text_encoding` decides
    }


def tracking_id(segment: Segment, spec: ModelSpec) -> str:
    """Name of what a segment marks, the same in all runs of a model for a class; not yet fitted to an attribute."""
    return f"{spec.name} {segment.label}" + (f" {segment.number}" if segment.part_of is None else "")


def finding_uid(segmentation_uid: str, class_number: int, rank: int | None) -> UID:
    """Tracking UID of one finding.

    It derives from this SEG, not the series: the second largest of another run need not be the same tumour.

    Args:
        segmentation_uid: SOPInstanceUID of the SEG.
        class_number: Of the segment that marks the finding's class.
        rank: The largest is 1; None means all unlisted ones.
    """
    return uid_from_parts("finding", segmentation_uid, str(class_number), "others" if rank is None else str(rank))


def concept(code: Code) -> DicomCode:
    """A bundle's code as pydicom's."""
    return DicomCode(code.value, code.scheme, code.meaning)


def fitted(value: str) -> str:
    """Text that fits a Long String: no backslash, no control characters, at most 64 characters."""
    return re.sub(r"[\\\x00-\x1f]+", " ", value).strip()[:_LONG_STRING].strip() or "unnamed"


def series_number(header: Dataset, place: int) -> int:
    """A result's SeriesNumber, which sorts results next to their source.

    Args:
        header: Of a source image.
        place: 1 to 99, a different one for each kind of object.

    Returns:
        100 times the source's plus `place`; `place` alone if the source's is unusable.
    """
    source = integer(header, "SeriesNumber")
    return source * 100 + place if source is not None and 0 <= source < 2**31 // 100 - 1 else place


def series_description(spec: ModelSpec, made_by: str, part: str = "") -> str:
    """At most 64 characters: `made_by` and the model's name; research-only instead if the model is only for that.

    Args:
        spec: The model's.
        made_by: What it made.
        part: Which volume of the source series, if that holds several; it comes before the model's name.
    """
    words = (RESEARCH_ONLY, part, spec.name) if spec.demonstration else (part, f"{made_by} {spec.name}")
    return fitted(": ".join(filter(None, words)))


def give_text_encoding(dataset: Dataset, cleaned: Dataset) -> None:
    """Take over character set and time zone; highdicom rejects valid character sets and drops the zone.

    UTF-8 replaces a character set that cannot hold the model's own words (a segment's label, for example).
    """
    for keyword in ("SpecificCharacterSet", "TimezoneOffsetFromUTC"):
        if keyword in cleaned:
            dataset[keyword] = copy(cleaned[keyword])  # a copy: other objects are made from the same images
    encodings = convert_encodings(list(texts(cleaned, "SpecificCharacterSet")))
    if not all(holds_text(encodings, value) for value in _own_texts(dataset)):
        dataset.SpecificCharacterSet = "ISO_IR 192"


def _own_texts(dataset: Dataset) -> Iterator[str]:
    """Every text that the character set applies to, except names: they came in it; pydicom writes them in another."""
    waiting, seen = [dataset], {id(dataset)}  # a report's findings share most of their items
    while waiting:
        for element in elements_of(waiting.pop()):
            if element.VR == VR.SQ and element.tag != _PER_FRAME_GROUPS:
                new = [item for item in element.value if id(item) not in seen]
                seen.update(map(id, new))
                waiting.extend(new)
            elif element.VR in _OWN_TEXT_VR:
                values = element.value
                yield from (values,) if isinstance(values, str) else values or ()


def give_moment(dataset: Dataset, date: str, time: str) -> None:
    """Replace every date and time that highdicom reads from the clock."""
    dataset.ContentDate = dataset.SeriesDate = date
    dataset.ContentTime = dataset.SeriesTime = time
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in dataset:
            del dataset[keyword]
    for equipment in dataset.get("ContributingEquipmentSequence", []):
        equipment.ContributionDateTime = date + time


def moment_of(header: Dataset) -> tuple[str, str]:
    """Date and time of the acquisition, or the source's nearest to it; 1900 if it has none."""
    for kind in ("Acquisition", "Content", "Series", "Study"):
        date, time = (conforming_values(header, f"{kind}{what}") for what in ("Date", "Time"))
        if date:
            return date[0], time[0] if time and len(time[0]) >= len("HHMMSS") else "000000"
    return "19000101", "000000"  # ContentDate may not be empty, and a plausible date would be invented


@lenient()
def write_dataset(dataset: Dataset, path: Path) -> None:
    """Write a DICOM file atomically.

    Raises:
        OutputError: It cannot be written.
    """
    write_atomically(path, lambda stream: save_dataset(dataset, stream))
