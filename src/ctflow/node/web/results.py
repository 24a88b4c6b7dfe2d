"""A result on the page of its series, read from its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ctflow.node.journal.records import ResultRecord
from ctflow.node.web import views

REPORT, PREVIEW = "report.html", "preview.png"
_LARGEST_RESULT = 4_000_000  # bytes of a result.json; 1000 findings have 1 MB
_LARGEST_LIST = 100_000_000  # of one that lists volumes


def existing(results: Path, result: ResultRecord, name: str, volume: str = "") -> Path | None:
    """A file of a result, if it exists; `results` is the folder of all results."""
    if volume and not re.fullmatch("[a-z][0-9A-Za-z._-]*", volume):
        return None
    file = results / result.folder / volume / name
    return file if file.is_file() else None


def shown_results(results: Path, result: ResultRecord) -> list[dict[str, Any]]:
    """A result as the page of a series shows it: one entry for each volume of a series that holds several."""
    try:
        volumes = _read(results / result.folder / "result.json", _LARGEST_LIST)["series"]
    except (OSError, ValueError, KeyError, TypeError):  # shown in place of the result
        return [_shown(results, result)]
    if not isinstance(volumes, list):
        return [_shown(results, result)]
    return [_shown(results, result, str(each["folder"]), str(each["series"]["volume"]["label"])) for each in volumes]


def _shown(results: Path, result: ResultRecord, volume: str = "", label: str = "") -> dict[str, Any]:
    """A result, or one volume's; if its files are gone, the page says so."""
    where = f"/series/{result.series_key}/results/{result.id}{'/' if volume else ''}{volume}"
    shown: dict[str, Any] = {
        "number": f"{result.id}{'-' if volume else ''}{volume}",
        "volume": views.plain(label),
        "run_model": result.run_model,
        "model": views.plain(result.model),
        "version": views.plain(result.version),
        "seconds": f"{result.elapsed_s:.1f} s",
        "preview": f"{where}/{PREVIEW}" if existing(results, result, PREVIEW, volume) else None,
        "report": f"{where}/{REPORT}" if existing(results, result, REPORT, volume) else None,
        "engine": "",
        "research_only": None,
        "statement": None,
        "segments": [],
        "warnings": [],
        "problem": None,
    }
    try:
        return shown | _from_document(_read(results / result.folder / volume / "result.json"))
    except FileNotFoundError:
        return shown | {"problem": "Its files are no longer in the data folder."}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return shown | {"problem": f"result.json cannot be read ({type(error).__name__})."}


def _read(path: Path, most: int = _LARGEST_RESULT) -> Any:
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError("too large")
    return json.loads(content)


def _from_document(document: Any) -> dict[str, Any]:
    engine = document["engine"]
    return {
        "engine": views.plain(f"{engine['backend']} {engine['precision']} on {engine['device']}"),
        "research_only": document["research_only"] and views.plain(document["research_only"]),
        "statement": document["statement"] and views.plain(document["statement"]),
        "segments": views.segment_rows(document["segments"]),
        "warnings": [views.plain(warning) for warning in document["warnings"]],
    }
