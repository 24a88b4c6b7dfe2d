"""Identity of the code, where its version is not enough: stored results of other code are made anew."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files


@cache
def digest_of_package(name: str) -> str:
    """The first 12 hexadecimal digits of a digest of a package's files, without those of packages below it."""
    entries = sorted(files(name).iterdir(), key=lambda entry: entry.name)
    return hashlib.sha256(b"".join([entry.read_bytes() for entry in entries if entry.is_file()])).hexdigest()[:12]
