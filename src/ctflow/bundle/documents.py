"""JSON files from strangers: bounded, without duplicate keys, finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ctflow.core.errors import BundleInvalid

LARGEST_BYTES = 4_000_000  # the largest inference.json of MONAI's model zoo has 20 kB
_MOST_DIGITS = 30


class _Rejected(ValueError):
    """A construct that JSON files of bundles do not need."""


def read_bundle_document(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        folder: The bundle.
        name: The file's path inside the bundle.

    Raises:
        BundleInvalid: The file is absent, too large, or not one JSON object; the message names the file.
    """
    try:
        with (folder / name).open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleInvalid(
            f"{name} is missing: a bundle has configs/inference.json and metadata.json (JSON, not YAML)",
            reason="missing-file",
        ) from None
    except OSError as error:
        raise BundleInvalid(f"{name} cannot be read: {error.strerror}", reason="unreadable-file") from None
    if len(raw) > LARGEST_BYTES:
        raise BundleInvalid(
            f"{name} is larger than {LARGEST_BYTES // 1_000_000} MB: not a bundle's configuration",
            reason="unreadable-file",
        )
    return document_from_bytes(raw, name)


def document_from_bytes(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: UTF-8 text.
        name: What to call the file in messages.

    Raises:
        BundleInvalid: Not one JSON object of finite numbers without duplicate keys.
    """
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError:
        raise BundleInvalid(f"{name} is nested too deeply", reason="json") from None
    except _Rejected as error:
        raise BundleInvalid(f"{name}: {error}", reason="json") from None
    except json.JSONDecodeError as error:
        raise BundleInvalid(f"{name} is not JSON: {error.msg} in line {error.lineno}", reason="json") from None
    except UnicodeDecodeError:
        raise BundleInvalid(f"{name} is not UTF-8 text", reason="json") from None
    if not isinstance(document, dict):
        raise BundleInvalid(f"{name} does not contain a JSON object", reason="json")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Rejected(f"the key {key[:80]!r} occurs twice in one object; keep one")
        result[key] = value
    return result


def _constant(text: str) -> NoReturn:
    raise _Rejected(f"{text} is not a number that JSON knows")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _Rejected(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Rejected(f"the number {text[:30]} is too large")
    return value
