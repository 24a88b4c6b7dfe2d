"""A series, its verdict, and all verdicts of a scan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.uid import UID

from ctflow.core.errors import Unexpected
from ctflow.dicom.attributes import texts
from ctflow.dicom.read.scan import Instance

Objection = tuple[str, str]  # reason, message


@dataclass(frozen=True)
class VolumePart:
    """What tells one volume of a series from its others.

    Attributes:
        name: In file names, such as "phase-50".
        label: For people, such as "phase 50 %"; no free text of the headers.
        number: 1 for the first volume of the series.
        count: Volumes of the series.
        values: Names and values by which `--volume` finds it, such as ("phase", "50").
    """

    name: str
    label: str
    number: int
    count: int
    values: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True, eq=False)
class Series:
    """The slices to stack: a series, or one volume of a series that holds several.

    Attributes:
        uid: SeriesInstanceUID, as in the files.
        digest: Its name in messages.
        study_uid: StudyInstanceUID.
        instances: The slices, in the scan's order.
        dropped: Sentences on images that were left out of the series.
        part: Which volume of the series it is; None if the series is one volume.
        flaw: Why the frames of its Enhanced CT cannot be read; empty if they can.
    """

    uid: str
    digest: str
    study_uid: str
    instances: tuple[Instance, ...]
    dropped: tuple[str, ...] = ()
    part: VolumePart | None = None
    flaw: str = ""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One series and its verdict.

    Attributes:
        series: The series.
        selected: Whether the run selects it.
        reason: "selected", or a short stable name of why it is rejected (docs/dicom.md).
        message: The same as a sentence.
        forced: Selected although a rule in `OVERRIDABLE` rejects it.
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
        """The series that the run selects."""
        return tuple(candidate for candidate in self.candidates if candidate.selected)

    @property
    def orphaned(self) -> tuple[Candidate, ...]:
        """Rejected series that seem to be the end of a selected one."""
        return tuple(candidate for candidate in self.candidates if candidate.reason == "orphaned")

    @property
    def failed(self) -> tuple[Candidate, ...]:
        """Series that could not be judged because of a bug in ctflow."""
        return tuple(candidate for candidate in self.candidates if candidate.reason in Unexpected.REASONS)


def image_words(instance: Instance) -> set[str]:
    """The words of an image's ImageType."""
    return {word for value in texts(instance.header, "ImageType") for word in re.split(r"[^A-Z0-9]+", value.upper())}


def is_localizer(instance: Instance) -> bool:
    """Whether an image is a localizer."""
    return "LOCALIZER" in image_words(instance)


def class_name(uid: str) -> str:
    """The class by its name in DICOM's tables; an unknown one may be anything, and is not repeated."""
    if UID(uid).is_private:
        return "a private class"
    if uid == "1.2.840.10008.5.1.4.1.1.66.7":  # pydicom's tables do not list it yet
        return "Label Map Segmentation Storage"
    return UID(uid).name if UID(uid).type else "an unknown class"
