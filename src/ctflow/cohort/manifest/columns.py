"""The columns of a manifest."""

from __future__ import annotations

from collections.abc import Iterable

from ctflow.core.errors import ManifestInvalid
from ctflow.settings.schema import shown

COLUMNS = ("id", "location", "series", "volume", "digest")
_NEEDED = ("id", "location")


def check_columns(found: Iterable[str]) -> tuple[str, ...]:
    """The columns of a manifest by their plain names, which people also write in capitals.

    Raises:
        ManifestInvalid: One is unknown, there twice, or missing.
    """
    names = tuple(name.strip().lower() for name in found)
    for name in names:
        if name not in COLUMNS:
            known = ", ".join(COLUMNS)
            raise ManifestInvalid(
                f"the manifest's header: unknown column {shown(name)}; known are {known}", reason="unknown-column"
            )
        if names.count(name) > 1:
            raise ManifestInvalid(f"the manifest's header: {name} is there twice", reason="double-column")
    for name in _NEEDED:
        if name not in names:
            raise ManifestInvalid(f"the manifest's header has no column {name}: add it", reason="missing-column")
    return names
