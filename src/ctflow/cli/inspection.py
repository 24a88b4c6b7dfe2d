"""What `ctflow inspect` shows: every series of a folder, and why it is selected or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.valuerep import VR

from ctflow.core.entry_point import unexpected
from ctflow.core.errors import BrokenSeries, NoUsableSeries, counted
from ctflow.dicom.read.enhanced import FUNCTIONAL_GROUPS
from ctflow.dicom.read.geometry.stack import stack_of_series
from ctflow.dicom.read.pixels.encoding import encoding_warnings
from ctflow.dicom.read.scan import name_without_patient, scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.read.select.series import Candidate

_LONGEST_KEPT = 4096  # bytes of a value; no attribute that series are judged by is longer


def inspect_folder(folder: Path, *, names: bool = False, body_parts: Collection[str] = ()) -> dict[str, Any]:
    """Look at every series of a folder without reading pixels.

    Args:
        folder: Searched with all its subfolders.
        names: Call files by their paths, which may hold a patient's name.
        body_parts: The model's; empty accepts all.

    Returns:
        {"series": [...], "unreadable": [...], "unreadable_reasons": {reason: number of files}, "ignored": number of
        files that are not DICOM}; no patient data but such paths.

    Raises:
        InputError: The folder cannot be read.
    """
    scan = scan_folder(folder, name_of=Path.as_posix if names else name_without_patient, keep_of=_Lean())
    selection = select_series(scan, body_parts=body_parts)
    return {
        "series": [_entry(candidate) for candidate in selection.candidates],
        "unreadable": [file.facts for file in scan.unreadable],
        "unreadable_reasons": dict(Counter(file.reason for file in scan.unreadable).most_common()),
        "ignored": scan.ignored,
    }


def require_series(document: Mapping[str, Any]) -> None:
    """Fail for a folder without DICOM series, as `ctflow run` does.

    Args:
        document: See `inspect_folder`.

    Raises:
        NoUsableSeries: It lists none.
    """
    if not document["series"]:
        unreadable = len(document["unreadable"])
        others = counted(document["ignored"], "file is", "files are")
        raise NoUsableSeries(
            f"the folder contains no DICOM series: {others} not DICOM, {unreadable} unreadable", reason="no-dicom"
        )


class _Lean:
    """Headers without private and long values, and without sequences that do not describe frames; equal ones once."""

    def __init__(self) -> None:
        self._known: dict[tuple[BaseTag, str | None, bytes | None, bool, bool], RawDataElement] = {}

    def __call__(self, header: Dataset) -> Dataset:
        kept: dict[BaseTag, Any] = {}
        for tag, element in header.items():
            if tag.is_private or (element.VR == VR.SQ and tag not in FUNCTIONAL_GROUPS):
                continue
            if not isinstance(element, RawDataElement):
                kept[tag] = element
            elif len(element.value or b"") <= _LONGEST_KEPT or tag in FUNCTIONAL_GROUPS:
                key = tag, element.VR, element.value, element.is_implicit_VR, element.is_little_endian
                kept[tag] = self._known.setdefault(key, element)
        lean = Dataset(kept)
        implicit, little = header.original_encoding
        lean.set_original_encoding(implicit, little, header.original_character_set)
        return lean


def _entry(candidate: Candidate) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "digest": candidate.series.digest,
        "series_instance_uid": candidate.series.uid,
        "selected": candidate.selected,
        "reason": candidate.reason,
        "message": candidate.message,
        "warnings": [*candidate.series.dropped, *encoding_warnings(candidate.series.instances)],
        "description": dict(candidate.description),
        "geometry": None,
    }
    if not candidate.selected:
        return entry
    try:
        stack = stack_of_series(candidate.series)
    except BrokenSeries as error:
        return {**entry, "selected": False, "reason": error.reason, "message": str(error)}
    except Exception as error:  # noqa: BLE001  # the others of the folder are shown
        failure = unexpected(error, f"series {candidate.series.digest}")
        return {**entry, "selected": False, "reason": failure.reason, "message": str(failure)}
    geometry = stack.geometry
    entry["warnings"] += stack.warnings
    entry["geometry"] = {
        "shape": list(geometry.shape),
        "spacing_mm": [round(mm, 6) for mm in geometry.spacing_mm],
        "affine_lps_mm": geometry.affine_mm.tolist(),
    }
    return entry
