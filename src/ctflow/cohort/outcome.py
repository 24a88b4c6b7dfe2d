"""What became of a row: its commit marker, whose name alone says whether the row is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

RowStatus = Literal["done", "partly", "rejected", "failed"]  # the best first
RowName = tuple[str, str]  # a row's id and fingerprint
SCHEMA_VERSION = "1"  # of what all rows have in common
_MARKER_VERSION = "2"  # 1 had no segments, findings, seconds of stages and GPU
_NAME = re.compile(
    rf"(?P<id>[!-~]+)\.(?P<fingerprint>[0-9a-f]{{12}})\.(?P<status>{'|'.join(get_args(RowStatus))})\.json"
)


@dataclass(frozen=True, order=True)
class MarkName:
    """The name of a commit marker: a list of names says what is done, and no marker need be read.

    Attributes:
        id: The row's.
        fingerprint: The row's: one that asks for something else is not done.
        status: "done"; "partly" (some of its volumes, or files could not be read); "rejected" (its content cannot be
            segmented); "failed" (set aside after its last attempt).
    """

    id: str
    fingerprint: str
    status: RowStatus

    def __str__(self) -> str:
        return f"{self.id}.{self.fingerprint}.{self.status}.json"

    @classmethod
    def from_text(cls, name: str) -> MarkName | None:
        """The parts of a name; None if it is not a marker's."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match["id"], match["fingerprint"], cast("RowStatus", match["status"]))


def best_mark(names: Iterable[MarkName]) -> MarkName | None:
    """That of the best outcome among several of a row, which several processes may have written; None of none."""
    order: tuple[RowStatus, ...] = get_args(RowStatus)
    return min(names, key=lambda name: (order.index(name.status), name), default=None)


def is_kept(own: MarkName, earlier: Collection[MarkName], is_there: Callable[[MarkName], bool]) -> bool:
    """Whether a row's result is kept instead of a new one: it is better, or as good and of another process.

    Args:
        own: The new outcome's.
        earlier: Markers of results that the new one was to replace.
        is_there: Whether the destination has a marker.
    """
    for status in get_args(RowStatus):
        name = MarkName(own.id, own.fingerprint, status)
        if status == own.status:
            return name not in earlier and is_there(name)
        if is_there(name):
            return True
    return False


@dataclass(frozen=True)
class RowSegment:
    """A segment of a row's result.

    Attributes:
        folder: Result folder of its volume.
        label: Its name.
        volume_ml: Of all its findings.
        findings: How many there are, listed or not.
    """

    folder: str
    label: str
    volume_ml: float
    findings: int


@dataclass(frozen=True)
class RowFinding:
    """A finding of a row's result, as result.json lists it.

    Attributes:
        folder: Result folder of its volume.
        label: Its segment's name.
        number: Its place among its segment's findings, from 1.
        volume_ml: As in `ctflow.measurements.measure.Finding`, and so the others.
        longest_diameter_mm: As there.
        long_axis_mm: As there.
        short_axis_mm: As there.
        mean_hu: As there.
        implausible: As there.
    """

    folder: str
    label: str
    number: int
    volume_ml: float
    longest_diameter_mm: float
    long_axis_mm: float
    short_axis_mm: float
    mean_hu: float
    implausible: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowOutcome:
    """The content of a commit marker, which is enough for all tables; no path and no patient data.

    Attributes:
        id: The row's.
        fingerprint: The row's.
        status: As of `MarkName`.
        reason: "done", or the stable name of why it is not.
        message: The same as a sentence.
        exit_code: That `ctflow run` would end with.
        attempt: From 1.
        seconds: From the beginning of the attempt until its result was complete.
        digest: Of the result's DICOM files; empty if there are none.
        input_digest: Of the series' files, if the manifest gave one.
        folders: Result folders of the series' volumes.
        model: Name, version and weights digest.
        version: ctflow's.
        node: Name of the machine.
        part: The share of which the row was computed.
        finished: When, in UTC.
        segments: What was looked for, found or not.
        findings: The largest of what was found.
        stage_seconds: Seconds of each stage, over the row's volumes.
        gpu_busy: Share of the time since the machine's last commit in which its GPU computed; None if not known.
    """

    id: str
    fingerprint: str
    status: RowStatus
    reason: str
    message: str
    exit_code: int
    attempt: int
    seconds: float
    digest: str = ""
    input_digest: str = ""
    folders: tuple[str, ...] = ()
    model: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    node: str = ""
    part: str = ""
    finished: str = ""
    segments: tuple[RowSegment, ...] = ()
    findings: tuple[RowFinding, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    gpu_busy: float | None = None

    @property
    def name(self) -> MarkName:
        """Its marker's."""
        return MarkName(self.id, self.fingerprint, self.status)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"schema_version": _MARKER_VERSION, **asdict(self)}
