"""Digests of a series' files and of a result's objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ctflow.dicom.attributes import text
from ctflow.dicom.read.scan import Instance


def is_ct_image(instance: Instance) -> bool:
    """Whether a file is an image of a CT series, of which a manifest has rows."""
    return instance.has_pixels and text(instance.header, "Modality") == "CT"


def digest_of_series(instances: Iterable[Instance]) -> str:
    """The digest of a series' CT images: what `sha256sum FILES | cut -c-64 | sort | sha256sum` prints.

    Args:
        instances: All of the series; names and order of the files make no difference.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: A file cannot be read.
    """
    paths = {instance.path for instance in instances if is_ct_image(instance)}
    return _joined(_digest_of_file(path) for path in paths)


def digest_of_objects(folder: Path) -> str:
    """The digest of a result's DICOM files: equal for equal results, as these hold no time; empty without any."""
    files = sorted(folder.rglob("*.dcm"))
    return _joined(_digest_of_file(path) for path in files) if files else ""


def _digest_of_file(path: Path) -> str:
    """The SHA-256 digest of a file.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{each}\n" for each in sorted(digests)).encode()).hexdigest()
