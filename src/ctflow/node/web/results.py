"""A result on the page of its series, read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctflow.node.journal.records import ResultRecord
from ctflow.node.web import views

REPORT, PREVIEW = "report.html", "preview.png"
_LARGEST_RESULT = 4_000_000  # bytes of a result.json; 1000 findings have 1 MB


def existing(results: Path, result: ResultRecord, name: str) -> Path | None:
    """A file of a result, if it exists; `results` is the folder of all results."""
    file = results / result.folder / name
    return file if file.is_file() else None


def shown_result(results: Path, result: ResultRecord) -> dict[str, Any]:
    """A result as the page of a series shows it; if its files are gone, the page says so."""
    where = f"/series/{result.series_key}/results/{result.id}"
    shown: dict[str, Any] = {
        "number": result.id,
        "model": views.plain(result.model),
        "version": views.plain(result.version),
        "seconds": f"{result.elapsed_s:.1f} s",
        "preview": f"{where}/{PREVIEW}" if existing(results, result, PREVIEW) else None,
        "report": f"{where}/{REPORT}" if existing(results, result, REPORT) else None,
        "engine": "",
        "research_only": None,
        "statement": None,
        "segments": [],
        "warnings": [],
        "problem": None,
    }
    try:
        return shown | _from_document(results / result.folder / "result.json")
    except FileNotFoundError:
        return shown | {"problem": "Its files are no longer in the data folder."}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return shown | {"problem": f"result.json cannot be read ({type(error).__name__})."}


def _from_document(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        content = stream.read(_LARGEST_RESULT + 1)
    if len(content) > _LARGEST_RESULT:
        raise ValueError("too large")
    document = json.loads(content)
    engine = document["engine"]
    return {
        "engine": views.plain(f"{engine['backend']} {engine['precision']} on {engine['device']}"),
        "research_only": document["research_only"] and views.plain(document["research_only"]),
        "statement": document["statement"] and views.plain(document["statement"]),
        "segments": views.segment_rows(document["segments"]),
        "warnings": [views.plain(warning) for warning in document["warnings"]],
    }
