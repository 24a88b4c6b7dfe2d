"""The journal's records in readable form: words, times, sizes; `pages` makes every text `plain`. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from ctflow.node.deliver.send import COPY, WHOLE
from ctflow.node.journal.records import EventRecord, SeriesRecord, SeriesState
from ctflow.report.cohort.svg import commits_chart

_LONGEST_TEXT = 500


@dataclass(frozen=True)
class Shown:
    """A state as shown on the page; `tone` is a class of the style sheet, the word says the same without colour."""

    name: str
    label: str
    tone: str


STATES: Mapping[SeriesState, Shown] = {
    "received": Shown("received", "Receiving", "accent"),
    "complete": Shown("complete", "Waiting", "dim"),
    "running": Shown("running", "Running", "accent"),
    "done": Shown("done", "Result ready", "accent"),
    "delivered": Shown("delivered", "Delivered", "good"),
    "aside": Shown("aside", "Set aside", "warn"),
    "dead": Shown("dead", "Failed", "bad"),
    "discarded": Shown("discarded", "Discarded", "dim"),
}
DELIVERY_STATES = {
    "waiting": Shown("waiting", "Waiting", "accent"),
    "stored": Shown("stored", "Sent, awaiting commitment", "accent"),
    "sent": Shown("sent", "Sent", "good"),
    "dead": Shown("dead", "Failed", "bad"),
    "withdrawn": Shown("withdrawn", "Withdrawn", "dim"),
}
CAN_RETRY: frozenset[SeriesState] = frozenset({"aside", "dead", "discarded"})
CANNOT_DISCARD: frozenset[SeriesState] = frozenset({"discarded", "delivered"})
ATTENTION: tuple[SeriesState, ...] = ("aside", "dead")
EVENT_TONES = {"aside": "warn", "dead": "bad", "refused": "warn", "rejected": "warn", "delivered": "good"}
EVENT_NAMES = {"aside": "set aside", "dead": "failed", "done": "result", "retry": "waits"}  # others: unchanged
_NO_RESULT: Mapping[SeriesState, str] = {
    "received": "The series is still arriving.",
    "complete": "The series waits for a worker.",
    "running": "The model is running.",
}


def plain(value: object) -> str:
    """A sender's text in one line; invisible characters (controls, changes of direction) become a mark."""
    text = str(value)
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:_LONGEST_TEXT])
    return f"{shown}\N{HORIZONTAL ELLIPSIS}" if len(text) > _LONGEST_TEXT else shown


# -------------------------------------------------------------------------------------------------- times and sizes


@dataclass(frozen=True)
class Moment:
    """A time: for machines, in full, short (with the day only if it differs), and as an age."""

    iso: str
    full: str
    short: str
    ago: str


def moment(seconds: float, now: float) -> Moment:
    """A Unix time as the page shows it, in the machine's time zone."""
    when, today = datetime.fromtimestamp(seconds).astimezone(), datetime.fromtimestamp(now).astimezone()
    short = f"{when:%H:%M:%S}" if when.date() == today.date() else f"{when:%d %b %H:%M}"
    if when.year != today.year:
        short = f"{when:%d %b %Y}"
    return Moment(when.isoformat(timespec="seconds"), f"{when:%Y-%m-%d %H:%M:%S %Z}", short, _ago(now - seconds))


def _ago(seconds: float) -> str:
    if seconds < 1:
        return "now"
    return f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """A span with its largest unit: `8 s`, `3 min`, `5 h`, `12 days`."""
    for limit, unit, factor in ((100, "s", 1), (6000, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def zone() -> str:
    """The machine's time zone."""
    return time.strftime("%Z") or "the machine's time zone"


def day_chart(hours: Sequence[Mapping[str, Any]], *, is_wide: bool) -> Markup:
    """The hours of `JournalReader.last_day` as bars, in UTC."""
    bins = [{**hour, "at": datetime.fromtimestamp(hour["at"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")} for hour in hours]
    return commits_chart({"bins": bins, "width_s": 3600}, is_wide=is_wide)


def hour_text(seconds: float) -> str:
    """The hour that begins at a Unix time, in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%d %b %H:%M}"


def byte_size(count: float) -> str:
    """Bytes with a unit: `145 MB`, `1.2 GB`."""
    for limit, unit, factor in ((1e6, "kB", 1e3), (1e9, "MB", 1e6), (1e12, "GB", 1e9)):
        if count < limit:
            return f"{count / factor:.{0 if count / factor >= 10 or unit == 'kB' else 1}f} {unit}"
    return f"{count / 1e12:.1f} TB"


def thousands(count: int) -> str:
    """A count with thin spaces between thousands."""
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


# ----------------------------------------------------------------------------------------------------------- series


def no_result_text(state: SeriesState) -> str:
    """The text in place of a missing result."""
    return _NO_RESULT.get(state, "There is none.")


def retry_label(series: SeriesRecord, now: float) -> str | None:
    """The label of the retry button; None if there is nothing to retry."""
    if series.state in CAN_RETRY:
        return "Try again"
    return "Try now" if series.state == "complete" and series.next_at > now else None


def reason(series: SeriesRecord, now: float) -> str | None:
    """The reason for its state; and when a series that failed temporarily is retried."""
    # While it runs, an earlier obstacle no longer applies.
    said = None if series.state == "running" else series.message
    if series.state == "complete" and series.next_at > now:
        return f"{said or 'tried before'}; again in {duration(series.next_at - now)}"
    if series.state == "received" and series.refused:
        many = "1 instance was" if series.refused == 1 else f"{thousands(series.refused)} instances were"
        return f"{many} refused and must be sent again"
    return said


def facts(series: SeriesRecord, classes: Mapping[str, int], now: float, *, patient_data: bool) -> list[tuple[str, str]]:
    """The facts about a series, as terms and values.

    Args:
        series: The record.
        classes: Names of its SOP classes and transfer syntaxes, and how many instances have each.
        now: Unix time.
        patient_data: Whether the patient and the UIDs may be shown.
    """
    found: list[tuple[str, str]] = []
    if patient_data and series.patient is not None:
        terms = ("Patient", "Patient ID", "Birth date", "Accession number")
        found += [(term, value or "none") for term, value in zip(terms, astuple(series.patient), strict=True)]
    if patient_data:
        found += [("Study UID", series.study_uid), ("Series UID", series.series_uid)]
    expected = "" if series.expected_instances is None else f" of {thousands(series.expected_instances)} announced"
    found += [
        ("Sender", series.calling_ae),
        ("Address", series.peer),
        ("Modality", series.modality or "not given"),
        ("Instances", f"{thousands(series.instances)}{expected}, {byte_size(series.bytes)}"),
        *((f"{thousands(count)} of them" if len(classes) > 2 else "Kind", name) for name, count in classes.items()),
        ("First instance", moment(series.first_at, now).full),
        ("Last instance", moment(series.last_at, now).full),
    ]
    if series.duplicates:
        found.append(("Came again", thousands(series.duplicates)))
    if series.attempts:
        found.append(("Attempts", str(series.attempts)))
    return found


@dataclass(frozen=True)
class TimelineStep:
    """A step in a series' processing."""

    label: str
    tone: str
    at: Moment | None
    here: bool = False


_STEPS = (("received", "Received"), ("complete", "Complete"), ("running", "Run"), ("done", "Result"))
_LAST_STEP = ("delivered", "Delivered")
_REACHED = {"received": 0, "complete": 1, "running": 2, "done": 3, "delivered": 4}


def steps(series: SeriesRecord, events: Iterable[EventRecord], now: float, *, has_result: bool) -> list[TimelineStep]:
    """A series' timeline: past steps with times, the current step, and those to come.

    Args:
        series: The record.
        events: Its events, the newest first.
        now: Unix time.
        has_result: Whether it has a model's result.
    """
    newest: dict[str, float] = {}
    for event in events:
        newest.setdefault(event.kind, event.at)
    stopped = series.state not in _REACHED
    if stopped:
        reached = (
            3 if has_result else max((_REACHED[kind] for kind in newest if kind in ("complete", "running")), default=0)
        )
        reached += 1
    else:
        reached = _REACHED[series.state]
    found = []
    for number, (kind, label) in enumerate((*_STEPS, _LAST_STEP)):
        tone = "past" if number < reached else "todo"
        if number == reached:
            tone = "stopped" if stopped else "past" if series.state in ("done", "delivered") else "now"
        at = moment(newest[kind], now) if kind in newest and number <= reached else None
        found.append(TimelineStep(label, tone, at, here=number == reached))
    return found


# ------------------------------------------------------------------------------------------------------ deliveries


def destination(name: str) -> str:
    """A destination as the page names it."""
    return "folder of copies" if name == COPY else name


def delivered_file(name: str) -> str:
    """The file of a delivery as the page names it."""
    return "the whole result" if name == WHOLE else name


# ---------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class SegmentRow:
    """One segment of a result."""

    label: str
    findings: str
    volume: str
    diameter: str


def segment_rows(segments: Sequence[Mapping[str, Any]]) -> list[SegmentRow]:
    """The segments of a result.json (docs/result.schema.json)."""
    return [
        SegmentRow(
            label=plain(segment["label"]),
            findings=thousands(segment["components"]),
            volume=f"{segment['volume_ml']:.2f}" if segment["voxels"] else "-",
            diameter=f"{segment['longest_diameter_mm']:.1f}" if segment["longest_diameter_mm"] is not None else "-",
        )
        for segment in segments
    ]
