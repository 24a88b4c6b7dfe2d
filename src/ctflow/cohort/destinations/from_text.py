"""The destination that a text names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.destinations.objects import ObjectDestination
from ctflow.cohort.destinations.stow import StowDestination
from ctflow.cohort.stores.dicomweb import SERVER_URL
from ctflow.cohort.stores.objects import OBJECT_URL
from ctflow.core.errors import SettingsInvalid

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


_JOURNAL = "#journal="


def text_of_destination(output: str, journal: str | None) -> str:
    """One text for a destination and its journal, for `destination_from_text` in another process.

    Raises:
        SettingsInvalid: A DICOMweb server has no journal, or another destination has one.
    """
    if (SERVER_URL.fullmatch(output) is not None) != (journal is not None):
        raise SettingsInvalid(
            "--journal: a DICOMweb server as -o needs a folder or s3:// beside it, for what it does not keep; other"
            " destinations need none",
            reason="conflict",
        )
    return _absolute(output) if journal is None else f"{output}{_JOURNAL}{_absolute(journal)}"


def _absolute(text: str) -> str:
    return text if _URL.match(text) else str(Path(text).absolute())  # other processes have other working folders


def destination_from_text(text: str, share: str) -> RowDestination:
    """The destination that a text names, not entered yet.

    Args:
        text: A folder's path, `file://`, `s3://` or `gs://`; or `dicomweb+https://` with its journal
            (`text_of_destination`).
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
    server, _, journal = text.partition(_JOURNAL)
    if SERVER_URL.fullmatch(server) and journal and not journal.startswith("dicomweb"):
        return StowDestination(server, destination_from_text(journal, share))
    raise SettingsInvalid(
        "-o: must be a folder, file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, or dicomweb+https://SERVER with"
        " --journal",
        reason="invalid-value",
    )
