"""Relative references: `@#a` is `a` beside the value, `@##a` one level further up, as in MONAI."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SEPARATOR = "::"
_PREFIX = re.compile(r"[@%]::+")


def with_whole_references(document: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose references are whole paths; it is not changed itself.

    One that leads above the top stays as it is: it is rejected where its value is needed.

    Source: MONAI 1.6.1 `ConfigParser.resolve_relative_ids`.
    """
    result = dict(document)
    left: list[tuple[Any, tuple[str, ...]]] = [(result, ())]
    while left:
        holder, path = left.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            here = (*path, str(key))
            if isinstance(value, dict | list):
                holder[key] = value.copy()
                left.append((holder[key], here))
            elif isinstance(value, str):
                holder[key] = _whole(value, here)
    return result


def _whole(text: str, place: tuple[str, ...]) -> str:
    if not ("@" in text or "%" in text):
        return text
    found = text.replace("#", _SEPARATOR)
    prefixes = sorted(set(_PREFIX.findall(found)), reverse=True)
    if not prefixes or max(prefix.count(_SEPARATOR) for prefix in prefixes) > len(place):
        return text
    for prefix in prefixes:
        above = place[: -prefix.count(_SEPARATOR)]
        found = found.replace(prefix, prefix[0] + "".join(f"{part}{_SEPARATOR}" for part in above))
    return found
