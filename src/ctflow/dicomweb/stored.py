"""The data set that answers a store transaction (STOW-RS, PS3.18 10.5.3), in the JSON of PS3.18 Annex F."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEDIA_TYPE = "application/dicom+json"
RETRIEVE_URL, FAILED, REFERENCED, OTHER_FAILURES = "00081190", "00081198", "00081199", "0008119A"
SOP_CLASS, SOP_INSTANCE = "00081150", "00081155"
WARNING_REASON, FAILURE_REASON = "00081196", "00081197"
# A server that has the instance says so as a failure: PS3.7 C.5.7 (duplicate SOP instance).
_DUPLICATE = 0x0111


@dataclass(frozen=True)
class StoredWord:
    """What an answer says of one instance.

    Attributes:
        is_stored: Whether the server has it, now or from before.
        reason: The warning or failure reason (PS3.18 Table I.2-2); None if there is none.
    """

    is_stored: bool
    reason: int | None = None


def word_of_answer(document: object, sop_instance_uid: str) -> StoredWord | None:
    """What the answer to a store transaction of one instance says of it.

    Args:
        document: The parsed JSON, whatever it is.
        sop_instance_uid: Of the instance.

    Returns:
        None if the answer does not mention it.
    """
    for item in _items(document, REFERENCED):
        if _value(item, SOP_INSTANCE) == sop_instance_uid:
            return StoredWord(is_stored=True, reason=_number(item, WARNING_REASON))
    for item in _items(document, FAILED):
        if _value(item, SOP_INSTANCE) in (sop_instance_uid, None):  # a request has one object
            reason = _number(item, FAILURE_REASON)
            # Some servers list warnings as failures; all of them mean that it is stored (PS3.4 B.2.3).
            is_stored = reason is not None and (reason == _DUPLICATE or reason >> 12 == 0xB)
            return StoredWord(is_stored, reason)
    for item in _items(document, OTHER_FAILURES):
        return StoredWord(is_stored=False, reason=_number(item, FAILURE_REASON))
    return None


def _items(document: object, tag: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(document, list):  # some servers put the data set into a list
        document = document[0] if document else None
    element = document.get(tag) if isinstance(document, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _value(item: Mapping[str, Any], tag: str) -> object:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _number(item: Mapping[str, Any], tag: str) -> int | None:
    value = _value(item, tag)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0xFFFF else None
