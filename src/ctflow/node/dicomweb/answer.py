"""The answer to a STOW-RS request: what became of each instance (PS3.18 10.5.3, in the JSON of Annex F)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctflow.dicomweb.stored import (
    FAILED,
    FAILURE_REASON,
    OTHER_FAILURES,
    REFERENCED,
    RETRIEVE_URL,
    SOP_CLASS,
    SOP_INSTANCE,
)

# PS3.18 Table I.2-2.
UNSUPPORTED_CLASS, UNSUPPORTED_SYNTAX = 0x0122, 0xC122


@dataclass(frozen=True)
class StoreOutcome:
    """What became of a part.

    Attributes:
        status: 0 if it is stored, else the reason (PS3.18 Table I.2-2).
        sop_class_uid: Of the instance, as far as it is known.
        sop_instance_uid: Of the instance, as far as it is known.
    """

    status: int
    sop_class_uid: str = ""
    sop_instance_uid: str = ""


def document_of_outcomes(outcomes: Sequence[StoreOutcome]) -> dict[str, Any]:
    """The data set of the answer; this node retrieves nothing, so Retrieve URL has no value."""
    stored = [{**_reference(each), RETRIEVE_URL: {"vr": "UR"}} for each in outcomes if each.status == 0]
    failed = [
        {**_reference(each), FAILURE_REASON: _reason(each)}
        for each in outcomes
        if each.status and each.sop_instance_uid
    ]
    other = [{FAILURE_REASON: _reason(each)} for each in outcomes if each.status and not each.sop_instance_uid]
    sequences = {FAILED: failed, REFERENCED: stored, OTHER_FAILURES: other}
    return {
        RETRIEVE_URL: {"vr": "UR"},
        **{tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items() if items},
    }


def status_of_outcomes(outcomes: Sequence[StoreOutcome]) -> int:
    """HTTP's status (PS3.18 10.5.3.1): 200 all stored, 202 some; 503 none, but later perhaps; else 409."""
    failed = [each.status for each in outcomes if each.status]
    if not failed:
        return 200
    if len(failed) < len(outcomes):
        return 202
    return 503 if all(status >> 8 == 0xA7 for status in failed) else 409


def _reference(outcome: StoreOutcome) -> dict[str, Any]:
    return {
        SOP_CLASS: {"vr": "UI", "Value": [outcome.sop_class_uid]} if outcome.sop_class_uid else {"vr": "UI"},
        SOP_INSTANCE: {"vr": "UI", "Value": [outcome.sop_instance_uid]},
    }


def _reason(outcome: StoreOutcome) -> dict[str, Any]:
    return {"vr": "US", "Value": [outcome.status]}
