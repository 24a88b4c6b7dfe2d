"""UIDs: the classes that ctflow reads, and whether a result can refer to a source's UIDs.

The results' own UIDs are made in `ctflow.dicom.write.identity`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from pydicom.dataset import Dataset

from ctflow.dicom.attributes import texts

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_STORAGE = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
# A result refers to its source by these: they cannot be left out, and no reader could resolve a replacement.
REFERRED_TO = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_MOST = 64
_DIGITS = re.compile(r"[0-9.]+")
_UidFlaw = Literal["senseless", "untidy"]
_COMPONENTS = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*")


def malformed_uids(headers: Iterable[Dataset]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Attributes with a malformed UID in any of the headers; an empty one is not malformed.

    Returns:
        Those that hold anything but one text of at most 64 digits and dots; and those whose digits and dots are no UID
        because a component is empty or has a leading 0, which most readers accept.

    Source: DICOM PS3.5 9.1. Whether a root is registered is not checked.
    """
    flaws: dict[_UidFlaw, set[str]] = {"senseless": set(), "untidy": set()}
    for header in headers:
        for keyword in REFERRED_TO:
            flaw = _flaw_of(texts(header, keyword))
            if flaw is not None:
                flaws[flaw].add(keyword)
    return tuple(sorted(flaws["senseless"])), tuple(sorted(flaws["untidy"]))


@lru_cache(2**12)
def _flaw_of(values: tuple[str, ...]) -> _UidFlaw | None:
    """What is wrong with an attribute's values, most of which are the same in all slices."""
    if not any(values):
        return None
    if len(values) > 1 or len(values[0]) > _MOST or not _DIGITS.fullmatch(values[0]):
        return "senseless"
    return None if _COMPONENTS.fullmatch(values[0]) else "untidy"
