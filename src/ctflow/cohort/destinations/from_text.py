"""The destination that a text names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.destinations.objects import ObjectDestination
from ctflow.cohort.stores.objects import OBJECT_URL
from ctflow.core.errors import SettingsInvalid

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def destination_from_text(text: str, share: str) -> RowDestination:
    """The destination that a text names, not entered yet.

    Args:
        text: A folder's path, `file://`, `s3://` or `gs://`.
        share: Name of what this process computes: letters, digits and hyphens. No other process has the same.

    Raises:
        SettingsInvalid: It is a URL of a kind that is not known.
        RequirementUnmet: A package for such a URL is not installed.
    """
    match = _URL.match(text)
    if match is None:
        return FolderDestination(Path(text), share)
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise SettingsInvalid(
            "-o: a URL must not contain credentials: they come from the environment", reason="invalid-value"
        )
    if text.startswith("file:///"):
        return FolderDestination(Path(unquote(text.removeprefix("file://"))), share)
    if OBJECT_URL.fullmatch(text):
        return ObjectDestination(text, share)
    raise SettingsInvalid(
        "-o: must be a folder, file:///FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX", reason="invalid-value"
    )
