"""Locks of a data folder: one node at a time, and nothing is removed while a backup is made."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctflow.core.atomic import output_error_from_oserror
from ctflow.core.errors import SettingsInvalid
from ctflow.node.journal.journal import LOCK_FILE

REMOVAL_LOCK = "removal-lock"  # shared by who removes files, alone with a backup


@contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Allow one node per data folder: two would run and send everything twice.

    Raises:
        SettingsInvalid: Another process has it.
        OutputError: The lock cannot be written.
    """
    with _opened(data / LOCK_FILE, "the lock of the data folder") as handle:
        if not _locked(handle, fcntl.LOCK_EX):
            raise SettingsInvalid(
                "data: another node uses this folder: stop it, or give another folder", reason="folder-in-use"
            )
        yield


def is_in_use(data: Path) -> bool:
    """Whether a node has the data folder."""
    if not (data / LOCK_FILE).exists():
        return False
    with _opened(data / LOCK_FILE, "the lock of the data folder") as handle:
        return not _locked(handle, fcntl.LOCK_EX)


@contextmanager
def may_remove(data: Path) -> Iterator[bool]:
    """Whether files may be removed now, and as long as the context lasts: not while a backup is made."""
    with _opened(data / REMOVAL_LOCK, "the lock for removals") as handle:
        yield _locked(handle, fcntl.LOCK_SH)


@contextmanager
def nothing_removed(data: Path) -> Iterator[None]:
    """Wait until nobody removes files, and keep them from beginning."""
    with _opened(data / REMOVAL_LOCK, "the lock for removals") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(file: Path, what: str) -> Iterator[int]:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o640)
        if os.geteuid() == 0:  # a command of root's must not keep the node's own user out
            owner = file.parent.stat()
            os.fchown(handle, owner.st_uid, owner.st_gid)
    except OSError as error:  # another user's
        raise output_error_from_oserror(error, what, "start as its user") from error
    try:
        yield handle
    finally:
        os.close(handle)
