"""Identity of the code, where its version is not enough: stored results of other code are made anew."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files


@cache
def digest_of_package(*names: str) -> str:
    """The first 12 hexadecimal digits of a digest of packages' files, without those of packages below them."""
    digest = hashlib.sha256()
    for name in names:
        for entry in sorted(files(name).iterdir(), key=lambda entry: entry.name):
            if entry.is_file():
                digest.update(entry.read_bytes())
    return digest.hexdigest()[:12]
