"""An Enhanced CT's frames as single slices: each with a header of its own, as a single-frame CT image has it.

What stacks, temporal positions and concatenations a series holds is then for the rules that every series passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian
from pydicom.valuerep import VR

from ctflow.core.errors import counted
from ctflow.dicom.attributes import PARSE_ERRORS, integer, text, texts, value_of
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.uids import ENHANCED_CT_STORAGE

MOST_FRAMES = 20_000
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
FUNCTIONAL_GROUPS = frozenset({Tag(_SHARED), Tag(_PER_FRAME)})
_NOT_TAKEN = FUNCTIONAL_GROUPS | {Tag("DimensionIndexSequence"), Tag("NumberOfFrames")}
# What a frame's groups never say: whose it is, which object, how its pixels are stored.
_OF_OBJECT = frozenset(
    Tag(keyword)
    for keyword in (
        "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality",
        "SpecificCharacterSet", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated",
        "BitsStored", "HighBit", "PixelRepresentation", "ConcatenationUID", "NumberOfFrames",
    )
)  # fmt: skip
_PATIENT_GROUP = 0x0010
# An Enhanced CT's name of what a CT image calls otherwise (DICOM PS3.3 C.8.15.2 and C.7.6.16.2).
_RENAMED = {
    "FrameType": "ImageType",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
    "FrameLaterality": "Laterality",
}
_Attribute = RawDataElement | DataElement
_Attributes = dict[BaseTag, _Attribute]


def is_enhanced(instance: Instance) -> bool:
    """Whether a file is an Enhanced CT, or one that was converted from CT images (Legacy Converted)."""
    return text(instance.header, "SOPClassUID") in ENHANCED_CT_STORAGE


def frames_of_series(instances: Sequence[Instance]) -> tuple[tuple[Instance, ...], str]:
    """Every Enhanced CT of a series as its frames.

    Args:
        instances: The series' files, of any class.

    Returns:
        The files and frames; and why the frames are no slices, empty if they are.
    """
    whole = [instance for instance in instances if is_enhanced(instance)]
    if not whole:
        return tuple(instances), ""
    flaw = _flaw_of_concatenations(whole)
    found: list[Instance] = []
    for instance in instances:
        frames = _frames(instance) if not flaw and is_enhanced(instance) else [instance]
        if isinstance(frames, str):
            return tuple(instances), f"{instance.name}: {frames}"
        found += frames
    return tuple(found), flaw


def _flaw_of_concatenations(instances: Iterable[Instance]) -> str:
    """Parts of one object that was sent in several files; a missing one would leave no gap if it was the last."""
    parts: dict[str, list[Instance]] = {}
    for instance in instances:
        uid = text(instance.header, "ConcatenationUID")
        if uid:
            parts.setdefault(uid, []).append(instance)
    for files in parts.values():
        numbers = {integer(each.header, "InConcatenationNumber") for each in files}
        totals = {integer(each.header, "InConcatenationTotalNumber") for each in files} - {None}
        wanted = max((total for total in totals if total is not None), default=len(numbers))
        if numbers != set(range(1, wanted + 1)):
            there = sum(number is not None for number in numbers)
            return f"its concatenation has {wanted} parts, of which {there} are here: send the whole series"
    return ""


def _frames(instance: Instance) -> list[Instance] | str:
    """The frames of an Enhanced CT, or why it has none that can be read."""
    header = instance.header
    count = integer(header, "NumberOfFrames") or 0
    per_frame, shared = _items(header, _PER_FRAME), _items(header, _SHARED)
    if not 1 <= count <= MOST_FRAMES or len(per_frame) != count:
        described = counted(len(per_frame), "frame")
        return f"NumberOfFrames says {count}, but it describes {described}: have the sender repair it"
    if instance.transfer_syntax == DeflatedExplicitVRLittleEndian:
        return "an Enhanced CT in the deflated transfer syntax is not supported: have it sent in another"
    size = (integer(header, "Rows") or 0) * (integer(header, "Columns") or 0) * (integer(header, "BitsAllocated") or 0)
    if size % 8 or (size // 8 % 2 and instance.transfer_syntax == ExplicitVRBigEndian):
        return "its frames do not begin at whole bytes or words: have it sent in another transfer syntax"
    try:
        common = _flat(shared[0]) if shared else {}
        return [
            _frame(instance, index, size // 8, count, {**common, **_flat(each)}) for index, each in enumerate(per_frame)
        ]
    except PARSE_ERRORS as error:
        return f"its functional groups are damaged ({type(error).__name__}): have it sent again"


def _items(header: Dataset, keyword: str) -> Sequence[Dataset]:
    found = value_of(header, keyword)
    return found if isinstance(found, Sequence) else ()


def _flat(groups: Dataset) -> _Attributes:
    """The attributes of a frame's functional groups, without the groups."""
    found: _Attributes = {}
    for group in groups:
        for item in group.value[:1] if group.VR == VR.SQ else ():
            found |= {tag: element for tag, element in item.items() if _is_of_frame(tag, element)}
    return found


def _is_of_frame(tag: BaseTag, element: _Attribute) -> bool:
    return element.VR != VR.SQ and tag not in _OF_OBJECT and tag.group != _PATIENT_GROUP


def _element(keyword: str, *values: str) -> DataElement:
    """An element of text, unchecked: whatever reads it checks it."""
    value = values[0] if len(values) == 1 else list(values)
    return DataElement(Tag(keyword), dictionary_VR(keyword), value, validation_mode=IGNORE)


def _frame(instance: Instance, index: int, size: int, count: int, own: Mapping[BaseTag, _Attribute]) -> Instance:
    """A frame: where its pixels lie, and its header."""
    header = instance.header
    flat = Dataset({**{tag: element for tag, element in header.items() if tag not in _NOT_TAKEN}, **own})
    if hasattr(header, "file_meta"):  # not where an inspection keeps less
        flat.file_meta = header.file_meta
    implicit, little = header.original_encoding
    flat.set_original_encoding(implicit, little, header.original_character_set)
    for keyword, usual in _RENAMED.items():
        values = texts(flat, keyword)
        if values:
            flat[usual] = _element(usual, *values)
    moment = text(flat, "FrameAcquisitionDateTime")
    if len(moment) >= len("YYYYMMDDHHMMSS") and moment[:14].isdecimal():
        flat["AcquisitionDate"] = _element("AcquisitionDate", moment[:8])
        flat["AcquisitionTime"] = _element("AcquisitionTime", re.split("[+-]", moment[8:])[0])
    number = (integer(header, "ConcatenationFrameOffsetNumber") or 0) + index + 1
    flat["InstanceNumber"] = _element("InstanceNumber", str(number))
    flat["ReferencedFrameNumber"] = _element("ReferencedFrameNumber", str(index + 1))
    if not text(header, "ConcatenationUID"):  # tells the files of a series apart, as that of one in parts does
        flat["ConcatenationUID"] = _element("ConcatenationUID", text(header, "SOPInstanceUID"))
    found = replace(instance, header=flat, name=f"{instance.name} frame {index + 1}", frame=index + 1, frames=count)
    if instance.pixel_offset is None:
        return found
    rest = max(instance.pixel_length - index * size, 0)
    is_last = index + 1 == count
    return replace(
        found, pixel_offset=instance.pixel_offset + index * size, pixel_length=rest if is_last else min(size, rest)
    )
