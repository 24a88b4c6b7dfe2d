"""What a manifest's location may be."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from ctflow.cohort.stores.dicomweb import SERIES_URL
from ctflow.cohort.stores.objects import OBJECT_URL

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_SIGNED = re.compile(r"[?&](X-Amz-|X-Goog-|AWSAccessKeyId|Signature|sig|token)", re.IGNORECASE)


def fault_of_location(text: str) -> str:
    """Why a text is no location, for a message, without the text, as a path may contain a name; empty if it is one."""
    scheme = _SCHEME.match(text)
    if not text.strip():
        return "is empty: give the folder of its files"
    if any(ord(letter) < 32 for letter in text):
        return "contains a line break or another control character"
    if scheme is not None:
        return _fault_of_url(text, scheme[1])
    if _DRIVE.match(text):
        return "is a path of Windows: give the path where this computer has the folder"
    return ""


def _fault_of_url(text: str, scheme: str) -> str:
    host = text.partition("://")[2].partition("/")[0]
    if "@" in host or _SIGNED.search(text):
        return "contains credentials: they come from the environment"
    if scheme == "file":
        return "" if text.startswith("file:///") else "must be file:///FOLDER"
    if scheme in ("s3", "gs"):
        match = OBJECT_URL.fullmatch(text)
        has_prefix = match is not None and (match["prefix"] or "").strip("/*")
        return "" if has_prefix else f"must be {scheme}://BUCKET/PREFIX"
    if scheme in ("dicomweb+https", "dicomweb+http"):
        return "" if SERIES_URL.fullmatch(text) else f"must be {scheme}://SERVER/studies/UID/series/UID"
    return "is a URL of another kind than file, s3, gs, dicomweb+https and dicomweb+http"


def folder_of_location(text: str, base: Path) -> Path | None:
    """The folder that a location is; None if it must be fetched.

    Args:
        text: The location.
        base: The manifest's folder.
    """
    if text.startswith("file:///"):
        return Path(unquote(text.removeprefix("file://")))
    return None if _SCHEME.match(text) else base / text
