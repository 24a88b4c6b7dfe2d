"""Keys of a configuration that change what stands above them: `"inferer#overlap"`, `"+inferer"`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from ctflow.core.errors import BundleInvalid

_MERGE = "+"
_SEPARATOR = "::"
_INDEX = re.compile(r"-?[0-9]{1,9}", re.ASCII)


def merged_document(document: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Apply the overrides of a configuration file, in their order.

    Only keys of the file's outermost object are overrides: `a::b` (or `a#b`) replaces the value `b` of `a`, also by the
    index of a list; `+a` adds to a list or updates an object. Deeper in the file such a key is an ordinary one.

    Args:
        document: The parsed file; it is left as it is.
        file: The file's path inside the bundle, for messages.

    Returns:
        The configuration as MONAI sees it.

    Raises:
        BundleInvalid: MONAI could not apply an override; the reason is "override".

    Source: MONAI 1.6.1 `ConfigParser.load_config_files`, `ConfigParser.__setitem__` and `merge_kv`.
    """
    result: dict[str, Any] = {}
    for key, value in document.items():
        problem = _apply(result, key, value)
        if problem:
            raise BundleInvalid(
                f"{file}: {key[:200]} is an override that MONAI cannot apply: {problem}", reason="override"
            )
    return result


def _apply(config: dict[str, Any], key: str, value: Any) -> str:
    """Set or merge one key; the problem, or "" if there is none."""
    is_merge = key.startswith(_MERGE)
    parts = key[is_merge:].replace("#", _SEPARATOR).split(_SEPARATOR)
    if any(not part or part != part.strip() for part in parts):
        return "a part of the key is empty or has a space next to it"
    holder: Any = config
    for part in parts[:-1]:
        found = _found(holder, part)
        if found is None:
            return f"{part[:80]!r} is not in the file above it"
        # A copy, so that the document stays as it is; of what lies beside the path nothing is copied.
        holder[found] = copy.copy(holder[found])
        holder = holder[found]
    last = _found(holder, parts[-1])
    if last is None and not isinstance(holder, dict):
        return f"{parts[-1][:80]!r} is not a position in a list or object of the file"
    if last is None or not is_merge:
        holder[parts[-1] if last is None else last] = value
        return ""
    return _merge(holder, last, value)


def _merge(holder: Any, last: str | int, value: Any) -> str:
    old = holder[last]
    if isinstance(old, dict) and isinstance(value, dict):
        holder[last] = {**old, **value}
    elif isinstance(old, list) and isinstance(value, list):
        holder[last] = [*old, *value]
    else:
        return "the values before and after + must both be lists or both be objects"
    return ""


def _found(holder: Any, part: str) -> str | int | None:
    """The key or index that `part` means in an object or list; None if there is none."""
    if isinstance(holder, dict):
        return part if part in holder else None
    if isinstance(holder, list) and _INDEX.fullmatch(part) and -len(holder) <= int(part) < len(holder):
        return int(part)
    return None
