"""UIDs: the classes that ctflow reads, and whether a result can refer to a source's UIDs.

The results' own UIDs are made in `ctflow.dicom.write.identity`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydicom.dataset import Dataset

from ctflow.dicom.attributes import texts

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_STORAGE = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
# A result refers to its source by these: they cannot be left out, and no reader could resolve a replacement.
REFERRED_TO = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_MOST = 64
_DIGITS = re.compile(r"[0-9.]+")
_COMPONENTS = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*")


def malformed_uids(headers: Iterable[Dataset]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Attributes with a malformed UID in any of the headers; an empty one is not malformed.

    Returns:
        Those that hold anything but one text of at most 64 digits and dots; and those whose digits and dots are no UID
        because a component is empty or has a leading 0, which most readers accept.

    Source: DICOM PS3.5 9.1. Whether a root is registered is not checked.
    """
    senseless, untidy = set(), set()
    for header in headers:
        for keyword in REFERRED_TO:
            values = texts(header, keyword)
            if not any(values):
                continue
            if len(values) > 1 or len(values[0]) > _MOST or not _DIGITS.fullmatch(values[0]):
                senseless.add(keyword)
            elif not _COMPONENTS.fullmatch(values[0]):
                untidy.add(keyword)
    return tuple(sorted(senseless)), tuple(sorted(untidy))
