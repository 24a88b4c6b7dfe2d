"""The figures of a cohort's page: rows are added one at a time, and memory does not grow with their number."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ctflow.cohort.outcome import MarkName, RowOutcome
from ctflow.cohort.report.distribution import LogDistribution, Smallest
from ctflow.cohort.report.timeline import Timeline

_EXAMPLES = 5  # rows named for each reason
_LISTED = 100  # rows listed that are not done
_PICTURED = 24
_MOST_KINDS = 200  # reasons, segments, machines: the page lists no more
_MOST_MESSAGE = 300
_GOOD = ("done", "partly")


@dataclass
class _Ending:
    """Rows that ended for one reason."""

    count: int = 0
    examples: Smallest = field(default_factory=lambda: Smallest(_EXAMPLES))


@dataclass
class _CohortMachine:
    rows: int = 0
    good: int = 0
    seconds: LogDistribution = field(default_factory=LogDistribution)
    busy: float = 0.0
    known: int = 0
    last: str = ""


@dataclass
class _SegmentTotal:
    """A segment over all volumes."""

    volumes: LogDistribution = field(default_factory=LogDistribution)
    findings: int = 0


class CohortSummary:
    """What a page says of the rows that were added, in any order."""

    def __init__(self) -> None:
        self.rows = 0
        self._statuses: Counter[str] = Counter()
        self._kinds: dict[tuple[str, str], _Ending] = {}
        self._machines: dict[str, _CohortMachine] = {}
        self._segments: dict[str, _SegmentTotal] = {}
        self._models: Counter[str] = Counter()
        self._versions: Counter[str] = Counter()
        self._stages: Counter[str] = Counter()
        self._staged = self._repeated = 0
        self._seconds, self._timeline = LogDistribution(), Timeline()
        self._listed, self._pictured, self._damaged = Smallest(_LISTED), Smallest(_PICTURED), Smallest(_EXAMPLES)
        self._damaged_count = 0

    def add(self, outcome: RowOutcome) -> None:
        """Count a row."""
        is_good = outcome.status in _GOOD
        self.rows += 1
        self._statuses[outcome.status] += 1
        self._repeated += outcome.attempt > 1
        self._models[" ".join(filter(None, (outcome.model.get("name"), outcome.model.get("version"))))] += 1
        self._versions[outcome.version] += 1
        self._timeline.add(outcome.finished, outcome.gpu_busy, is_good=is_good)
        self._add_to_machine(outcome, is_good=is_good)
        if outcome.status != "done":
            self._add_fault(outcome)
        if is_good:
            self._add_result(outcome)

    def add_damaged(self, name: MarkName) -> None:
        """Count a row whose marker cannot be read: its name still says what became of it."""
        self.rows += 1
        self._statuses[name.status] += 1
        self._damaged_count += 1
        self._damaged.add(name.id)

    def _add_to_machine(self, outcome: RowOutcome, *, is_good: bool) -> None:
        machine = self._machines.setdefault(outcome.node or "?", _CohortMachine())
        machine.rows += 1
        machine.good += is_good
        machine.last = max(machine.last, outcome.finished)
        machine.seconds.add(outcome.seconds)
        if outcome.gpu_busy is not None:
            machine.busy += outcome.gpu_busy
            machine.known += 1

    def _add_fault(self, outcome: RowOutcome) -> None:
        message = outcome.message[:_MOST_MESSAGE]
        kind = self._kinds.setdefault((outcome.status, outcome.reason), _Ending())
        kind.count += 1
        kind.examples.add((outcome.id, message))
        self._listed.add((outcome.id, outcome.status, outcome.reason, message, outcome.attempt, outcome.node))

    def _add_result(self, outcome: RowOutcome) -> None:
        self._seconds.add(outcome.seconds)
        if outcome.stage_seconds:
            self._stages.update(outcome.stage_seconds)
            self._staged += 1
        for segment in outcome.segments:
            marked = self._segments.setdefault(segment.label, _SegmentTotal())
            marked.volumes.add(segment.volume_ml)
            marked.findings += segment.findings
        if outcome.folders:
            largest = max(outcome.findings, key=lambda finding: finding.volume_ml, default=None)
            folder = largest.folder if largest else outcome.folders[0]
            said = (largest.label, largest.volume_ml) if largest else None
            count = sum(segment.findings for segment in outcome.segments)
            # By a hash of the id: a sample that does not depend on which rows came first.
            order = hashlib.sha256(outcome.id.encode("utf-8", "surrogateescape")).hexdigest()
            self._pictured.add((order, outcome.id, folder, count, said or ("", 0.0)))

    @property
    def document(self) -> dict[str, Any]:
        """All of it, for `ctflow.report.cohort.page`."""
        good = sum(self._statuses[status] for status in _GOOD)
        active_s = self._timeline.active_s
        return {
            "rows": self.rows,
            "statuses": dict(self._statuses),
            "repeated": self._repeated,
            "models": [name for name, _ in _commonest(self._models) if name],
            "versions": [name for name, _ in _commonest(self._versions) if name],
            "good_an_hour": round(good * 3600 / active_s, 1) if good > 1 and active_s else None,
            "active_s": active_s,
            "gpu_busy": self._busy(),
            "findings": sum(each.findings for each in self._segments.values()),
            "seconds": self._seconds.document,
            "stages": [(stage, seconds / self._staged) for stage, seconds in self._stages.items()],
            "timeline": self._timeline.document,
            "reasons": self._reasons(),
            "reasons_left_out": max(len(self._kinds) - _MOST_KINDS, 0),
            "segments": self._segment_rows(),
            "segments_left_out": max(len(self._segments) - _MOST_KINDS, 0),
            "machines": self._machine_rows(),
            "machines_left_out": max(len(self._machines) - _MOST_KINDS, 0),
            "listed": [
                dict(zip(("id", "status", "reason", "message", "attempt", "node"), each, strict=True))
                for each in self._listed.entries
            ],
            "not_done": self.rows - self._statuses["done"],
            "pictured": [
                {"id": row_id, "folder": folder, "findings": count, "largest": said}
                for _, row_id, folder, count, said in sorted(self._pictured.entries, key=lambda each: each[1])
            ],
            "damaged": self._damaged_count,
            "damaged_ids": self._damaged.entries,
        }

    def _busy(self) -> float | None:
        known = sum(machine.known for machine in self._machines.values())
        return sum(machine.busy for machine in self._machines.values()) / known if known else None

    def _reasons(self) -> list[dict[str, Any]]:
        found = sorted(self._kinds.items(), key=lambda each: (-each[1].count, each[0]))
        return [
            {"status": status, "reason": reason, "count": kind.count}
            | {"message": kind.examples.entries[0][1], "ids": [row_id for row_id, _ in kind.examples.entries]}
            for (status, reason), kind in found[:_MOST_KINDS]
        ]

    def _segment_rows(self) -> list[dict[str, Any]]:
        found = sorted(self._segments.items(), key=lambda each: (-each[1].findings, each[0]))
        return [
            {"label": label, "volumes": marked.volumes.count, "findings": marked.findings} | marked.volumes.document
            for label, marked in found[:_MOST_KINDS]
        ]

    def _machine_rows(self) -> list[dict[str, Any]]:
        found = sorted(self._machines.items(), key=lambda each: (-each[1].rows, each[0]))
        return [
            {"name": name, "rows": machine.rows, "good": machine.good, "median_s": machine.seconds.quantile(0.5)}
            | {"gpu_busy": machine.busy / machine.known if machine.known else None, "last": machine.last}
            for name, machine in found[:_MOST_KINDS]
        ]


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:5]
