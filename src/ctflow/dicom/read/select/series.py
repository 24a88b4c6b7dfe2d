"""A series, the verdict on it, and all of a scan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.uid import UID

from ctflow.core.errors import Unexpected
from ctflow.dicom.attributes import texts
from ctflow.dicom.read.scan import Instance

Objection = tuple[str, str]  # reason, message


@dataclass(frozen=True, eq=False)
class Series:
    """The slices that would be stacked.

    Attributes:
        uid: SeriesInstanceUID, as the files say it.
        digest: Its name in messages.
        study_uid: StudyInstanceUID.
        instances: The slices, in the scan's order.
        dropped: Sentences on images of the series that were left out.
    """

    uid: str
    digest: str
    study_uid: str
    instances: tuple[Instance, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Candidate:
    """One series and what decided.

    Attributes:
        series: The series.
        selected: Whether the run selects it.
        reason: "selected", or a short stable name of what speaks against it (docs/dicom.md).
        message: The same as a sentence.
        forced: Selected although a rule in `OVERRIDABLE` speaks against it.
        description: Technical facts for `ctflow inspect`; no patient data and no free text.
    """

    series: Series
    selected: bool
    reason: str
    message: str
    forced: bool
    description: Mapping[str, object]


@dataclass(frozen=True, eq=False)
class Selection:
    """Every series of a scan with its verdict, by UID."""

    candidates: tuple[Candidate, ...]

    @property
    def selected(self) -> tuple[Candidate, ...]:
        """Those that the run selects."""
        return tuple(candidate for candidate in self.candidates if candidate.selected)

    @property
    def orphaned(self) -> tuple[Candidate, ...]:
        """Those set aside that seem to be the end of a selected series."""
        return tuple(candidate for candidate in self.candidates if candidate.reason == "orphaned")

    @property
    def failed(self) -> tuple[Candidate, ...]:
        """Those that could not be judged because of a bug in ctflow."""
        return tuple(candidate for candidate in self.candidates if candidate.reason in Unexpected.REASONS)


def image_words(instance: Instance) -> set[str]:
    """The words of an image's ImageType."""
    return {word for value in texts(instance.header, "ImageType") for word in re.split(r"[^A-Z0-9]+", value.upper())}


def is_localizer(instance: Instance) -> bool:
    """Whether it is a localizer's image."""
    return "LOCALIZER" in image_words(instance)


def class_name(uid: str) -> str:
    """The class as DICOM's tables name it; what they do not may be anything, and is not repeated."""
    if UID(uid).is_private:
        return "a private class"
    return UID(uid).name if UID(uid).type else "an unknown class"
