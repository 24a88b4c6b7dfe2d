"""Which licences ctflow keeps out."""

from __future__ import annotations

import re


def is_gpl(licence: str) -> bool:
    """GPL or AGPL, but not LGPL, and not where another licence may be chosen."""
    return all(_names_gpl(choice) for choice in licence.split(" OR "))


def _names_gpl(licence: str) -> bool:
    text = re.sub(r"(?i)lesser general public|library or lesser|LGPL[\w.+-]*", "", licence)
    return bool(re.search(r"(?i)\bA?GPL|general public licen[sc]e", text))
