"""The destination that a text names."""

from __future__ import annotations

import re
from pathlib import Path

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.core.errors import SettingsInvalid

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def destination_from_text(text: str, share: str) -> RowDestination:
    """The destination that a text names, not entered yet.

    Args:
        text: A folder's path.
        share: Name of what this process computes: letters, digits and hyphens. No other process has the same.

    Raises:
        SettingsInvalid: It is a URL of a kind that is not known.
    """
    if _URL.match(text):
        raise SettingsInvalid("-o: is a URL, and results are written to folders only", reason="invalid-value")
    return FolderDestination(Path(text), share)
