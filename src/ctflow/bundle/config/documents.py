"""Untrusted JSON and YAML files: bounded, finite, without duplicate keys; their overrides, applied as in MONAI."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ctflow.bundle.config.yaml_document import read_yaml
from ctflow.core.errors import BundleInvalid

LARGEST_BYTES = 4_000_000  # the largest inference.json of MONAI's model zoo has 20 kB
YAML = (".yaml", ".yml")
_MOST_DIGITS = 30
_MERGE = "+"
_SEPARATOR = "::"
_INDEX = re.compile(r"-?[0-9]{1,9}", re.ASCII)


class _Rejected(ValueError):
    """A construct that JSON files of bundles do not need."""


def read_bundle_document(folder: Path, name: str) -> dict[str, Any]:
    """Read one object of JSON or, by the file's name, of YAML.

    Args:
        folder: The bundle.
        name: The file's path inside the bundle.

    Raises:
        BundleInvalid: The file is absent, too large, or not one object; the message names the file.
    """
    path = folder / name
    if path.exists() and not path.is_file():  # a pipe would never end
        raise BundleInvalid(f"{name} cannot be read: it is not a file", reason="unreadable-file")
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleInvalid(
            f"{name} is missing: a bundle has configs/inference.json (or .yaml) and configs/metadata.json",
            reason="missing-file",
        ) from None
    except OSError as error:
        raise BundleInvalid(f"{name} cannot be read: {error.strerror}", reason="unreadable-file") from None
    if len(raw) > LARGEST_BYTES:
        raise BundleInvalid(
            f"{name} is larger than {LARGEST_BYTES // 1_000_000} MB: not a bundle's configuration",
            reason="unreadable-file",
        )
    return document_from_yaml(raw, name) if name.lower().endswith(YAML) else document_from_bytes(raw, name)


def document_from_bytes(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: UTF-8 text.
        name: The file's name in messages.

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


def document_from_yaml(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a YAML object to what JSON can hold; aliases are copied.

    Args:
        raw: UTF-8 text.
        name: The file's name in messages.

    Raises:
        BundleInvalid: Not one object of words, finite numbers, truth values, lists and objects.
    """
    try:
        document = read_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise BundleInvalid(f"{name} is not UTF-8 text", reason="json") from None
    except ValueError as error:
        raise BundleInvalid(f"{name}: {error}", reason="json") from None
    if not isinstance(document, dict):
        raise BundleInvalid(f"{name} does not contain an object", reason="json")
    return document


def merged_document(document: Mapping[str, Any], file: str, result: dict[str, Any] | None = None) -> dict[str, Any]:
    """Apply the overrides of a configuration file, in their order.

    Only keys of the file's outermost object are overrides: `a::b` (or `a#b`) replaces the value `b` of `a`, where `b`
    may be a list index; `+a` adds to a list or updates an object. Deeper in the file such a key is an ordinary one.

    Args:
        document: The parsed file; it is not changed.
        file: The file's path inside the bundle, for messages.
        result: What an earlier file gave, which this one overrides; it is changed.

    Returns:
        The configuration as MONAI sees it.

    Raises:
        BundleInvalid: MONAI could not apply an override; the reason is "override".

    Source: MONAI 1.6.1 `ConfigParser.load_config_files`, `ConfigParser.__setitem__` and `merge_kv`.
    """
    result = {} if result is None else result
    copies = _Copies()
    for key, value in document.items():
        problem = _apply(result, key, value, copies)
        if problem:
            raise BundleInvalid(
                f"{file}: {key[:200]} is an override that MONAI cannot apply: {problem}", reason="override"
            )
    return result


class _Copies:
    """The lists and objects that are copies already: each part of a document is copied at most once."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def own(self, holder: Any, at: str | int) -> Any:
        """A part as one that may be changed; nothing below it is copied."""
        part = holder[at]
        if id(part) not in self._made:
            part = holder[at] = copy.copy(part)
            self._made[id(part)] = part
        return part


def _apply(config: dict[str, Any], key: str, value: Any, copies: _Copies) -> str:
    """Set or merge one key; return the problem, or ""."""
    is_merge = key.startswith(_MERGE)
    parts = key[is_merge:].replace("#", _SEPARATOR).split(_SEPARATOR)
    if any(not part or part != part.strip() for part in parts):
        return "a part of the key is empty or has a space next to it"
    holder: Any = config
    for part in parts[:-1]:
        found = _found(holder, part)
        if found is None:
            return f"{part[:80]!r} is not in the file above it"
        holder = copies.own(holder, found)
    last = _found(holder, parts[-1])
    if last is None and not isinstance(holder, dict):
        return f"{parts[-1][:80]!r} is not a position in a list or object of the file"
    if last is None or not is_merge:
        holder[parts[-1] if last is None else last] = value
        return ""
    old = holder[last]
    if isinstance(old, dict) and isinstance(value, dict):
        copies.own(holder, last).update(value)
    elif isinstance(old, list) and isinstance(value, list):
        copies.own(holder, last).extend(value)
    else:
        return "the values before and after + must both be lists or both be objects"
    return ""


def _found(holder: Any, part: str) -> str | int | None:
    """The key or index that `part` denotes in an object or list; None if there is none."""
    if isinstance(holder, dict):
        return part if part in holder else None
    if isinstance(holder, list) and _INDEX.fullmatch(part) and -len(holder) <= int(part) < len(holder):
        return int(part)
    return None
