"""What `ctflow rules test` shows: what the node would do with each series of a folder, and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctflow.bundle import demonstration_bundle, find_bundle, read_spec
from ctflow.core.errors import NoUsableSeries
from ctflow.dicom.read.scan import scan_folder
from ctflow.node.rules import Verdict, verdicts_of_scan
from ctflow.node.settings import read_settings


def rules_document(
    folder: Path, config: Path | None, calling_ae: str | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Ask the rules about every series of a folder, as the node does.

    Args:
        folder: Searched with all its subfolders.
        config: The node's YAML file; None has no rules.
        calling_ae: AE title of whom the series would come from.
        environment: Environment variables.

    Returns:
        {"series": [...], "unreadable": [...], "ignored": number of files that are not DICOM}; no patient data and no
        free text of the headers.

    Raises:
        SettingsInvalid: The file is wrong.
        BundleInvalid: The file's bundle is; its body parts take part.
        NoUsableSeries: The folder cannot be read, or holds no series to ask about.
    """
    settings = read_settings(config, environment)
    bundle = find_bundle(settings.bundle) if settings.bundle else demonstration_bundle()
    spec = read_spec(bundle, settings.config, allow_code=settings.allow_code)
    scan = scan_folder(folder)
    verdicts = verdicts_of_scan(
        scan, settings.rules, calling_ae=calling_ae, body_parts=spec.body_parts, volume=settings.volume
    )
    if not verdicts:
        damaged = f" ({len(scan.unreadable)} damaged)" if scan.unreadable else ""
        raise NoUsableSeries(
            f"the folder contains no DICOM series{damaged}: give a folder with series to try the rules on",
            reason="no-dicom",
        )
    return {
        "series": [_entry(verdict) for verdict in verdicts],
        "unreadable": [file.facts for file in scan.unreadable],
        "ignored": scan.ignored,
    }


def _entry(verdict: Verdict) -> dict[str, Any]:
    candidate = verdict.candidate
    known = ("modality", "slices", "slice_spacing_mm", "body_part")
    return {
        "digest": candidate.series.digest,
        "series_instance_uid": candidate.series.uid,
        "run": verdict.run,
        "force": verdict.force,
        "reason": verdict.reason,
        "message": verdict.message,
        "facts": {name: candidate.description[name] for name in known} | {"thickness_mm": verdict.thickness_mm},
    }
