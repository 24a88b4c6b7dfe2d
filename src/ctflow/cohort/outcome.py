"""What became of a row: its commit marker, whose name alone says whether the row is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

RowStatus = Literal["done", "partly", "rejected", "failed"]
RowName = tuple[str, str]  # a row's id and fingerprint
SCHEMA_VERSION = "1"
_NAME = re.compile(rf"(?P<id>.+)\.(?P<fingerprint>[0-9a-f]{{12}})\.(?P<status>{'|'.join(get_args(RowStatus))})\.json")


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


@dataclass(frozen=True)
class RowOutcome:
    """The content of a commit marker; no path and no patient data.

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

    @property
    def name(self) -> MarkName:
        """Its marker's."""
        return MarkName(self.id, self.fingerprint, self.status)

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "folders": list(self.folders)}
