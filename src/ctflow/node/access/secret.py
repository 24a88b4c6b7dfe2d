"""Secrets in files, which only their owner may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ctflow.core.errors import SettingsInvalid

_LARGEST = 2**20


def read_secret_file(file: Path, key: str, remedy: str) -> bytes:
    """The content of a file that holds a secret.

    Args:
        file: The file.
        key: The setting that names it.
        remedy: What to do if it is absent.

    Raises:
        SettingsInvalid: It cannot be read, is no file, is larger than 1 MiB, or others may read it.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as stream:  # noqa: PTH123  # a descriptor
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode) or mode & 0o077:
                raise SettingsInvalid(
                    f"{key}: others than its owner can read the file: chmod 600 it", reason="secret-file"
                )
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise SettingsInvalid(
            f"{key}: the file cannot be read ({error.strerror}): {remedy}", reason="secret-file"
        ) from error
    if len(content) > _LARGEST:
        raise SettingsInvalid(f"{key}: the file is larger than 1 MiB: give another", reason="secret-file")
    return content


def read_secret_line(file: Path, key: str, least: int = 1) -> str:
    """The one line of a file that holds a password or token.

    Raises:
        SettingsInvalid: As of `read_secret_file`; or it holds not one line of printable ASCII, or too short a one.
    """
    found = read_secret_file(file, key, "make it, with the secret as its only line").decode("utf-8", "replace").strip()
    if len(found) < least or not found.isascii() or not found.isprintable():
        raise SettingsInvalid(
            f"{key}: the file must hold one line of {least} or more printable ASCII letters", reason="secret-file"
        )
    return found
