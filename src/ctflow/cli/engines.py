"""What `ctflow engines` shows: the backends of this machine, and what the cache holds for them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ctflow.cli.monai_deploy import owner_of_script
from ctflow.engines.contract import PRECISIONS
from ctflow.engines.registry import BACKENDS, backends
from ctflow.engines.store.inventory import StoredEngine
from ctflow.engines.store.manifest import read_json_object
from ctflow.engines.store.store import INSTALLED, EngineStore

_KEY_FIELDS = ("kind", "version", "rewrite", "network", "weights_digest", "head", "precision", "device")


def engines_document(cache: Path | None) -> dict[str, Any]:
    """Look at the backends and the cache; each stored file is read once, as its digest is checked.

    Args:
        cache: Folder of engines; need not exist. None if there is none.

    Returns:
        {"backends": [...], "monai_deploy": {...}, "cache": {"folder", "problem"}, "engines": [...], "choices": [...],
        "installed": engines that came with the installation}; what is damaged is listed with its state and reason.
    """
    ours, sentence = owner_of_script()
    store = None if cache is None else EngineStore(cache)
    return {
        "backends": [
            {"name": name, "available": available, "reason": reason} for name, available, reason in backends()
        ],
        "monai_deploy": {"has_exec": ours, "reason": sentence},
        "cache": {"folder": None if cache is None else str(cache), "problem": store.problem() if store else None},
        "engines": [_engine(entry) for entry in store.entries()] if store else [],
        "choices": [] if cache is None else _choices(cache),
        "installed": [_engine(entry) for entry in EngineStore(INSTALLED).entries()],
    }


def _engine(entry: StoredEngine) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": entry.name,
        "state": entry.state,
        "reason": entry.reason,
        "bytes": entry.size,
        "made": _time(entry.made),
        **dict.fromkeys((*_KEY_FIELDS, "roi", "batch_range")),
    }
    if entry.key is not None:
        fields = entry.key.fields
        document.update({name: fields[name] for name in (*_KEY_FIELDS, "roi", "batch_range")})
    return document


def _choices(cache: Path) -> list[dict[str, Any]]:
    """What `auto` measured and chose, one record a model, machine and settings."""
    try:
        return [_choice(path) for path in sorted(cache.glob("choice-*.json"))]
    except OSError:  # the cache cannot be listed, which `problem` says
        return []


def _choice(path: Path) -> dict[str, Any]:
    """One record; a damaged one is measured again at the next run with `auto`."""
    found: dict[str, Any] = {"name": path.stem, "state": "damaged", "reason": None, "backend": None, "made": None}
    found |= {"precision": None, "window_seconds": None, "model": None, "device": None}
    try:
        found["made"] = _time(path.lstat().st_mtime)
        record = read_json_object(path)
        seconds = {(entry["backend"], entry["precision"]): entry["window_seconds"] for entry in record["measured"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {**found, "reason": f"it cannot be read ({type(error).__name__})"}
    backend, precision = record.get("backend"), record.get("precision")
    if backend not in [*BACKENDS] or precision not in PRECISIONS or not all(map(_is_engine_and_time, seconds.items())):
        return {**found, "reason": "it is of another kind"}
    times = {f"{name} {form}": value for (name, form), value in seconds.items()}
    # Records of earlier versions do not say for which model and device they are.
    found |= {name: record[name] for name in ("model", "device") if isinstance(record.get(name), str)}
    return {**found, "state": "ready", "backend": backend, "precision": precision, "window_seconds": times}


def _is_engine_and_time(item: tuple[tuple[object, object], object]) -> bool:
    """Whether it is a backend's name, a precision, and seconds or None."""
    (name, precision), seconds = item
    named = isinstance(name, str) and isinstance(precision, str)
    return named and (seconds is None or (isinstance(seconds, float) and math.isfinite(seconds)))


def _time(seconds: float | None) -> str | None:
    """A file's time as ISO 8601 in UTC; None for one that no calendar has."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(int(seconds), tz=UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return None
