"""What `ctflow inspect` shows: every series of a folder with the rule that chose or refused it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctflow.dicom.assemble import geometry_of_series
from ctflow.dicom.encoding import encoding_warnings
from ctflow.dicom.scan import name_without_patient, scan_folder
from ctflow.dicom.select import Candidate, select_series
from ctflow.door import unexpected
from ctflow.errors import BrokenSeries


def inspect_folder(folder: Path, *, names: bool = False) -> dict[str, Any]:
    """Look at every series of a folder without reading pixels.

    Args:
        folder: Searched with all its subfolders.
        names: Call files by their paths, which may hold a patient's name.

    Returns:
        {"series": [...], "unreadable": [...], "ignored": number of files that are not DICOM}; no patient data but such
        paths.
        Body parts are not judged, as no model is asked.

    Raises:
        InputError: The folder cannot be read.
    """
    scan = scan_folder(folder, name_of=Path.as_posix if names else name_without_patient)
    selection = select_series(scan)
    return {
        "series": [_entry(candidate) for candidate in selection.candidates],
        "unreadable": [{"file": file.name, "reason": file.reason} for file in scan.unreadable],
        "ignored": scan.ignored,
    }


def _entry(candidate: Candidate) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "digest": candidate.series.digest,
        "series_instance_uid": candidate.series.uid,
        "chosen": candidate.chosen,
        "rule": candidate.rule,
        "reason": candidate.reason,
        "warnings": [*candidate.series.dropped, *encoding_warnings(candidate.series.instances)],
        "description": dict(candidate.description),
        "geometry": None,
    }
    if not candidate.chosen:
        return entry
    try:
        geometry, _ = geometry_of_series(candidate.series)
    except BrokenSeries as error:
        return {**entry, "chosen": False, "rule": error.reason, "reason": str(error)}
    except Exception as error:  # noqa: BLE001  # the others of the folder are shown
        failure = unexpected(error, f"series {candidate.series.digest}")
        return {**entry, "chosen": False, "rule": failure.reason, "reason": str(failure)}
    entry["geometry"] = {
        "shape": list(geometry.shape),
        "spacing_mm": [round(mm, 6) for mm in geometry.spacing_mm],
        "affine_lps_mm": geometry.affine_mm.tolist(),
    }
    return entry
