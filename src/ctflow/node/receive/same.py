"""Is it the same instance in another transfer syntax? Then it is a duplicate, else it must not be taken for one."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.compat.pydicom import lenient
from ctflow.dicom.attributes import PARSE_ERRORS

# Between these nothing differs but how a VR is written. Of compressed ones the pixels would have to be decoded, which
# the node's own process does not do with what a peer sent.
COMPARABLE = frozenset({str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian)})
_PADDING = 0xFFFCFFFC  # DataSetTrailingPadding


@lenient()
def is_same_in_other_syntax(kept: Path, kept_syntax: str, came: bytes, came_syntax: str) -> bool:
    """Whether two files hold the same attributes with the same values, pixels among them.

    Args:
        kept: A DICOM file.
        kept_syntax: Its transfer syntax.
        came: The content of another DICOM file.
        came_syntax: Its transfer syntax.

    Returns:
        False also where that cannot be said: only the little endian syntaxes without compression are compared.
    """
    if not {kept_syntax, came_syntax} <= COMPARABLE:
        return False
    try:
        return _is_same(pydicom.dcmread(kept), pydicom.dcmread(BytesIO(came)))
    except PARSE_ERRORS:
        return False


def _is_same(one: Dataset, other: Dataset) -> bool:
    tags = [
        {tag for tag in each.keys() if tag.element != 0 and tag != _PADDING}  # noqa: SIM118  # group lengths follow
        for each in (one, other)
    ]
    return tags[0] == tags[1] and all(_is_same_value(one, other, tag) for tag in tags[0])


def _is_same_value(one: Dataset, other: Dataset, tag: Any) -> bool:
    raw, its = one.get_item(tag), other.get_item(tag)
    if isinstance(raw, RawDataElement) and isinstance(its, RawDataElement) and raw.value == its.value:
        return True
    element, its_element = one[tag], other[tag]
    if element.VR == its_element.VR == "SQ":
        return len(element.value) == len(its_element.value) and all(map(_is_same, element.value, its_element.value))
    return bool(element.value == its_element.value)
