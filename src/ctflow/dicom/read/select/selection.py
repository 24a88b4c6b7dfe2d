"""Headers to a decision: which series to run, and why not the others. Pure; never raises for a bad series."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal

from ctflow.compat.pydicom import lenient
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import NoUsableSeries, Unexpected, counted
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import integer, text
from ctflow.dicom.read.enhanced import frames_of_series
from ctflow.dicom.read.scan import Instance, Scan
from ctflow.dicom.read.select.description import describe, slice_spacing_mm
from ctflow.dicom.read.select.objects import slices_of_series
from ctflow.dicom.read.select.orphans import continues
from ctflow.dicom.read.select.rules import IMPOSSIBLE, LARGEST_SPACING_MM, LEAST_SLICES, OVERRIDABLE, other_body_part
from ctflow.dicom.read.select.series import (
    Candidate,
    Objection,
    Selection,
    Series,
)
from ctflow.dicom.read.select.volumes import is_asked_for, volumes_of_series

_LONGEST = 500  # characters of a list of volumes
_ORPHANED = "it continues series {}, of which its SeriesInstanceUID may cut it off"


@lenient()
def select_series(
    scan: Scan,
    *,
    series_uid: str | None = None,
    pick: Literal["all", "best"] = "all",
    force: bool = False,
    body_parts: Collection[str] = (),
    volume: str = "all",
) -> Selection:
    """Decide for every series of a scan, and for every volume of a series that holds several.

    Args:
        scan: The headers.
        series_uid: Only this series may be selected.
        pick: "all" eligible series, or the "best" of each study and frame of reference: the one whose slice spacing is
            smallest but not below 1 mm, then with most slices, then with the lowest series number.
        force: Select series that only rules in `OVERRIDABLE` (not in `IMPOSSIBLE`) reject.
        body_parts: BodyPartExamined values that suit the model; empty accepts all.
        volume: Which volumes of a series that holds several (`volumes.is_asked_for`).

    Returns:
        The verdicts.
    """
    candidates = [
        candidate
        for series in _series_of(scan)
        for candidate in _judge_safely(series, series_uid, force, body_parts, volume)
    ]
    if pick == "best":
        candidates = _keep_best(candidates)
    if series_uid is None:
        candidates = _name_orphaned(candidates)
    return Selection(tuple(candidates))


def require_selected(selection: Selection, scan: Scan) -> None:
    """Raise `NoUsableSeries` with every reason if nothing is selected; `Unexpected` if the cause is a bug in ctflow."""
    if selection.selected:
        return
    lines = [f"series {c.series.digest}: {c.message} ({c.reason})" for c in selection.candidates]
    lines += [f"file {file.name}: {file.message}" for file in scan.unreadable]
    most = 20
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most} more; `ctflow inspect` lists all"]
    if scan.unreadable:
        lines.append("names of files may be digests: `ctflow inspect DIR --names` shows them")
    if selection.failed:
        raise Unexpected(f"no series can be segmented: {'; '.join(lines)}")
    found = (
        "; ".join(lines) if lines else f"no DICOM file among {counted(scan.ignored, 'file')} (archives are not opened)"
    )
    raise NoUsableSeries(f"no series can be segmented: {found}", reason="none-eligible" if lines else "no-dicom")


def _series_of(scan: Scan) -> list[Series]:
    groups: dict[tuple[str, str], list[Instance]] = {}
    for instance in scan.instances:
        key = (text(instance.header, "StudyInstanceUID"), text(instance.header, "SeriesInstanceUID"))
        groups.setdefault(key, []).append(instance)
    return [
        slices_of_series(_with_frames(Series(uid, digest_of_uid(uid or study), study, tuple(instances))))
        for (study, uid), instances in sorted(groups.items())
    ]


def _with_frames(series: Series) -> Series:
    instances, flaw = frames_of_series(series.instances)
    return replace(series, instances=instances, flaw=flaw)


def _judge_safely(
    series: Series, series_uid: str | None, force: bool, body_parts: Collection[str], volume: str
) -> list[Candidate]:
    """The verdicts on a series: one, or one on each volume of a series that holds several."""
    try:
        if series_uid is not None and series.uid != series_uid:
            message = "--series names another series"
            return [Candidate(series, False, "not-asked-for", message, False, describe(series.instances))]
        impossible = _first_objection(IMPOSSIBLE, series)
        if impossible:
            return [Candidate(series, False, *impossible, False, describe(series.instances))]
        return _only_asked_for([_judge(part, force, body_parts) for part in volumes_of_series(series)], volume)
    except Exception as error:  # noqa: BLE001  # the folder's other series must be judged
        failure = unexpected(error, f"series {series.digest}")
        return [Candidate(series, False, failure.reason, str(failure), False, {})]


def _judge(series: Series, force: bool, body_parts: Collection[str]) -> Candidate:
    """The verdict on one volume, which is possible."""
    description = describe(series.instances)

    def verdict(reason: str, message: str, *, selected: bool = False, forced: bool = False) -> Candidate:
        return Candidate(series, selected, reason, message, forced, description)

    objection = _first_objection(OVERRIDABLE, series) or other_body_part(series, body_parts)
    if not objection:
        return verdict("selected", "eligible", selected=True)
    reason, message = objection
    if force:
        return verdict(reason, f"segmented because of --force, although {message}", selected=True, forced=True)
    return verdict(reason, f"{message}; --force segments it")


def _only_asked_for(candidates: list[Candidate], volume: str) -> list[Candidate]:
    """The verdicts with all volumes set aside that --volume does not name; a series of one volume is not affected."""
    labels = "; ".join(f"{part.number}: {part.label}" for each in candidates if (part := each.series.part))
    message = f"--volume {volume} does not choose this volume; the series holds {labels}"[:_LONGEST]
    return [
        candidate
        if candidate.series.part is None or is_asked_for(candidate.series.part, volume)
        else replace(candidate, selected=False, forced=False, reason="not-asked-for", message=message)
        for candidate in candidates
    ]


def _first_objection(rules: Sequence[Callable[[Series], Objection | None]], series: Series) -> Objection | None:
    return next((found for found in (rule(series) for rule in rules) if found), None)


# ---------------------------------------------------------------------------------------------------------- orphaned


def _name_orphaned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """A rejected series that continues a selected one may be its end: nothing else shows that it was cut short."""
    result = list(candidates)
    for place, few in enumerate(candidates):
        if few.selected or len(few.series.instances) >= LEAST_SLICES:
            continue
        slices = few.series.instances
        whose = (at for at, one in enumerate(result) if one.selected and continues(slices, one.series.instances))
        at = next(whose, None)
        if at is not None:
            result[place], result[at] = _parted(few, result[at])
    return result


def _parted(few: Candidate, rest: Candidate) -> tuple[Candidate, Candidate]:
    """Orphaned slices and the series that they may belong to; each message refers to the other."""
    count = len(few.series.instances)
    slices = "a slice" if count == 1 else f"{count} slices"
    dropped = f"{slices} of series {few.series.digest} may belong to it: its next slices would lie there"
    series = replace(rest.series, dropped=(*rest.series.dropped, dropped))
    message = f"{_ORPHANED.format(rest.series.digest)}: {few.message}"
    return replace(few, reason="orphaned", message=message), replace(rest, series=series)


# -------------------------------------------------------------------------------------------------------------- best


def _keep_best(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        key = _study_and_frame(candidate)
        if candidate.selected and (key not in best or _rank(candidate) < _rank(best[key])):
            best[key] = candidate
    message = "--pick best selected another series of its study and frame of reference; --pick all selects both"
    return [
        replace(candidate, selected=False, forced=False, reason="not-best", message=message)
        if candidate.selected and best[_study_and_frame(candidate)] is not candidate
        else candidate
        for candidate in candidates
    ]


def _study_and_frame(candidate: Candidate) -> tuple[str, str]:
    return candidate.series.study_uid, text(candidate.series.instances[0].header, "FrameOfReferenceUID")


def _rank(candidate: Candidate) -> tuple[bool, float, int, int, str, int]:
    """Lower is better; below 1 mm thinner slices only add noise."""
    spacing = round(slice_spacing_mm(candidate.series.instances) or LARGEST_SPACING_MM, 2)  # rounding decides nothing
    series_number = integer(candidate.series.instances[0].header, "SeriesNumber")
    return (
        candidate.forced,
        max(spacing, 1.0),
        -len(candidate.series.instances),
        series_number if series_number is not None else 2**31,
        candidate.series.uid,
        candidate.series.part.number if candidate.series.part else 0,
    )
