"""Split a series that holds several volumes: phases, acquisitions, energies.

A series is split only if it is not one volume, and only where every part is one: what cannot be told apart is rejected
when it is read. Files are opened only where several slices lie at one position, to find copies.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from ctflow.core.errors import BrokenSeries
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import number, numbers, texts
from ctflow.dicom.read.geometry.agreement import alternating_keyword, comparable
from ctflow.dicom.read.geometry.stack import stack_of_series
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.series import Series, VolumePart
from ctflow.dicom.regularity import is_within, unevenness

MOST_PARTS = 200
_MOST_KEYS = 3  # that together tell volumes apart
_LEAST_GAP, _LARGEST_GAP = 0.3, 2.5  # steps between two pieces that may be one volume
_SPLIT = frozenset({"doubled", "irregular", "mixed-size", "mixed-orientation", "gap"})  # reasons of several volumes
_NEXT_MM = 0.01
# ImageType is free text after its second value; these words identify nobody.
_TYPE_WORDS = frozenset(
    {"ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "VOLUME", "AVERAGE", "MIP", "MINIP", "MPR", "REFORMATTED"}
    | {"MIXED", "LOW", "HIGH", "ENERGY", "MONO", "VMI", "VNC", "MULTI_ENERGY", "ADDITION", "SUBTRACTION", "PERFUSION"}
)


@dataclass(frozen=True)
class _Tell:
    """What may tell volumes apart.

    Attributes:
        name: In `--volume`, in folder names and in labels.
        keyword: The attribute.
        unit: Follows its value in labels.
        runs: Whether the volumes follow each other in it: its values differ from slice to slice of one volume.
    """

    name: str
    keyword: str
    unit: str = ""
    runs: bool = False


KEYS = (
    _Tell("temporal", "TemporalPositionIndex"),
    _Tell("temporal", "TemporalPositionIdentifier"),
    _Tell("stack", "StackID"),
    _Tell("acquisition", "AcquisitionNumber"),
    _Tell("time", "AcquisitionTime"),
    _Tell("time", "AcquisitionTime", runs=True),
    _Tell("time", "AcquisitionDateTime"),
    _Tell("time", "AcquisitionDateTime", runs=True),
    _Tell("trigger", "TriggerTime", " ms"),
    _Tell("trigger", "TriggerTime", runs=True),
    _Tell("phase", "NominalPercentageOfCardiacPhase", " %"),
    _Tell("type", "ImageType"),
    _Tell("contrast", "ContrastBolusAgent"),
    _Tell("energy", "KVP", " kV"),
    _Tell("kernel", "ConvolutionKernel"),
    _Tell("object", "ConcatenationUID"),
)
_Groups = list[tuple[str, tuple[Instance, ...]]]  # the value as shown, and the slices


@dataclass(frozen=True, eq=False)
class _Piece:
    """Slices, and what tells them from the others: keys and values."""

    instances: tuple[Instance, ...]
    told: tuple[tuple[_Tell, str], ...] = ()


def volumes_of_series(series: Series) -> tuple[Series, ...]:
    """Split a series into its volumes.

    Args:
        series: Slices that may be one volume.

    Returns:
        The series itself if it is one volume, or if nothing tells its volumes apart. Otherwise one series for each
        volume, with its `part`.
    """
    if len(series.instances) < 2 * 2 or _is_even(series.instances):
        return (series,)
    error = _flaw(series.instances, series)
    if error is None or error.reason not in _SPLIT or _share_uids(series.instances):
        return (series,)
    varying = [key for key in KEYS if len({_value(each, key) for each in series.instances}) > 1]
    for count in range(1, _MOST_KEYS + 1):
        for keys in combinations(varying, count):
            pieces = _split(series.instances, keys)
            if pieces and _are_volumes(pieces, series):
                return _named(series, pieces, error.reason)
    return (series,)


def is_asked_for(part: VolumePart, choice: str) -> bool:
    """Whether `--volume` names a part: "all", "first", its number, or what tells it apart, such as "phase=50"."""
    if choice in ("all", "first"):
        return choice == "all" or part.number == 1
    name, sign, value = choice.partition("=")
    return (name, value) in part.values if sign else part.number == int(choice)


# ------------------------------------------------------------------------------------------------------- is it one?


def _is_even(instances: Sequence[Instance]) -> bool:
    """Whether slices certainly form one volume: evenly spaced in one direction. Fast, for nearly every series."""
    axes = {texts(instance.header, "ImageOrientationPatient") for instance in instances}
    found = [numbers(instance.header, "ImagePositionPatient", 3) for instance in instances]
    direction = numbers(instances[0].header, "ImageOrientationPatient", 6)
    if len(axes) > 1 or direction is None or None in found:
        return False
    distances = np.array(found, dtype=np.float64) @ np.cross(direction[:3], direction[3:])
    order = np.argsort(distances, kind="stable")
    if np.diff(distances[order]).min() <= _NEXT_MM:
        return False
    if not is_within(unevenness(distances[order], np.arange(len(order), dtype=np.float64))):
        return False
    sizes = {tuple(texts(each.header, key) for key in ("Rows", "Columns", "PixelSpacing")) for each in instances}
    return len(sizes) == 1 and alternating_keyword([instances[index] for index in order]) is None


def _flaw(instances: tuple[Instance, ...], series: Series, *, allow_gaps: bool = False) -> BrokenSeries | None:
    """Why slices are no volume; None if they are one."""
    try:
        stack_of_series(replace(series, instances=instances), allow_gaps=allow_gaps)
    except BrokenSeries as error:
        return error
    return None


def _share_uids(instances: Sequence[Instance]) -> bool:
    """Whether slices of one SOPInstanceUID lie in different places or differ in a key: nothing could refer to them."""
    first: dict[str, Hashable] = {}
    for each in instances:
        what = (texts(each.header, "ImagePositionPatient"), *(_value(each, key) for key in KEYS))
        if first.setdefault(each.uid, what) != what:
            return True
    return False


# ----------------------------------------------------------------------------------------------------------- parts


def _split(instances: tuple[Instance, ...], keys: Sequence[_Tell]) -> list[_Piece]:
    """Pieces by one key after the other; empty where a piece would have fewer than two slices."""
    pieces = [_Piece(instances)]
    for key in keys:
        divided = []
        for piece in pieces:
            groups = _by_run(piece.instances, key) if key.runs else _by_value(piece.instances, key)
            if not groups:
                return []
            divided += [_Piece(some, (*piece.told, (key, shown))) for shown, some in groups]
        pieces = divided
    return pieces if 2 <= len(pieces) <= MOST_PARTS else []


def _by_value(instances: Sequence[Instance], key: _Tell) -> _Groups:
    groups: dict[tuple[str | float, ...], list[Instance]] = {}
    for instance in instances:
        groups.setdefault(_value(instance, key), []).append(instance)
    if len(groups) > MOST_PARTS or min(map(len, groups.values())) < 2:
        return []
    ordered = sorted(groups, key=lambda values: [(isinstance(one, str), one) for one in values])
    return list(zip(_shown(ordered, key), (tuple(groups[values]) for values in ordered), strict=True))


def _by_run(instances: Sequence[Instance], key: _Tell) -> _Groups:
    """As many runs in time as slices lie at each position, one run after the other.

    With another number of slices at some positions, a run could hold the slices of two acquisitions: then none is made.
    """
    found = [(number(instance.header, key.keyword), instance) for instance in instances]
    timed = sorted(((time, each) for time, each in found if time is not None), key=lambda one: one[0])
    places = {numbers(instance.header, "ImagePositionPatient", 3) for instance in instances}
    count, rest = divmod(len(instances), len(places))
    if len(timed) < len(found) or rest or not 2 <= count <= MOST_PARTS:
        return []
    length = len(places)
    runs = [timed[first : first + length] for first in range(0, len(timed), length)]
    if any(before[-1][0] == after[0][0] for before, after in pairwise(runs)):
        return []
    if any(len({numbers(each.header, "ImagePositionPatient", 3) for _, each in run}) < length for run in runs):
        return []
    return [(str(place), tuple(each for _, each in run)) for place, run in enumerate(runs, start=1)]


def _are_volumes(pieces: Sequence[_Piece], series: Series) -> bool:
    """Whether every piece is a volume of its own."""
    if any(_continue(one, other) for one, other in combinations(map(_extent, pieces), 2)):
        return False
    # A piece that lacks a slice is told apart all the same; it is rejected when it is read, or interpolated.
    return all(_flaw(piece.instances, series, allow_gaps=True) is None for piece in pieces)


_Reach = tuple[tuple[float, ...], float, float, float]  # direction, first and last place along its normal, mean step


def _extent(piece: _Piece) -> _Reach | None:
    """Where a piece lies; None if positions are missing."""
    axes = numbers(piece.instances[0].header, "ImageOrientationPatient", 6)
    found = [numbers(instance.header, "ImagePositionPatient", 3) for instance in piece.instances]
    if axes is None or None in found:
        return None
    places = np.unique(np.round(np.array(found, dtype=np.float64) @ np.cross(axes[:3], axes[3:]), 2))
    return axes, float(places[0]), float(places[-1]), float(places[-1] - places[0]) / max(len(places) - 1, 1)


def _continue(one: _Reach | None, other: _Reach | None) -> bool:
    """Whether a piece begins where another one ends: then both may be one volume with a flaw, which stays visible.

    As wide as two steps: a slice between them may be lost.
    """
    if one is None or other is None or one[0] != other[0]:
        return False
    distance, step = max(other[1] - one[2], one[1] - other[2]), max(one[3], other[3])
    return _LEAST_GAP * step < distance < _LARGEST_GAP * step


# ----------------------------------------------------------------------------------------------------------- names


def _value(instance: Instance, key: _Tell) -> tuple[str | float, ...]:
    if key.keyword not in instance.header:  # fast: most series lack most of them
        return ()
    return comparable(texts(instance.header, key.keyword))


def _shown(values: Sequence[tuple[str | float, ...]], key: _Tell) -> list[str]:
    """A short name of each value: a number or known words; else its place, as text and times may name a patient."""
    makers = {
        "AcquisitionTime": _as_nothing,
        "AcquisitionDateTime": _as_nothing,
        "ImageType": _as_words,
        "ContrastBolusAgent": _as_presence,
    }
    shown = [makers.get(key.keyword, _as_number)(each) for each in values]
    if "" not in shown and len(set(shown)) == len(shown):
        return shown
    return [str(place) for place in range(1, len(values) + 1)]


def _as_nothing(_values: tuple[str | float, ...]) -> str:
    return ""


def _as_number(values: tuple[str | float, ...]) -> str:
    if not values:
        return "none"
    shown = f"{values[0]:g}" if len(values) == 1 and isinstance(values[0], float) else ""
    return shown if re.fullmatch(r"-?[0-9.]{1,12}", shown) else ""


def _as_words(values: tuple[str | float, ...]) -> str:
    return "-".join(str(word).lower() for word in values if word in _TYPE_WORDS)


def _as_presence(values: tuple[str | float, ...]) -> str:
    return "yes" if values else "no"


def _named(series: Series, pieces: Sequence[_Piece], reason: str) -> tuple[Series, ...]:
    keywords = " and ".join(dict.fromkeys(key.keyword for key, _ in pieces[0].told))
    apart = "; slices between them may be missing" if reason == "gap" else ""
    parts = []
    for place, piece in enumerate(pieces, start=1):
        name = "-".join(f"{key.name}-{shown}" for key, shown in piece.told)
        label = ", ".join(f"{key.name} {shown}{key.unit}" for key, shown in piece.told)
        part = VolumePart(name, label, place, len(pieces), frozenset(_values(piece)))
        what = (
            f"volume {place} of {len(pieces)} of series {series.digest}: {label} ({keywords} tells them apart{apart})"
        )
        parts.append(
            replace(
                series,
                digest=digest_of_uid(f"{series.uid or series.study_uid} {name}"),
                instances=piece.instances,
                dropped=(*series.dropped, what),
                part=part,
            )
        )
    return tuple(parts)


def _values(piece: _Piece) -> Iterator[tuple[str, str]]:
    """Every name and value by which `--volume` finds a piece."""
    yield from ((key.name, shown) for key, shown in piece.told)
    for key in KEYS:
        found = {_value(instance, key) for instance in piece.instances}
        shown = _as_number(next(iter(found))) if len(found) == 1 and key.name != "time" else ""
        if shown not in ("", "none"):
            yield key.name, shown
