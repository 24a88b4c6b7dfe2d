"""result.json: the outcome of a series, and of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctflow import __version__
from ctflow.core.atomic import write_atomically
from ctflow.core.model import NOTHING_MARKED

SCHEMA_VERSION = 1  # docs/result.schema.json


def series_result(
    *,
    status: str,
    series: Mapping[str, Any],
    stage_seconds: Mapping[str, float],
    warnings: Sequence[str],
    research_only: str | None,
    intended_use: str,
    model: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    window: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    segments: Sequence[Mapping[str, Any]] = (),
    folder: str | None = None,
    error: Mapping[str, Any] | None = None,
    agreement: Mapping[str, Any] | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document of one series.

    Args:
        status: "done", "refused" (its input) or "failed" (anything else).
        series: digest, series_instance_uid, slices, shape, spacing_mm.
        stage_seconds: What the case waited for each stage; the sum is the whole time.
        warnings: Sentences.
        research_only: The notice of a demonstration model.
        intended_use: The bundle's words.
        model: name, version, weights_digest. This and all that follows but the error is of a series that is done.
        engine: `ctflow.engines.contract.EngineInfo` as a mapping.
        window: roi, overlap, blend, batch_size; of a part of the volume also part, windows, windows_of_all.
        settings: The run's settings.
        segments: `ctflow.measurements.measure.SegmentMeasurements` as mappings.
        folder: Name of the result folder.
        error: type, exit_code, reason, message.
        agreement: `ctflow.export.record.Agreement` as a mapping; None where nothing was compared.
        measured: backend, precision, window_seconds, batch, reason of each engine from which `auto` chose.

    Returns:
        The document, by docs/result.schema.json.
    """
    empty = status == "done" and not any(segment["voxels"] for segment in segments)
    return {
        "schema_version": SCHEMA_VERSION,
        "ctflow_version": __version__,
        "status": status,
        "research_only": research_only,
        "intended_use": intended_use,
        "statement": NOTHING_MARKED if empty else None,
        "series": dict(series),
        "model": model,
        "engine": engine,
        "window": window,
        "settings": settings,
        "stage_seconds": dict(stage_seconds),
        "agreement": agreement,
        "measured": [dict(entry) for entry in measured],
        "segments": [dict(segment) for segment in segments],
        "warnings": list(warnings),
        "folder": folder,
        "error": error,
    }


def run_result(
    *,
    status: str,
    exit_code: int | None,
    series: Sequence[Mapping[str, Any]] = (),
    set_aside: Sequence[Mapping[str, Any]] = (),
    unreadable: Sequence[Mapping[str, Any]] = (),
    research_only: str | None = None,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document of a run.

    Args:
        status: "done", "partly", "failed", "interrupted", or "running" until the run ends.
        exit_code: The process's; None until the run ends.
        series: The documents of all selected series.
        set_aside: digest, reason and message of those that were not selected.
        unreadable: file, reason and message.
        research_only: The notice of a demonstration model.
        error: type, exit_code, reason, message of the error that ended the whole run.

    Returns:
        The document, by docs/result.schema.json.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "ctflow_version": __version__,
        "status": status,
        "exit_code": exit_code,
        "research_only": research_only,
        "series": [dict(entry) for entry in series],
        "set_aside": [dict(entry) for entry in set_aside],
        "unreadable": [dict(entry) for entry in unreadable],
        "error": error,
    }


def write_result(document: Mapping[str, Any], path: Path) -> None:
    """Write a document.

    Raises:
        ValueError: It holds NaN or infinity, which JSON lacks.
        OutputError: It cannot be written.
    """
    content = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda stream: stream.write(content.encode("utf-8")))
